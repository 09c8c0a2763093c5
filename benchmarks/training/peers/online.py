"""Students whose teachers run in every step, by the distillation of timm and of torchdistill, with several teachers.

They see the crops, the optimizer, the schedule, the frozen blocks and the number of updates of repcon's own student.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from repcon.config import HeadConfig, TrainConfig
from repcon.distill.auto_settings import resolve_auto_settings
from repcon.distill.loader import DistillLoader
from repcon.distill.optim import OptimizerUpdates, autocast
from repcon.images.pack import ImagePack
from repcon.labels.store import LabelStore
from repcon.models.factory import create_model
from repcon.models.preprocessing import Preprocessing, normalise
from repcon.models.student import Student, build_student

Loss = Callable[[torch.Tensor], torch.Tensor]
"""(B, 3, S, S) normalised images to the loss of all heads."""
Teachers = Mapping[str, nn.Module]
"""By their heads' names."""


def timm_loss(student: Student, teachers: Teachers, heads: Mapping[str, HeadConfig], data: Preprocessing) -> Loss:
    """timm.task takes one teacher of the student's classes: a task per teacher, on the head that is its."""
    from timm.task import LogitDistillationTask

    features = Once(student.backbone)
    tasks = {
        name: LogitDistillationTask(
            Head(student, features, name, data), teacher, distill_loss_weight=heads[name].weight, task_loss_weight=0.0,
            temperature=heads[name].temperature, device=torch.device("cpu"), verbose=False,
        )
        for name, teacher in teachers.items()
    }  # fmt: skip

    def loss(images: torch.Tensor) -> torch.Tensor:
        unused = torch.zeros(len(images), dtype=torch.int64)  # hard labels, of weight 0
        return torch.stack([task(images, unused)["loss"] for task in tasks.values()]).sum()

    return loss


class Once:
    """A backbone that computes a batch's features once for all heads; not a module, so that no head owns it."""

    def __init__(self, backbone: nn.Module) -> None:
        self._backbone = backbone
        self._last: tuple[torch.Tensor, torch.Tensor] | None = None
        """Images and their features."""

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        if self._last is None or images is not self._last[0]:
            self._last = images, self._backbone(images)
        return self._last[1]


class Head(nn.Module):
    """One head of a student as timm.task wants a student: its own logits, and what its inputs and outputs are."""

    def __init__(self, student: Student, features: Once, name: str, data: Preprocessing) -> None:
        super().__init__()
        self._logits = lambda images: student.head_logits(features(images))[:, student.head_slices[name]]
        self.pretrained_cfg = {"mean": data.mean, "std": data.std}
        self.num_classes, self.in_chans = student.heads[name], 3

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self._logits(images)


def torchdistill_loss(
    student: Student, teachers: Teachers, heads: Mapping[str, HeadConfig], data: Preprocessing
) -> Loss:
    """torchdistill's box takes one teacher: all of them in one module, a KD loss between each and its head."""
    from torchdistill.core.distillation import get_distillation_box  # pyright: ignore[reportMissingImports]

    names = {name: f"head_{number}" for number, name in enumerate(teachers)}  # a path has no dots or dashes in it
    terms = {part: _term(part, heads[name]) for name, part in names.items()}
    hooks = {"forward_proc": "forward_batch_only", "forward_hook": {"input": [], "output": list(names.values())}}
    recipe = {
        "num_epochs": 1,
        "criterion": {"key": "WeightedSumLoss", "kwargs": {"sub_terms": terms}},
        "teacher": {**hooks, "requires_grad": False},
        "student": hooks,
    }
    side_by_side = SideBySide({names[name]: teacher for name, teacher in teachers.items()})
    parts = {part: student.head_slices[name] for name, part in names.items()}
    box = get_distillation_box(
        side_by_side, InParts(student, parts), {}, recipe, torch.device("cpu"), None, False, 1.0
    )  # fmt: skip
    return lambda images: box.forward_process(images, None)


def _term(part: str, head: HeadConfig) -> dict[str, Any]:
    ends = {
        f"{who}_module_{what}": value
        for who in ("student", "teacher")
        for what, value in (("path", part), ("io", "output"))
    }
    kwargs = {**ends, "temperature": head.temperature, "alpha": 0.0}
    return {"criterion": {"key": "KDLoss", "kwargs": kwargs}, "weight": head.weight * head.temperature**2}


class SideBySide(nn.Module):
    """All teachers on the same images; their logits are read by hooks."""

    def __init__(self, teachers: Teachers) -> None:
        super().__init__()
        for name, teacher in teachers.items():
            self.add_module(name, teacher)

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        return [teacher(images) for teacher in self.children()]


class InParts(nn.Module):
    """A student whose heads' logits each pass a module of their own, for the hooks."""

    def __init__(self, student: Student, parts: Mapping[str, slice]) -> None:
        super().__init__()
        self.student, self._parts = student, dict(parts)
        for name in parts:
            self.add_module(name, nn.Identity())

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits = self.student(images)
        for name, part in self._parts.items():
            self.get_submodule(name)(logits[:, part])
        return logits


LOSSES = {"timm": timm_loss, "torchdistill": torchdistill_loss}


def train_online(library: str, settings: TrainConfig, teachers: Mapping[str, str], data: Preprocessing) -> nn.Module:
    """The backbone of a student that `settings` would train from stored labels, with its teachers in every step.

    It starts from the generalist's own weights, with new heads but for the generalist's. Raises ImportError where the
    library is not installed.
    """
    torch.manual_seed(settings.seed)
    store = LabelStore.open(settings.store)
    settings = resolve_auto_settings(settings, store)
    heads = {head.name: head for head in settings.heads}
    student = build_student(
        settings.backbone, {name: store.heads[name] for name in heads}, size=settings.size,
        freeze_blocks=settings.freeze_blocks, freeze_norm=True,
    )  # fmt: skip
    models = {name: create_model(model, size=settings.size).eval() for name, model in teachers.items()}
    loss = LOSSES[library](student, {name: models[name].requires_grad_(False) for name in heads}, heads, data)
    loader = DistillLoader(
        ImagePack.open(settings.pack), store, size=settings.size, batch_size=settings.batch_size,
        epochs=settings.epochs, heads=tuple(heads), val_fraction=settings.val_fraction,
        seed=settings.seed,
    )  # fmt: skip
    device, epoch = torch.device("cpu"), loader.steps / settings.epochs
    updates = OptimizerUpdates(
        student, settings.optim, total=loader.steps, per_epoch=epoch, device=device, precision=settings.precision
    )
    try:
        for _, batches in loader.groups():
            for batch in batches:
                student.train()
                images = normalise(batch.pixels, data, torch.float32)
                with autocast(device, settings.precision):
                    total = loss(images)
                updates.step(total)
    finally:
        loader.close()
    return student.backbone
