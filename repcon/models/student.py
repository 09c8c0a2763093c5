"""The student model: one backbone, and one linear layer with the heads of all teachers."""

import errno
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as to_bytes
from torch import nn

from repcon.models.factory import create_model
from repcon.models.freeze import freeze
from repcon.models.identity import weight_hash
from repcon.models.merge import SplitModel, average
from repcon.models.model_card import model_card
from repcon.models.preprocessing import Preprocessing
from repcon.models.saved_model import local_folder, model_folder, save_model
from repcon.models.weights import load_safetensors, require_finite
from repcon.runtime.atomic_files import write_atomic
from repcon.runtime.errors import UserError
from repcon.runtime.run_dir import write_text
from repcon.runtime.untrusted import UnreadableError, read_json

HEADS = "heads.safetensors"
HEADS_INDEX = "heads.json"


class Student(nn.Module):
    """A backbone with one head per teacher; gives logits (B, sum of C_h), the heads side by side in `heads`' order.

    backbone: gives pooled features (B, F) and has `num_features`, as timm's models with num_classes=0.
    heads: classes per teacher. projection: width of a hidden layer per head (Linear, GELU, as UNIC's projectors); 0
    for none, and then ONE linear layer computes all heads.
    """

    def __init__(self, backbone: nn.Module, heads: Mapping[str, int], projection: int = 0) -> None:
        super().__init__()
        if not heads:
            raise UserError("heads: a student needs at least one")
        self.backbone = backbone
        self.heads = dict(heads)
        self.projection = projection
        self.head_slices = _slices(self.heads)
        self.warm_heads: frozenset[str] = frozenset()
        """Heads that `init_head` was called for; the others start from random weights."""
        width, classes = int(backbone.num_features), sum(self.heads.values())  # pyright: ignore[reportArgumentType]
        width = int(getattr(backbone, "head_hidden_size", width) or width)
        if projection:
            self.project = nn.Sequential(nn.Linear(width, projection * len(self.heads)), nn.GELU())
            self.answers = nn.ModuleList(nn.Linear(projection, count) for count in self.heads.values())
        else:
            self.answer = nn.Linear(width, classes)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, S, S) normalised pixels to (B, F)."""
        return self.backbone(images)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head_logits(self.backbone(images))

    def head_logits(self, features: torch.Tensor) -> torch.Tensor:
        """(B, F) pooled features to all heads' logits."""
        if not self.projection:
            return self.answer(features)
        hidden = self.project(features).unflatten(1, (len(self.heads), self.projection))
        return torch.cat([answer(hidden[:, h]) for h, answer in enumerate(self.answers)], dim=1)

    @torch.no_grad()
    def init_head(self, name: str, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        """Set a head to a classifier on the backbone's features: weight (C, F), and bias (C,) or None for zeros."""
        rows = self.head_slices[name]
        self.answer.weight[rows] = weight.to(self.answer.weight.device)
        self.answer.bias[rows] = 0.0 if bias is None else bias.to(self.answer.bias.device)
        self.warm_heads |= {name}

    def no_weight_decay(self) -> set[str]:
        """Parameters without weight decay, for timm's optimizer factory: those of the backbone."""
        names: Any = getattr(self.backbone, "no_weight_decay", set)
        return {f"backbone.{name}" for name in names()}


def build_student(
    backbone: str,
    heads: Mapping[str, Any],
    *,
    size: int = 0,
    pretrained: bool = True,
    init_heads: bool = True,
    projection: int = 0,
    freeze_blocks: int = 0,
    freeze_norm: bool = False,
    teachers: Mapping[str, SplitModel] | None = None,
    shares: Mapping[str, float] | None = None,
    earlier: Mapping[str, tuple[torch.Tensor, torch.Tensor]] | None = None,
) -> Student:
    """A student of the heads (`LabelStore.heads`, or some of them) on the backbone that a recipe names, for inputs of
    `size` pixels (0: the backbone's own).

    teachers: models of the backbone's architecture, each split by `merge.split_classifier`; teachers have the name of
    their head. shares: their weights in the mean that the backbone is initialised with; None or empty keeps the
    backbone's own weights. earlier: by head, the weight (C, F) and bias (C,) of earlier students.

    With `init_heads`, a head is initialised from `earlier`, else with its teacher's own classifier: that of `teachers`,
    that of the backbone if the teacher has the same weights, or the backbone's head for the same teacher if it is an
    earlier student. Heads with projections are initialised randomly.
    """
    init_heads = init_heads and pretrained and not projection
    model = create_model(backbone, pretrained=pretrained, size=size)
    own_hash = weight_hash(model) if init_heads else ""
    classifier = getattr(model, "get_classifier", lambda: None)()
    freeze(model, freeze_blocks, freeze_norm)  # while its blocks are still counted as a teacher's
    model.reset_classifier(0)  # pyright: ignore[reportCallIssue]
    if shares:
        model.load_state_dict(average(teachers or {}, shares))
    student = Student(model, {name: head.classes for name, head in heads.items()}, projection)
    if not init_heads:
        return student
    of_backbone = heads_by_teacher(backbone) if not shares and is_student(backbone) else {}
    own = classifier if isinstance(classifier, nn.Linear) else None
    for name, head in heads.items():
        member = (teachers or {}).get(name)
        of_student = (earlier or {}).get(name) or of_backbone.get((head.metadata.weight_hash, head.classes))
        if of_student:
            student.init_head(name, *of_student)
        elif member is not None:
            if member.classifier is not None:
                student.init_head(name, member.classifier.weight, member.classifier.bias)
        elif own is not None and not shares and head.metadata.weight_hash == own_hash:
            student.init_head(name, own.weight, own.bias)
    return student


def folder_of(backbone: str) -> Path:
    """The folder that `save_student` wrote, also from the output folder of `repcon train` around it."""
    return model_folder(local_folder(backbone))


def is_student(backbone: str) -> bool:
    """Whether the name is a folder that `save_student` wrote, or the output folder of `repcon train` around it."""
    return (folder_of(backbone) / HEADS_INDEX).is_file()


def teachers_of(folder: str) -> dict[str, tuple[str, int]]:
    """{head: (its teacher's weight hash, classes)} of a student; the hash is empty where it was not saved."""
    index = _read(folder_of(folder))[0]
    return {name: (index["teachers"].get(name, ""), classes) for name, classes in index["heads"].items()}


def heads_by_teacher(folder: str) -> dict[tuple[str, int], tuple[torch.Tensor, torch.Tensor]]:
    """{(teacher's weight hash, classes): (weight (C, F), bias (C,))} of a student; empty if it has projections."""
    index, state = _read(folder_of(folder))
    if index["projection"]:
        return {}
    weight, bias, rows = state["answer.weight"], state["answer.bias"], _slices(index["heads"])
    return {
        (weight_hash, index["heads"][name]): (weight[rows[name]], bias[rows[name]])
        for name, weight_hash in index["teachers"].items()
        if name in rows
    }


def save_student(
    student: Student, folder: str | Path, *, preprocessing: Preprocessing, card: Mapping[str, Any]
) -> None:
    """Write a folder that `timm.create_model("local-dir:FOLDER", pretrained=True)` opens as the backbone.

    It also holds the heads (`heads.safetensors`, `heads.json`) and README.md, the model card. card: see
    `repcon.models.model_card.model_card`; `card["classes"]` may hold class names per head.
    """
    folder = Path(folder)
    extra = {"proxy_fingerprint": card["pack"]} if "pack" in card else {}
    save_model(student.backbone, folder, classes=(), preprocessing=preprocessing, extra=extra)
    state = {k: v.detach().cpu().contiguous() for k, v in student.state_dict().items() if not k.startswith("backbone.")}
    write_atomic(folder / HEADS, to_bytes(state))  # not safetensors' own `save_file`, as in `save_model`
    index = {
        "heads": student.heads,
        "projection": student.projection,
        "classes": card.get("classes", {}),
        "teachers": {teacher["name"]: teacher.get("weight_hash", "") for teacher in card.get("teachers", ())},
        "licences": {teacher["name"]: teacher.get("licence", "") for teacher in card.get("teachers", ())},
    }
    write_text(folder / HEADS_INDEX, json.dumps(index, indent=1) + "\n")
    write_text(folder / "README.md", model_card(student.heads, preprocessing, card, folder))


def check_student_writable(
    student: Student, folder: Path, *, preprocessing: Preprocessing, card: Mapping[str, Any]
) -> None:
    """Write the student to a temporary folder next to `folder`, to find out before training whether it can be written.

    Raises UserError where it cannot.
    """
    try:
        if folder.exists() and not folder.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "is no folder")
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".check-") as temporary:
            save_student(student, temporary, preprocessing=preprocessing, card=card)
    except (OSError, ValueError) as error:
        why = (isinstance(error, OSError) and error.strerror) or error
        raise UserError(f"{folder}: the student cannot be written there ({why}); nothing was trained") from error


def load_student(folder: str | Path) -> Student:
    """The student that `save_student` wrote, also from the output folder of `repcon train` that it lies in.

    Raises UserError where the folder holds no student.
    """
    folder = model_folder(Path(folder))
    index, state = _read(folder)
    student = Student(create_model(str(folder), num_classes=0), index["heads"], index["projection"])
    own = {name: value.shape for name, value in student.state_dict().items() if not name.startswith("backbone.")}
    held = {name: value.shape for name, value in state.items()}
    if wrong := sorted(name for name in own.keys() | held.keys() if own.get(name) != held.get(name)):
        raise UserError(f"{folder / HEADS}: does not fit {HEADS_INDEX}: {', '.join(wrong)}; write the student again")
    student.load_state_dict(state, strict=False)
    return student


def head_names(model: str) -> tuple[str, ...]:
    """The names of a student's heads, for the folder of one or the run that it lies in; () for any other model."""
    return tuple(_index(model).get("heads", {}))


def head_class_names(model: str) -> dict[str, tuple[str, ...]]:
    """{head: its classes' names} of a student, as far as they were saved; {} for any other model."""
    return {name: tuple(names) for name, names in _index(model).get("classes", {}).items()}


def teacher_licences(model: str) -> dict[str, str]:
    """{head: its teacher's licence, empty where none is stated} of a student; {} for any other model."""
    held = _index(model).get("licences", {})
    return {str(name): str(licence) for name, licence in held.items()} if isinstance(held, dict) else {}


def _index(model: str) -> dict[str, Any]:
    return _read(folder_of(model))[0] if is_student(model) else {}


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The index of a student's heads, and their tensors. Raises UserError naming the file that does not fit."""
    try:
        index = read_json(folder / HEADS_INDEX)
    except UnreadableError as error:
        raise UserError(f"{folder}: holds no student of `repcon train` ({error})") from error
    index = index if isinstance(index, dict) else {}
    heads, projection = index.get("heads"), index.get("projection")
    counts = list(heads.values()) if isinstance(heads, dict) else []
    whole = type(projection) is int and all(type(count) is int for count in counts)
    if not counts or not whole or min(counts) < 1 or int(projection or 0) < 0:
        remedy = "copy the student's folder again"
        raise UserError(f"{folder / HEADS_INDEX}: must give heads with their classes, and a projection; {remedy}")
    named = index.setdefault("classes", {})
    listed = isinstance(named, dict) and all(isinstance(names, list) for names in named.values())
    if not isinstance(index.setdefault("teachers", {}), dict) or not listed:
        raise UserError(f"{folder / HEADS_INDEX}: its teachers and classes must be by head; copy the folder again")
    state = load_safetensors(folder / HEADS, str(folder))
    require_finite(state, str(folder / HEADS))
    rows = {name: value.shape[0] for name, value in state.items() if name.startswith("answer") and value.ndim}
    wanted = [(f"answers.{place}", count) for place, count in enumerate(counts)] if projection else []
    wanted = wanted or [("answer", sum(counts))]
    if any(rows.get(f"{name}.{part}") != count for name, count in wanted for part in ("weight", "bias")):
        raise UserError(f"{folder / HEADS}: does not fit {HEADS_INDEX}; write the student again, or copy it again")
    return index, state


def _slices(heads: Mapping[str, int]) -> dict[str, slice]:
    slices, start = {}, 0
    for name, classes in heads.items():
        slices[name] = slice(start, start + classes)
        start += classes
    return slices
