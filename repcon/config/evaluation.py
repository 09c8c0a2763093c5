"""Settings of evaluate and report."""

from dataclasses import dataclass
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from repcon.config.base import BaseConfig
from repcon.config.data import ClassSubset
from repcon.config.types import Device, LoaderKind


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetConfig(BaseConfig):
    """One labelled data set of an evaluation, with a class subset of its own."""

    name: str
    """The name of its column: letters, digits, `.`, `-` and `_`."""
    data: str
    """A labelled image folder, tar or pack."""
    classes: ClassSubset = ClassSubset()


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateConfig(BaseConfig):
    """Measure how well backbones' features transfer."""

    data: str | tuple[str, ...] = ""
    """A labelled image folder, tar or pack; several, as NAME=DATA each, give results for each and their mean."""
    out: str
    """Folder for results and plots."""
    backbones: tuple[str, ...] = ()
    """`name=backbone` each: a timm name, a folder of `repcon train` or `repcon teach`, a weights package, or a
    `module:function` that returns (torch module that gives features, preprocessing); `name=backbone + backbone`
    concatenates the features of several."""
    baseline: str = ""
    """The backbone that paired differences refer to; empty takes the first."""
    student: str = ""
    """The backbone that the verdict is about; empty takes the student with the most heads, or the best backbone."""
    heads: bool = False
    """Also compare the students' heads with the classifiers of their teachers, on labelled images of the teachers'
    classes; with `metrics` empty nothing else is measured."""
    teachers: tuple[str, ...] = ()
    """For `heads`: NAME=MODEL, where NAME is a head's; empty takes the backbones that are called like a head."""
    classes: ClassSubset = ClassSubset()
    """Of every data set that `data` names."""
    datasets: tuple[DatasetConfig, ...] = ()
    """Labelled data sets with class subsets of their own, in place of `data`."""
    size: int = 0
    """Input side in pixels, of all backbones; 0 takes each backbone's own."""
    test: float = 0.5
    """Share of each class that is tested on; the rest trains the probes."""
    folds: int = 0
    """Cross-validation for small data sets: each of so many parts of the images is tested once, the others train; 0
    splits once, by `test`."""
    metrics: tuple[Literal["knn", "probe", "fewshot", "finetune"], ...] = ("knn", "probe", "fewshot")
    """What is measured, of `knn`, `probe`, `fewshot` and `finetune`; all but the last if not given."""
    fewshot_trials: int = 20
    """Few-shot draws per number of shots."""
    batch_size: int = 64
    cache: str = ""
    """Folder for extracted features; empty keeps them with the results."""
    loader: LoaderKind = "auto"
    num_workers: int = 0
    """Decoding threads; 0 starts one per core, for a GPU three for four cores, for DALI on it one for two."""
    device: Device = "auto"
    """`auto` takes a GPU where torch sees one."""
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportConfig(BaseConfig):
    """Turn run folders and records into Markdown and one HTML file."""

    paths: Annotated[Positional[tuple[str, ...]], arg(metavar="PATH")]
    """Run folders, stores' run folders, benchmark records."""
    out: str = "report"
    title: str = "repcon report"
