"""Settings of train and teach."""

import dataclasses
from dataclasses import dataclass

from repcon.config.base import BaseConfig, check_minimum
from repcon.config.data import ClassSubset, CropConfig
from repcon.config.types import AutoBool, Device, Init, LoaderKind, LossKind, Tail, TrackerKind, TrainingPrecision
from repcon.runtime.errors import UserError


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadConfig(BaseConfig):
    """Weight and temperature of one teacher's head in the loss."""

    name: str
    weight: float = 1.0
    temperature: float = 0.0
    """0 takes the highest temperature of at most 2 whose tail is stored."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimConfig(BaseConfig):
    """Optimizer and schedule, by timm's names."""

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
class TrainConfig(BaseConfig):
    """Distil the stored teachers into one student."""

    pack: str
    """The pack that the labels were made on; folder or URL."""
    store: str
    """The label store of `repcon precompute`; folder or URL."""
    out: str
    """Folder for the run; the student is `student` in it."""
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
    """Width of a hidden layer before each head, which makes it an MLP; 0 keeps heads linear."""
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
    """`auto` takes a GPU where torch sees one."""
    seed: int = 0
    val_fraction: float = 0.02
    """Share of the images kept for validation."""
    knn: str = ""
    """A labelled folder or pack on which kNN is measured after each pass (`crops_per_decode` epochs)."""
    keep_checkpoints: int = 2
    checkpoint_minutes: float = 15.0
    trackers: tuple[TrackerKind, ...] = ()
    """Where the run's figures go besides its own metrics.jsonl: `tensorboard`, `wandb`, `mlflow`, `trackio`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TeachConfig(BaseConfig):
    """Fine-tune a generalist into a task teacher."""

    data: str
    """A labelled image folder, tar or pack."""
    out: str
    """Folder for the teacher."""
    model: str = "package:efficientnet_lite0"
    """What it starts from: a timm name, a folder, or a weights package."""
    classes: ClassSubset = ClassSubset()
    size: int = 224
    """Input side in pixels."""
    epochs: int = 10
    """Passes over the images."""
    batch_size: int = 64
    optim: OptimConfig = OptimConfig()
    label_smoothing: float = 0.0
    crop: CropConfig = CropConfig()
    freeze_blocks: int = 0
    """Keep the stem and so many of the first blocks as they are."""
    freeze_norm: bool = False
    val_fraction: float = 0.15
    """Share of each class kept to choose the best epoch."""
    license: str = ""
    """Of the start's weights and the images together; kept with the teacher and in every store that it labels."""
    precision: TrainingPrecision = "auto"
    """`auto` takes bf16 where the device computes in it, and fp32 elsewhere."""
    loader: LoaderKind = "auto"
    num_workers: int = 0
    """Decoding threads; 0 starts one per core, for a GPU three for four cores, for DALI on it one for two."""
    device: Device = "auto"
    """`auto` takes a GPU where torch sees one."""
    seed: int = 0


def check_optim_config(optim: OptimConfig) -> None:
    """Raises UserError naming the first field that is out of range."""
    check_minimum(optim, "optim.", lr=0, weight_decay=0, warmup_epochs=0, clip_norm=0, ema=0)
    if optim.ema >= 1:
        raise UserError(
            f"optim.ema: {optim.ema} would never take in what is learnt; 0.999 is usual, 0 keeps no average"
        )
