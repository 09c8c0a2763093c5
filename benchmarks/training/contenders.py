"""What `training.py` lets compete: one epoch each of ours, plain supervised training, and online distillation."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.training.data import CLASSES, Data, Setting
from repcon.config import HeadConfig, OptimConfig, TrainConfig
from repcon.distill.distributed import DistributedContext
from repcon.distill.label_cache import to_device
from repcon.distill.loader import Batch, DistillLoader
from repcon.distill.metrics import StepTimer
from repcon.distill.optim import OptimizerUpdates, autocast, resolve_precision
from repcon.distill.trainer import Trainer
from repcon.images.pack import ImagePack
from repcon.labels.store import LabelStore
from repcon.models.preprocessing import normalise
from repcon.models.timm_import import timm

LIGHT = "mobilenetv3_small_050"
OPTIM = OptimConfig(warmup_epochs=0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """`epoch` trains over all images, once or as often as the setting says, and gives the number of crops."""

    epoch: Callable[[], int]
    clock: StepTimer = field(default_factory=StepTimer)
    close: Callable[[], None] = lambda: None

    def data_seconds(self) -> float:
        """Time spent waiting for data since the last call."""
        return self.clock.pop()[0]


def heavy_contenders(data: Data, setting: Setting, device: str, only: str = "") -> dict[str, Contender]:
    """Ours, the ideal and the synthetic on a backbone that costs more than its data; online distillation beside it."""
    makers: dict[str, Callable[[Trainer], Contender]] = {
        "synthetic": _synthetic,
        "ours": _ours,
        "ideal": _ideal,
        "ours_one": _ours,
        "online": lambda trainer: _online(trainer, setting, _timm_task),
        "online_two": lambda trainer: _online(trainer, setting, _plain_online),
    }
    if importlib.util.find_spec("torchdistill") is not None:
        makers["torchdistill"] = lambda trainer: _online(trainer, setting, _torchdistill)
    if device == "cpu" and resolve_precision("auto", torch.device(device)) == "bf16":
        makers["ours_bf16"] = _ours
    if device != "cpu" and setting.loader == "auto":
        makers["ours_torch"] = _ours
    changed = {"ours_bf16": replace(setting, precision="bf16"), "ours_torch": replace(setting, loader="torch")}

    def trainer(name: str) -> Trainer:
        heads = tuple(CLASSES)[: 1 if name in ("ours_one", "online", "torchdistill") else 2]
        return _trainer(data.heavy, changed.get(name, setting), device, setting.heavy, heads, setting.heavy_epochs)

    return {name: make(trainer(name)) for name, make in makers.items() if only in ("", name)}


def light_contenders(data: Data, setting: Setting, device: str, only: str = "") -> dict[str, Contender]:
    """Ours with 1 and 4 crops per decode, and plain training, on a backbone that costs about as much as its data."""

    def ours(crops_per_decode: int) -> Contender:
        return _ours(_trainer(data.light, setting, device, LIGHT, tuple(CLASSES), crops_per_decode=crops_per_decode))

    makers = {
        "plain": lambda: _plain(data.folder, setting, device),
        "ours_1": lambda: ours(1),
        "ours_4": lambda: ours(4),
    }
    return {name: make() for name, make in makers.items() if only in ("", name)}


def _trainer(
    data: tuple[ImagePack, LabelStore],
    setting: Setting,
    device: str,
    backbone: str,
    heads: tuple[str, ...],
    epoch_groups: int = 1,
    crops_per_decode: int = 1,
) -> Trainer:
    pack, store = data
    epochs = epoch_groups * crops_per_decode
    settings = TrainConfig(
        pack="",
        store="",
        out="",
        backbone=backbone,
        pretrained=False,
        size=setting.size,
        epochs=epochs,
        batch_size=setting.batch_size,
        crops_per_decode=crops_per_decode,
        heads=tuple(HeadConfig(name=name) for name in heads),
        optim=OPTIM,
        precision=setting.precision,
        val_fraction=0.0,
    )
    loader = DistillLoader(
        pack,
        store,
        size=setting.size,
        batch_size=setting.batch_size,
        epochs=epochs,
        heads=heads,
        crops_per_decode=crops_per_decode,
        loader=setting.loader,
        num_workers=setting.num_workers,
        device=device,
    )
    return Trainer(
        settings, store, loader, DistributedContext(rank=0, world_size=1, device=torch.device(device), cpu_group=None)
    )


def _ours(trainer: Trainer) -> Contender:
    clock = StepTimer()

    def epoch() -> int:
        trainer.student.train()
        shown = 0
        for part, batches in trainer.loader.groups():
            for number, batch in enumerate(clock.measure(batches)):
                trainer.train_batch(batch, part, number)
                shown += batch.total
        return shown

    return Contender(epoch=epoch, clock=clock, close=trainer.loader.close)


def _synthetic(trainer: Trainer) -> Contender:
    """The trainer's own steps on one batch again and again."""
    batches = trainer.loader.batches(0)
    first = next(batches)
    batches.close()

    def epoch() -> int:
        trainer.student.train()
        for part, steps in enumerate(trainer.loader.group_steps):
            for number in range(steps):
                trainer.train_batch(first, part, number)
        return trainer.loader.steps * first.total

    return Contender(epoch=epoch)


def _ideal(trainer: Trainer) -> Contender:
    """The student alone: the same crops, a cross-entropy on labels that are there."""
    settings, device = trainer.settings, trainer.distributed.device

    def step(batch: Batch) -> None:
        logits = trainer.forward(batch.pixels)
        labels = to_device(batch.images % logits.shape[1], device)
        trainer.updates.step(F.cross_entropy(logits.float(), labels))

    assert settings.grad_accum_steps == 1
    return _stepping(trainer, step)


Distil = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(normalised images, hard labels that no one uses) to the loss."""


def _online(
    trainer: Trainer, setting: Setting, make: Callable[[nn.Module, nn.ModuleList, Trainer], Distil]
) -> Contender:
    """The same backbone, crops and optimiser, with the teachers of the heads run in every step."""
    device, heads = trainer.distributed.device, trainer.student.heads
    teachers = nn.ModuleList(timm.create_model(setting.heavy, num_classes=count) for count in heads.values())
    student = timm.create_model(setting.heavy, num_classes=sum(heads.values()))
    for model in (student, teachers):
        model.to(device=device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    loss = make(student, teachers.eval().requires_grad_(False), trainer)
    updates = OptimizerUpdates(student, OPTIM, total=10**6, per_epoch=1.0, device=device, precision=setting.precision)

    def step(batch: Batch) -> None:
        student.train()
        images = normalise(batch.pixels, trainer.preprocessing, torch.float32)
        targets = torch.zeros(len(images), dtype=torch.int64, device=images.device)
        with autocast(device, setting.precision):
            total = loss(images, targets)
        updates.step(total)

    return _stepping(trainer, step)


def _stepping(trainer: Trainer, step: Callable[[Batch], None]) -> Contender:
    def epoch() -> int:
        trainer.student.train()
        shown = 0
        for _, batches in trainer.loader.groups():
            for batch in batches:
                step(batch)
                shown += batch.total
        return shown

    return Contender(epoch=epoch)


def _timm_task(student: nn.Module, teachers: nn.ModuleList, trainer: Trainer) -> Distil:
    """timm.task's distillation takes one teacher of the student's classes."""
    from timm.task import LogitDistillationTask

    device = trainer.distributed.device
    task = LogitDistillationTask(
        student, teachers[0], distill_loss_weight=1.0, task_loss_weight=0.0, device=device, verbose=False
    )
    return lambda images, targets: task(images, targets)["loss"]


def _plain_online(student: nn.Module, teachers: nn.ModuleList, trainer: Trainer) -> Distil:
    """Several teachers of different classes, as one would write it."""

    def loss(images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            answers = [teacher(images) for teacher in teachers]
        parts = student(images).split([answer.shape[1] for answer in answers], dim=1)
        pairs = zip(parts, answers, strict=True)
        return torch.stack([_kl(part.float(), answer.float()) for part, answer in pairs]).sum()

    return loss


def _kl(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    return F.kl_div(student.log_softmax(1), teacher.log_softmax(1), reduction="batchmean", log_target=True)


def _torchdistill(student: nn.Module, teachers: nn.ModuleList, trainer: Trainer) -> Distil:
    """torchdistill's box with its KD loss; the optimiser stays ours."""
    from torchdistill.core.distillation import get_distillation_box  # pyright: ignore[reportMissingImports]

    ends = {
        f"{who}_module_{what}": value
        for who in ("student", "teacher")
        for what, value in (("path", "."), ("io", "output"))
    }
    term = {"criterion": {"key": "KDLoss", "kwargs": {**ends, "temperature": 1.0, "alpha": 0.0}}, "weight": 1.0}
    recipe = {
        "num_epochs": 1,
        "criterion": {"key": "WeightedSumLoss", "kwargs": {"sub_terms": {"kd": term}}},
        "teacher": {"forward_proc": "forward_batch_only", "requires_grad": False},
        "student": {"forward_proc": "forward_batch_only"},
    }
    box = get_distillation_box(teachers[0], student, {}, recipe, trainer.distributed.device, None, False, 1.0)
    return lambda images, targets: box.forward_process(images, targets)


def _plain(folder: Path, setting: Setting, device: str) -> Contender:
    """Supervised training of the light backbone as timm does it: its data set, loader and augmentation, hard labels."""
    from timm.data import create_dataset, create_loader  # pyright: ignore[reportPrivateImportUsage]

    place = torch.device(device)
    model = timm.create_model(LIGHT, num_classes=sum(CLASSES.values()))
    model.to(device=place, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    loader = create_loader(
        create_dataset("", root=str(folder), is_training=True),  # pyright: ignore[reportArgumentType]
        input_size=(3, setting.size, setting.size),
        batch_size=setting.batch_size,
        is_training=True,
        scale=(0.25, 1.0),
        color_jitter=0.0,
        interpolation="bilinear",
        num_workers=torch.get_num_threads(),
        device=place,
        pin_memory=device == "cuda",
    )
    updates = OptimizerUpdates(model, OPTIM, total=10**6, per_epoch=1.0, device=place, precision=setting.precision)

    def epoch() -> int:
        model.train()
        shown = 0
        for images, labels in loader:
            with autocast(place, setting.precision):
                logits = model(images.contiguous(memory_format=torch.channels_last))
            updates.step(F.cross_entropy(logits.float(), labels))
            shown += len(images)
        return shown

    return Contender(epoch=epoch)
