"""Settings of consolidate and demo, which run all stages."""

from dataclasses import dataclass
from typing import Annotated, Literal

from tyro.conf import Suppress, arg

from repcon.config.base import BaseConfig
from repcon.config.data import PackConfig
from repcon.config.evaluation import EvaluateConfig
from repcon.config.labels import PrecomputeConfig
from repcon.config.training import TeachConfig, TrainConfig
from repcon.config.types import Device


@dataclass(frozen=True, slots=True, kw_only=True)
class ConsolidateConfig(BaseConfig):
    """From images and teachers to one backbone and a report.

    Its steps are pack, teach, precompute, train, evaluate and report; the same command goes on where it was stopped.
    What is not listed here is set by a recipe's tables [packing], [teaching], [labelling], [training] and [evaluation],
    with the fields of the commands pack, teach, precompute, train and evaluate; a flag goes over them.
    """

    proxy: Annotated[tuple[str, ...], arg(metavar="IMAGES ...")] = ()
    """Images to distil on; their labels, if any, are not used. Whatever `pack` takes, or one pack; several go into one
    pack."""
    teachers: Annotated[tuple[str, ...], arg(metavar="NAME=MODEL ...")] = ()
    """A MODEL is a timm name, `hf-hub:OWNER/NAME`, a folder, a weights package, or `module:function`."""
    out: str
    """Folder for all that is made."""
    teach: Annotated[tuple[str, ...], arg(metavar="NAME=LABELLED ...")] = ()
    """Further teachers, fine-tuned here on a labelled folder, tar or pack each."""
    evaluate: Annotated[tuple[str, ...], arg(metavar="NAME=LABELLED ...")] = ()
    """Labelled images on which student and teachers are measured."""
    backbone: str = ""
    """What the student is and starts from; empty takes the teacher called `generalist`, else the one of most
    classes."""
    size: int = 0
    """Input side in pixels of all models; 0 takes each teacher's own, and theirs for the student."""
    limit: int = 0
    """At most so many proxy images, equal shares of several sources; 0 takes all."""
    crops: int = 0
    """Crops per proxy image; 0 takes 8."""
    epochs: int = 0
    """Epochs of the student's training; 0 takes 10."""
    device: Device = "auto"
    """`auto` takes a GPU where torch sees one."""
    seed: int = 0
    estimate: bool = False
    """Pack the proxy, label a sample, print time and size; no more is made."""
    dry_run: bool = False
    """Check everything that needs no packing, print the plan, and write nothing."""
    allow_overlap: bool = False
    """Go on although the proxy holds images that are measured on."""
    packing: Suppress[PackConfig] = PackConfig(source="", out="")
    teaching: Suppress[TeachConfig] = TeachConfig(data="", out="")
    labelling: Suppress[PrecomputeConfig] = PrecomputeConfig(pack="", out="", temperatures=(1.0, 2.0))
    training: Suppress[TrainConfig] = TrainConfig(pack="", store="", out="")
    evaluation: Suppress[EvaluateConfig] = EvaluateConfig(out="")


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoConfig(BaseConfig):
    """Run the full pipeline on sample images, on a CPU, in minutes."""

    out: str = "demo-run"
    data: str = ""
    """A labelled image folder or tar of your own instead of the demo's drawings."""
    proxy: str = ""
    """Unlabelled images to distil on; empty uses the teacher's half of them."""
    domains: tuple[Literal["animals", "foods"], ...] = ("animals", "foods")
    """Of the drawings: a task teacher is made for each, and ONE student of all."""
    size: int = 128
    """Side of the drawings, and of what all models see, in pixels."""
    crops: int = 2
    """Crops per proxy image."""
    teacher_epochs: int = 12
    epochs: int = 4
    seed: int = 0
