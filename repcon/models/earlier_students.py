"""The mean of earlier students, to initialise another: of their backbones, and of each head that they have."""

from collections.abc import Mapping, Sequence

import torch

from repcon.labels.layout import HeadInfo
from repcon.models.factory import create_model
from repcon.models.merge import SplitModel, split_classifier
from repcon.models.student import heads_by_teacher, is_student, teachers_of
from repcon.runtime.errors import UserError

FIELD = "init_students"
Head = tuple[torch.Tensor, torch.Tensor]
"""Weight (C, F) and bias (C,)."""


def load_students(folders: Sequence[str], size: int) -> dict[str, SplitModel]:
    """{folder: its backbone}, for inputs of `size` pixels.

    Raises UserError naming a folder without a student, or whose weights are missing or not finite.
    """
    members = {}
    for folder in folders:
        if not is_student(folder):
            remedy = "name the output folder of an earlier `repcon train`"
            raise UserError(f"{FIELD}: {folder}: holds no student of `repcon train`; {remedy}")
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
            f"{FIELD}: {folder}: its head {name} is of another teacher ({theirs}) than the store's ({ours}); "
            "leave the student out, or train it again on this store"
        )
