"""Every command's configuration: frozen dataclasses that are read from TOML, overridden by flags, and written back.

A recipe is a TOML file whose keys are the fields below; an unknown key or a wrong type is an error that names it.
"""

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from tyro.conf import Positional, Suppress, arg

from repcon.config.checks import Checked
from repcon.runtime.errors import UserError

Precision = Literal["fp32", "bf16", "fp16"]
TrainingPrecision = Literal["auto", "fp32", "bf16", "fp16"]
LoaderKind = Literal["auto", "reference", "torch", "dali", "ffcv"]
Tail = Literal["bucket", "renormalise", "uniform"]
LossKind = Literal["auto", "torch", "triton"]
Codec = Literal["zstd", "lz4"]
Values = Literal["float16", "quantized8"]
Device = Literal["auto", "cpu", "cuda"]
Init = Literal["auto", "average", "backbone"]
TrackerKind = Literal["tensorboard", "wandb", "mlflow", "trackio"]
AutoBool = bool | Literal["auto"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassSubset(Checked):
    """A part of a data set's classes: those of `names`, or a slice [start, stop) of all, shuffled by `seed`."""

    names: Annotated[tuple[str, ...], arg(name="")] = ()
    """Classes by name or number (`--classes 5 6 7`); a number counts the pack's classes in their order, from 0."""
    seed: int = 0
    start: float = 0.0
    """Where the slice begins, as a share of the classes."""
    stop: float = 1.0
    """Where it ends. start=0, stop=0.5 is the teacher half, start=0.5, stop=1 the downstream half."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PackConfig(Checked):
    """Pack images into tar shards that teachers and students read."""

    source: Annotated[Positional[str | tuple[str, ...]], arg(metavar="SOURCE [SOURCE ...]")]
    """An image folder (a sub-folder per class gives labels), a WebDataset tar, a Parquet file, a folder of such files,
    or hf://datasets/OWNER/NAME[/CONFIG][:SPLIT]; several go into one pack, classes of one name together."""
    out: Annotated[Positional[str], arg(metavar="OUT")]
    """Folder that the pack is written to."""
    limit: int = 0
    """At most so many images, spread evenly over each source; several sources get equal shares, as far as they have so
    many. 0 takes all."""
    max_side: int = 1024
    """Longest side in pixels; larger images are made smaller, once. 0 keeps every size."""
    jpeg_quality: int = 95
    """Of images that have to be re-encoded; baseline RGB JPEGs keep their bytes."""
    shard_megabytes: int = 256
    num_workers: int = 0
    """Threads that read and encode; 0 takes one per core."""
    ffcv: bool = False
    """Also write `images.beton` for FFCV, with the same JPEG bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CropConfig(Checked):
    """How crop boxes are drawn: torchvision's RandomResizedCrop, from a counter-based generator."""

    seed: int = 0
    scale: tuple[float, float] = (0.25, 1.0)
    """Smallest and largest share of the image's area."""
    ratio: tuple[float, float] = (0.75, 4 / 3)
    """Narrowest and widest shape, width over height."""
    flip: float = 0.5
    """Probability of a horizontal flip."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherConfig(Checked):
    """One teacher: a classifier whose answers are stored."""

    name: str
    """The head's name in the store: letters, digits, `-` and `_`."""
    model: str
    """A timm name, a folder that timm or `repcon teach` wrote, `package:efficientnet_lite0`, or
    `module:function` that returns (torch module, preprocessing)."""
    size: int = 0
    """Input side in pixels; 0 takes the model's own."""
    precision: Precision = "fp32"
    compile: bool = False
    licence: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class PrecomputeConfig(Checked):
    """Run every teacher once over the planned crops and store the top-k soft labels.

    Teachers are named by `--teachers NAME=MODEL [NAME=MODEL ...]`, or by a recipe's [[teachers]].
    """

    pack: str
    out: str
    """The store's folder or URL, for example `labels.zarr`."""
    teachers: tuple[TeacherConfig, ...] = ()
    crops: int = 0
    """Crops per image; 0 takes the store's, 8 for a new store."""
    crop: CropConfig = CropConfig()
    """How crops are drawn; the defaults stand for the store's where there is one."""
    k: int = 0
    """Most probable classes that are stored of each answer; 0 takes the store's, 16 for a new store."""
    temperatures: tuple[float, ...] = ()
    """The temperatures whose exact tails are stored: those that students may be trained at, except by renormalising.
    None takes the store's, 1 for a new store."""
    codec: Literal["auto", Codec] = "auto"
    """`lz4` decodes faster and takes more room than `zstd`; `auto` takes the store's, `zstd` for a new store."""
    values: Literal["auto", Values] = "auto"
    """`quantized8` stores log-probabilities in a byte each, two thirds of the room of `float16`; `auto` takes the
    store's, `float16` for a new store."""
    rows_per_shard: int = 0
    """Images per shard; 0 chooses by the pack's size."""
    loader: LoaderKind = "auto"
    batch_size: int = 0
    """Crops per forward pass; 0 finds it."""
    num_workers: int = 0
    """Decoding threads; 0 starts one per core, for a GPU three for four cores, for DALI on it one for two."""
    device: Device = "auto"
    estimate: bool = False
    """Run a sample, print time, size and KL error for each k, and write nothing."""
    tolerate_missing: bool = False
    """End with exit code 0 although some images could not be decoded."""
    processes: int = 0
    """Processes on this machine, each taking whole units; 0 starts one per GPU, or one where there is none."""
    records: str = ""
    """Folder for this command's own records (metrics, environment); empty puts them beside the store. Each of several
    commands that label one store at the same time needs its own."""
    ray: str = ""
    """Address of a Ray cluster (`auto` for the running one); empty for none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InspectConfig(Checked):
    """Show what a store holds and what its truncation costs."""

    store: Annotated[Positional[str], arg(metavar="STORE")]
    """The store's folder or URL."""
    html: str = ""
    """Also write a self-contained page with plots here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyConfig(Checked):
    """Check a store: structure, checksums, fill values, normalisation, and a sample re-run through the teachers."""

    store: Annotated[Positional[str], arg(metavar="STORE")]
    """The store's folder or URL."""
    pack: str = ""
    """The pack; needed for the re-run of the teachers."""
    sample: int = 64
    """Crops that are recomputed; 0 leaves the re-run out."""
    loaders: tuple[LoaderKind, ...] = ("auto",)
    """Decoders of the re-run; `auto` takes the reference and every other that is installed."""
    max_kl: float = 0.01
    """Mean KL in nat between stored and recomputed labels above which the check fails."""
    min_agreement: float = 0.99
    """Top-1 agreement below which the check fails."""
    models: tuple[str, ...] = ()
    """Where teachers lie here, as NAME=MODEL, in place of the store's word for it. A `module:function` runs, and a
    model is downloaded, only where it is named so: a store's own word is not enough."""
    device: Device = "auto"
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadConfig(Checked):
    """What one teacher's head counts for in the loss."""

    name: str
    weight: float = 1.0
    temperature: float = 0.0
    """0 takes the highest temperature of at most 2 whose tail is stored."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimConfig(Checked):
    """Optimiser and schedule, by timm's names."""

    name: str = "adamw"
    lr: float = 1e-3
    weight_decay: float = 0.02
    schedule: str = "cosine"
    warmup_epochs: float = 1.0
    """At most half of the run; the schedule `none` keeps the rate from the first update on."""
    clip_norm: float = 1.0
    """Largest gradient norm; 0 does not clip."""
    ema: float = 0.0
    """Decay of the moving average of the weights; 0 keeps none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig(Checked):
    """Distil the stored teachers into one student."""

    pack: str
    store: str
    out: str
    backbone: str = "package:efficientnet_lite0"
    """A timm name, a folder, or a weights package."""
    pretrained: bool = True
    """Start from the backbone's weights, not from random ones."""
    init: Init = "auto"
    """Initial weights of the backbone: the weighted mean of its teachers' (`average`), or its own (`backbone`). `auto`
    averages where all teachers of the heads have the backbone's architecture and it is no earlier student."""
    init_weights: dict[str, float] = dataclasses.field(default_factory=dict)
    """Each teacher's share of the mean, summing to 1; empty lets the stored labels of some crops choose."""
    init_students: tuple[str, ...] = ()
    """Output folders of earlier students: start from the mean of their backbones, each head from the mean of theirs, in
    place of `init`. For ONE student of several tasks, those of each task and the generalist."""
    models: tuple[str, ...] = ()
    """Where teachers' weights are here, as NAME=MODEL, in place of the store's word for it."""
    heads: tuple[HeadConfig, ...] = ()
    """Heads to train on; empty takes all of the store's."""
    balance_heads: AutoBool = "auto"
    """Divide each head's weight by the largest KL from its teacher that any single teacher's weights have, so that a
    teacher far from the others does not outweigh them; `auto` does so where `heads` is empty. Without `init` by average
    there is nothing to divide by."""
    init_heads: bool = True
    """Start a head from its teacher's own classifier where that is linear and the architectures are the same, and,
    where the backbone is an earlier student, from the head that it had for the same teacher."""
    head_warmup_steps: int = 300
    """Updates that heads with random weights take on the features of the pretrained backbone, before it moves; 0 for
    none."""
    projection: int = 0
    """Width of a per-head hidden projection before the head; 0 for none."""
    size: int = 0
    """Input side in pixels; 0 takes that of the teachers."""
    epochs: int = 10
    batch_size: int = 0
    """Crops per step over all processes; 0 takes 8 to 256 by the number of images."""
    crops_per_decode: int = 1
    """Crops cut from one decoded image."""
    mix_window: int = 0
    """Batches over which the crops of one image are spread; 0 keeps them in one batch."""
    label_cache_gib: float = 0.0
    """GiB for stored labels in each process: where two passes' labels take more, they are read, and images shuffled, in
    windows. 0 holds them whole, one copy for all processes of a machine."""
    optim: OptimConfig = OptimConfig(lr=0.0)
    """A rate `lr` of 0 takes 3e-4, times crops / 64 where a step has fewer crops than 64."""
    grad_accum_steps: int = 1
    """Batches whose gradients are summed into one step."""
    freeze_blocks: int = 0
    """How many of the backbone's first blocks (with its stem) keep their weights."""
    freeze_norm: AutoBool = "auto"
    """Keep batch-norm statistics as the start has them; `auto` keeps those of pretrained weights."""
    precision: TrainingPrecision = "auto"
    """`auto` takes bf16 where the device computes in it, and fp32 elsewhere."""
    compile: bool = False
    tail: Tail = "uniform"
    """What the classes that were not stored get of a teacher's answer: equal shares of what is left (`uniform`), one
    share for all together (`bucket`), or nothing (`renormalise`)."""
    loss: LossKind = "auto"
    """How the loss is computed; `auto` takes Triton on a GPU."""
    loader: LoaderKind = "auto"
    num_workers: int = 0
    """Decoding threads; 0 starts one per core, for a GPU three for four cores, for DALI on it one for two."""
    device: Device = "auto"
    seed: int = 0
    val_fraction: float = 0.02
    """Share of the images kept for validation."""
    knn: str = ""
    """A labelled folder or pack on which kNN is measured after each pass (`crops_per_decode` epochs)."""
    keep_checkpoints: int = 2
    checkpoint_minutes: float = 15.0
    trackers: tuple[TrackerKind, ...] = ()
    """Where the run's figures go beside its own metrics.jsonl: `tensorboard`, `wandb`, `mlflow`, `trackio`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TeachConfig(Checked):
    """Fine-tune a generalist on labelled images into a task teacher."""

    data: str
    """A labelled image folder, tar or pack."""
    out: str
    model: str = "package:efficientnet_lite0"
    classes: ClassSubset = ClassSubset()
    size: int = 224
    epochs: int = 10
    batch_size: int = 64
    optim: OptimConfig = OptimConfig()
    label_smoothing: float = 0.0
    crop: CropConfig = CropConfig()
    freeze_blocks: int = 0
    freeze_norm: bool = False
    validation: float = 0.15
    """Share of each class kept to choose the best epoch."""
    licence: str = ""
    """Of the start's weights and the images together; kept with the teacher and in every store that it labels."""
    precision: TrainingPrecision = "auto"
    """`auto` takes bf16 where the device computes in it, and fp32 elsewhere."""
    loader: LoaderKind = "auto"
    num_workers: int = 0
    """Decoding threads; 0 starts one per core, for a GPU three for four cores, for DALI on it one for two."""
    device: Device = "auto"
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetConfig(Checked):
    """One labelled data set of an evaluation, with a class subset of its own."""

    name: str
    """The name of its column: letters, digits, `.`, `-` and `_`."""
    data: str
    """A labelled image folder, tar or pack."""
    classes: ClassSubset = ClassSubset()


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateConfig(Checked):
    """Measure how well backbones' features transfer to labelled data."""

    data: str | tuple[str, ...] = ""
    """A labelled image folder, tar or pack; several, as NAME=DATA each, give results for each and their mean."""
    out: str
    backbones: tuple[str, ...] = ()
    """`name=backbone` each: a timm name, a folder of `repcon train` or `repcon teach`, a weights package, or a
    `module:function` that returns (torch module that gives features, preprocessing); `name=backbone + backbone`
    concatenates the features of several."""
    baseline: str = ""
    """The backbone that paired differences refer to; empty takes the first."""
    student: str = ""
    """The backbone that the verdict is about; empty takes the student with the most heads, or the best backbone."""
    heads: bool = False
    """Also measure the students' heads beside the classifiers of their teachers, on labelled images of the teachers'
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
    metrics: tuple[Literal["knn", "probe", "fewshot", "finetune"], ...] = ("knn", "probe", "fewshot")
    fewshot_trials: int = 20
    """Few-shot draws per number of shots."""
    batch_size: int = 64
    cache: str = ""
    """Folder for extracted features; empty keeps them beside the results."""
    loader: LoaderKind = "auto"
    num_workers: int = 0
    """Decoding threads; 0 starts one per core, for a GPU three for four cores, for DALI on it one for two."""
    device: Device = "auto"
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportConfig(Checked):
    """Turn run folders and benchmark records into Markdown and one self-contained HTML file."""

    paths: Annotated[Positional[tuple[str, ...]], arg(metavar="PATH")]
    """Run folders, stores' run folders, benchmark records."""
    out: str = "report"
    title: str = "repcon report"


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportConfig(Checked):
    """Write a student as one file that opens without repcon and timm, for batches of any size."""

    model: Annotated[Positional[str], arg(metavar="STUDENT")]
    """A folder of `repcon train`."""
    to: Literal["onnx", "torch"]
    """An ONNX model, or a program of torch.export (.pt2)."""
    out: str = ""
    """The file; empty takes `student.onnx` or `student.pt2` in the student's folder. One that exists is replaced."""
    normalize: bool = False
    """Take (B, 3, S, S) uint8 pixels and normalise them inside; otherwise float32 that is normalised."""
    heads: bool = False
    """Also give the logits of each head, as `logits/NAME`, beside the pooled features."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PushConfig(Checked):
    """Put a student, a teacher or a label store, with its card, on the Hugging Face hub."""

    source: Annotated[Positional[str], arg(metavar="WHAT")]
    """A folder of `repcon train` or `repcon teach`, or a store."""
    repository: Annotated[Positional[str], arg(metavar="hf://OWNER/NAME[/PATH]")]
    """Where to; a store goes to `hf://datasets/OWNER/NAME[/PATH]`. A repository that is missing is made."""
    private: bool = False
    """Make the repository private; refused where it is there and public."""
    revision: str = ""
    """The branch; empty takes the main one, and one that is missing is made."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PullConfig(Checked):
    """Get what `repcon push` put on the Hugging Face hub, and check it before it is there."""

    repository: Annotated[Positional[str], arg(metavar="hf://OWNER/NAME[/PATH]")]
    """Where from; a store lies at `hf://datasets/OWNER/NAME[/PATH]`."""
    out: str
    """Folder that is made for it; it must not be there yet."""
    revision: str = ""
    """A branch, tag or commit; empty takes the main branch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ConsolidateConfig(Checked):
    """From images and teachers to one backbone and a report: pack, teach, precompute, train, evaluate, report.

    The same command goes on where it was stopped. What is not listed here is set by a recipe's tables [packing],
    [teaching], [labelling], [training] and [evaluation], with the fields of the commands pack, teach, precompute, train
    and evaluate; a flag goes over them.
    """

    proxy: tuple[str, ...] = ()
    """Images to distil on; their labels, if any, are not used. Whatever `pack` takes, or one pack; several go into one
    pack."""
    teachers: tuple[str, ...] = ()
    """NAME=MODEL each: a timm name, `hf-hub:`, a folder, a weights package, or `module:function`."""
    out: str
    """Folder for all that is made."""
    teach: tuple[str, ...] = ()
    """NAME=LABELLED each: a further teacher, fine-tuned here on a labelled folder, tar or pack."""
    evaluate: tuple[str, ...] = ()
    """NAME=LABELLED each: data on which the student is measured beside its teachers."""
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
    """The student's; 0 takes 10."""
    device: Device = "auto"
    seed: int = 0
    estimate: bool = False
    """Pack the proxy, run a sample, print time and size, and make nothing."""
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
class DemoConfig(Checked):
    """The whole way on real pictures, on the CPU, in a few minutes."""

    out: str = "demo-run"
    data: str = ""
    """A labelled image folder or tar of your own instead of the demo's drawings."""
    proxy: str = ""
    """Unlabeled images to distil on, beside `--data`; empty uses the teacher's half of them."""
    domains: tuple[Literal["animals", "foods"], ...] = ("animals", "foods")
    """Of the drawings: a task teacher is made for each, and ONE student of all."""
    size: int = 128
    """Side of the drawings, and of what all models see, in pixels."""
    crops: int = 2
    """Crops per proxy image."""
    teacher_epochs: int = 12
    epochs: int = 4
    seed: int = 0


def require_least(config: Any, **least: float) -> None:
    """Raises UserError naming the first of these fields that lies below its least value."""
    for field, value in least.items():
        if not getattr(config, field) >= value:
            raise UserError(f"{field}: {getattr(config, field)} makes no sense; it must be {value} or more")


def require_sane(optim: OptimConfig) -> None:
    """Raises UserError naming the first field of the optimiser that makes no sense."""
    for field in ("lr", "weight_decay", "warmup_epochs", "clip_norm", "ema"):
        if not getattr(optim, field) >= 0:
            raise UserError(f"optim.{field}: {getattr(optim, field)} makes no sense; it must be 0 or more")
    if optim.ema >= 1:
        raise UserError(
            f"optim.ema: {optim.ema} would never take in what is learnt; 0.999 is usual, 0 keeps no average"
        )
