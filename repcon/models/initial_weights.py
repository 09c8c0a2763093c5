"""Find weights to initialise a student with: those of a store's teachers, or of earlier students."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from repcon.config import TeacherConfig
from repcon.labels.layout import HeadInfo
from repcon.labels.manifest import TeacherMetadata
from repcon.models import custom
from repcon.models import teacher as teachers
from repcon.models.factory import PACKAGE, create_model, set_input_size
from repcon.models.identity import architecture_of
from repcon.models.merge import SplitModel, split_classifier
from repcon.models.student import heads_by_teacher, is_student, teachers_of
from repcon.models.weights import require_finite
from repcon.runtime.errors import UserError

STUDENTS_FIELD = "init_students"
Head = tuple[torch.Tensor, torch.Tensor]
"""Weight (C, F) and bias (C,)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InitialWeights:
    """Models of one architecture by name or folder, and why a store's other teachers are not among them."""

    members: dict[str, SplitModel] = field(default_factory=dict)
    other_architecture: dict[str, str] = field(default_factory=dict)
    """{teacher: its architecture} for teachers of another architecture."""
    not_found: dict[str, str] = field(default_factory=dict)
    """{teacher: reason} for teachers of the same architecture whose weights are not found."""


def find_teacher_weights(
    teacher_metadata: Sequence[TeacherMetadata],
    backbone: nn.Module,
    *,
    size: int,
    models: Mapping[str, str],
    folder: Path | None,
) -> InitialWeights:
    """Load the teachers of the backbone's architecture for inputs of `size` pixels, split into backbone and classifier.

    A teacher is loaded from `models` if it is there, else from the model that the store names: as it is, and relative
    to `folder`, which holds the store. Raises UserError where the model found has other weights than those that made
    the labels, or holds NaN, or where `models` names something that is no model.
    """
    architecture = architecture_of(backbone)
    result = InitialWeights()
    for metadata in teacher_metadata:
        if metadata.architecture != architecture:
            result.other_architecture[metadata.name] = metadata.architecture
            continue
        try:
            model = _load(metadata, models.get(metadata.name, ""), folder)
        except _NotFoundError as error:
            result.not_found[metadata.name] = str(error)
            continue
        require_finite(model.state_dict(), f"init: the weights of {metadata.name}")
        set_input_size(model, metadata.model, size, current=int(metadata.preprocessing["size"]))
        result.members[metadata.name] = split_classifier(model, size)
    return result


class _NotFoundError(Exception):
    """A teacher's weights are not found."""


def _load(metadata: TeacherMetadata, named: str, folder: Path | None) -> nn.Module:
    """The teacher in float32, from the first candidate whose weights are those that made the labels."""
    if custom.is_module_function(metadata.model) and not named:
        raise _NotFoundError(f"its model is a function; --models {metadata.name}={metadata.model} runs it")
    mismatch: UserError | None = None
    missing = ""
    candidates = [named or metadata.model]
    if not named and folder is not None and not Path(metadata.model).is_absolute():  # relative to the store, too
        above = (folder / metadata.model, folder.parent / metadata.model)
        candidates += [str(path) for path in above if path.is_dir()]
    for candidate in candidates:
        if not named and ":" in candidate.removeprefix("local-dir:").removeprefix(PACKAGE):
            hint = f"a store's own word is not enough to download it; --models {metadata.name}={candidate} does"
            missing = missing or f"its model is {candidate}; {hint}"
            continue
        size = int(metadata.preprocessing.get("size", 0))
        config = TeacherConfig(name=metadata.name, model=candidate, size=size, license=metadata.licence)
        try:
            teacher = teachers.load_teacher(config, "cpu")
        except UserError as error:
            if named:
                raise
            missing = missing or str(error)
            continue
        try:
            teachers.check_same_teacher(metadata, teacher.metadata, candidate)
        except UserError as error:
            mismatch = mismatch or error
            continue
        return teacher.module
    if mismatch is not None:
        hint = f"--models {metadata.name}=MODEL names the right one, init = 'backbone' does without"
        raise UserError(f"{mismatch}; {hint}")
    raise _NotFoundError(missing)


def load_students(folders: Sequence[str], size: int) -> dict[str, SplitModel]:
    """{folder: its backbone}, for inputs of `size` pixels.

    Raises UserError naming a folder without a student, or whose weights are missing or not finite.
    """
    members = {}
    for folder in folders:
        if not is_student(folder):
            remedy = "name the output folder of an earlier `repcon train`"
            raise UserError(f"{STUDENTS_FIELD}: {folder}: holds no student of `repcon train`; {remedy}")
        members[folder] = split_classifier(create_model(folder, num_classes=0, size=size), size)
    return members


def mean_heads(folders: Sequence[str], heads: Mapping[str, HeadInfo]) -> dict[str, Head]:
    """For the heads that students have for the same teachers' weights: the mean over the students that have it.

    Heads behind a projection do not count. Raises UserError where a student has a head of that name for a teacher of
    other weights or classes.
    """
    parts: dict[str, list[Head]] = {}
    for folder in folders:
        _check_same_teachers(folder, heads)
        earlier = heads_by_teacher(folder)
        for name, head in heads.items():
            if (key := (head.metadata.weight_hash, head.classes)) in earlier:
                parts.setdefault(name, []).append(earlier[key])
    return {
        name: (torch.stack([weight for weight, _ in pairs]).mean(0), torch.stack([bias for _, bias in pairs]).mean(0))
        for name, pairs in parts.items()
    }


def _check_same_teachers(folder: str, heads: Mapping[str, HeadInfo]) -> None:
    for name, (weight_hash, classes) in teachers_of(folder).items():
        head = heads.get(name)
        if head is None or (head.metadata.weight_hash, head.classes) == (weight_hash, classes):
            continue
        theirs = f"{classes} classes, weights {weight_hash[:16] or 'unknown'}"
        ours = f"{head.classes} classes, weights {head.metadata.weight_hash[:16]}"
        raise UserError(
            f"{STUDENTS_FIELD}: {folder}: its head {name} is of another teacher ({theirs}) than the store's ({ours}); "
            "leave the student out, or train it again on this store"
        )
