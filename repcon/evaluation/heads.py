"""Accuracy of a student's heads and of their teachers' classifiers, on labelled images of the teachers' classes.

Images are matched to the teacher's classes by name. Where `repcon teach` made the teacher from the same pack, only the
images that it held out are taken, since the teacher was trained on the others.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import Progress

from repcon.config import EvaluateConfig, TeachConfig, TeacherConfig, parse, parse_named_values
from repcon.decode.factory import open_loader
from repcon.evaluation import intervals
from repcon.evaluation.features import centred_squares
from repcon.evaluation.probes import split_classes
from repcon.images.pack import ImagePack, select_classes
from repcon.models import teacher as teachers
from repcon.models.preprocessing import normalise, preprocessing_of
from repcon.models.saved_model import CONFIG, model_folder, saved_extra
from repcon.models.student import head_class_names, head_names, load_student
from repcon.runtime.console import warn
from repcon.runtime.device import choose
from repcon.runtime.errors import UserError
from repcon.runtime.text import abbreviate


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadCheck:
    """One head of one student, its teacher, and the labelled images of one data set that both are measured on."""

    student: str
    folder: str
    head: str
    teacher: teachers.Teacher
    dataset: str
    pack: ImagePack
    rows: np.ndarray
    """(n,) int64 rows of the pack."""
    targets: np.ndarray
    """(n,) int64 classes, as the teacher numbers them."""
    held_out: bool
    """Whether these are the images of the teacher's own pack that it was not trained on."""


def plan_heads(config: EvaluateConfig, backbones: Mapping[str, str], packs: Mapping[str, ImagePack]) -> list[HeadCheck]:
    """The comparisons that `config.heads` asks for; none where it is off.

    Raises UserError where no backbone is a student, a teacher is not that of a head, its classes are not the head's, or
    no data set has images of them.
    """
    if not config.heads:
        return []
    students = {name: heads for name, model in backbones.items() if (heads := head_names(model))}
    if not students:
        raise UserError("heads: none of the backbones is a student with heads; name a folder of `repcon train`")
    known = list(dict.fromkeys(head for heads in students.values() for head in heads))
    given = parse_named_values("teachers", config.teachers, "NAME=MODEL", known) or {
        name: backbones[name] for name in backbones if name in known
    }
    if not given:
        raise UserError(f"teachers: none named; give NAME=MODEL for some of the heads {', '.join(known)}")
    checks: list[HeadCheck] = []
    for head, model in given.items():
        teacher = _load(head, model, config.size)
        for name in (name for name, heads in students.items() if head in heads):
            _require_same_classes(backbones[name], head, teacher)
        matches = [(name, pack, *match) for name, pack in packs.items() if (match := _images(teacher, pack))]
        if not matches:
            _report_no_images(teacher, packs, refuse=bool(config.teachers))
        checks += [
            HeadCheck(
                student=name, folder=backbones[name], head=head, teacher=teacher, dataset=dataset, pack=pack, rows=rows,
                targets=targets, held_out=held_out,
            )
            for dataset, pack, rows, targets, held_out in matches
            for name, heads in students.items()
            if head in heads
        ]  # fmt: skip
    if not checks:
        raise UserError("heads: no data set has images of any teacher's classes; name one that has")
    return checks


def _load(head: str, model: str, size: int) -> teachers.Teacher:
    folder = str(model_folder(Path(model))) if Path(model).is_dir() else model
    teacher = teachers.load_teacher(TeacherConfig(name=head, model=folder, size=size), "cpu")
    if not teacher.metadata.classes:
        raise UserError(f"teachers: the classes of {head}={model} have no names, so that no image can be matched")
    return teacher


def _require_same_classes(folder: str, head: str, teacher: teachers.Teacher) -> None:
    """Raise UserError where the student's head has other classes than the teacher."""
    names = head_class_names(folder).get(head, ())
    if list(names) != list(teacher.metadata.classes):
        other = next((pair for pair in zip(names, teacher.metadata.classes, strict=False) if pair[0] != pair[1]), None)
        what = f"{len(names)} classes in the student, {len(teacher.metadata.classes)} in the teacher"
        what = f"{other[0]!r} in the student where the teacher has {other[1]!r}" if other else what
        raise UserError(f"teachers: {teacher.metadata.model} is not the teacher of the head {head}: {what}")


def _images(teacher: teachers.Teacher, pack: ImagePack) -> tuple[np.ndarray, np.ndarray, bool] | None:
    """Rows of the pack's images of the teacher's classes, their classes, and whether the teacher held them out; None
    where there are none. Names that several classes share match nothing."""
    times = Counter(teacher.metadata.classes)
    number = {name: place for place, name in enumerate(teacher.metadata.classes) if times[name] == 1}
    if (held := _held_out(teacher.metadata.model, pack)) is not None:
        rows, of_teacher = held, True
    else:
        rows, of_teacher = np.flatnonzero(pack.labels >= 0), False
    names = [pack.classes[label] for label in pack.labels[rows]]
    matched = np.array([name in number for name in names], bool)
    if not matched.any():
        return None
    targets = np.array([number[name] for name in names if name in number], np.int64)
    return rows[matched], targets, of_teacher


def _held_out(model: str, pack: ImagePack) -> np.ndarray | None:
    """Rows of the pack that `repcon teach` kept from the training of this teacher; None where that is not known."""
    folder = Path(model)
    extra = saved_extra(folder) if (folder / CONFIG).is_file() else {}
    if extra.get("data_fingerprint") != pack.fingerprint:
        return None
    try:
        recipe = parse(TeachConfig, extra.get("recipe", {}), model)
    except UserError:  # written by another version
        return None
    rows, labels, _ = select_classes(pack, recipe.classes)
    held = split_classes(labels, recipe.val_fraction, recipe.seed)[1]
    return rows[held] if len(held) else None


def _report_no_images(teacher: teachers.Teacher, packs: Mapping[str, ImagePack], *, refuse: bool) -> None:
    """Raise or print that no data set has images of the teacher's classes."""
    there = abbreviate(next((pack.classes for pack in packs.values() if pack.classes), ()))
    what = f"no class of the data ({there}) is among those of {teacher.name} ({abbreviate(teacher.metadata.classes)})"
    if refuse:
        raise UserError(f"heads: {what}; name labelled images of its classes")
    warn(f"the head {teacher.name}: {what}", "left out")


def measure_heads(checks: Sequence[HeadCheck], config: EvaluateConfig, bars: Progress) -> list[dict[str, Any]]:
    """Per check: `student`, `head`, `dataset`, `images`, `classes`, `held_out`, and as intervals in per cent and points
    `teacher_accuracy`, `head_accuracy` and `difference` (head less teacher, paired)."""
    found: list[dict[str, Any]] = []
    for check in checks:
        teacher, head = (answered == check.targets for answered in _predictions(check, config, bars))
        found.append(
            {
                "student": check.student,
                "head": check.head,
                "dataset": check.dataset,
                "images": len(check.rows),
                "classes": len(np.unique(check.targets)),
                "held_out": check.held_out,
                "teacher_accuracy": intervals.accuracy(teacher),
                "head_accuracy": intervals.accuracy(head),
                "difference": intervals.difference(head, teacher),
            }
        )
    return found


@torch.inference_mode()
def _predictions(check: HeadCheck, config: EvaluateConfig, bars: Progress) -> tuple[np.ndarray, np.ndarray]:
    """The most probable classes (n,) by the teacher and by the head, each at its own input size."""
    device = choose(config.device)
    model = load_student(check.folder).to(device).eval()
    inputs = preprocessing_of(model.backbone)
    module = check.teacher.module.to(device)
    sizes = tuple(dict.fromkeys((inputs.size, check.teacher.preprocessing.size)))
    loader = open_loader(config.loader, check.pack, sizes, num_workers=config.num_workers, device=str(device))
    task = bars.add_task("heads", total=len(check.rows), unit="images", note=f"{check.head}, {check.dataset}")
    parts: list[tuple[torch.Tensor, torch.Tensor]] = []
    try:
        for batch in loader.batches(centred_squares(check.pack, check.rows, config.batch_size)):
            pixels = {size: batch.pixels[size].to(device) for size in sizes}
            logits = model(normalise(pixels[inputs.size], inputs, torch.float32))
            by_teacher = check.teacher(pixels[check.teacher.preprocessing.size])
            parts.append((by_teacher.argmax(1).cpu(), logits[:, model.head_slices[check.head]].argmax(1).cpu()))
            bars.advance(task, len(parts[-1][0]))
    finally:
        loader.close()
        bars.remove_task(task)
        module.cpu()
    first, second = (torch.cat(part).numpy() for part in zip(*parts, strict=True))
    return first, second
