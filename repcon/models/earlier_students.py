"""The mean of several earlier students as the start of another: of their backbones, and of each head that they have."""

from collections.abc import Mapping, Sequence

import torch

from repcon.labels.layout import HeadInfo
from repcon.models.factory import create_model
from repcon.models.merge import MergeMember, as_member
from repcon.models.student import heads_by_teacher, is_student, teachers_of
from repcon.runtime.errors import UserError

FIELD = "init_students"
Head = tuple[torch.Tensor, torch.Tensor]
"""Weight (C, F) and bias (C,)."""


def load(folders: Sequence[str], size: int) -> dict[str, MergeMember]:
    """{folder: its backbone}, for inputs of `size` pixels.

    Raises UserError naming a folder without a student, or whose weights are missing or not finite.
    """
    members = {}
    for folder in folders:
        if not is_student(folder):
            wanted = "name the output folder of an earlier `repcon train`"
            raise UserError(f"{FIELD}: {folder}: holds no student of `repcon train`; {wanted}")
        members[folder] = as_member(create_model(folder, num_classes=0, size=size), size)
    return members


def mean_heads(folders: Sequence[str], heads: Mapping[str, HeadInfo]) -> dict[str, Head]:
    """The heads that the students have for the same teachers' weights: each the mean over the students that have it.

    Heads behind a projection do not count. Raises UserError where a student has a head of that name for a teacher of
    other weights or classes.
    """
    found: dict[str, list[Head]] = {}
    for folder in folders:
        _require_same_teachers(folder, heads)
        held = heads_by_teacher(folder)
        for name, head in heads.items():
            if (key := (head.metadata.weight_hash, head.classes)) in held:
                found.setdefault(name, []).append(held[key])
    return {
        name: (torch.stack([weight for weight, _ in parts]).mean(0), torch.stack([bias for _, bias in parts]).mean(0))
        for name, parts in found.items()
    }


def _require_same_teachers(folder: str, heads: Mapping[str, HeadInfo]) -> None:
    for name, (weight_hash, classes) in teachers_of(folder).items():
        wanted = heads.get(name)
        if wanted is None or (wanted.metadata.weight_hash, wanted.classes) == (weight_hash, classes):
            continue
        differ = f"{classes} classes, weights {weight_hash[:16] or 'unknown'}"
        own = f"{wanted.classes} classes, weights {wanted.metadata.weight_hash[:16]}"
        raise UserError(
            f"{FIELD}: {folder}: its head {name} is of another teacher ({differ}) than the store's ({own}); "
            "leave the student out, or train it again on this store"
        )
