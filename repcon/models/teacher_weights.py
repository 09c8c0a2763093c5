"""The weights of a store's teachers, where they can be found, for a student of the same architecture to start from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from repcon.config import TeacherConfig
from repcon.labels.manifest import TeacherMetadata
from repcon.models import custom
from repcon.models import teacher as teachers
from repcon.models.factory import PACKAGE, set_input_size
from repcon.models.identity import architecture_of
from repcon.models.merge import MergeMember, as_member, require_finite
from repcon.runtime.errors import UserError


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """Teachers of one architecture, loaded, and why the others were not."""

    members: dict[str, MergeMember]
    other_architecture: dict[str, str]
    """Teachers of another architecture, and which."""
    not_found: dict[str, str]
    """Teachers of the same architecture whose weights are not here, and why."""


def find(
    teacher_metadata: Sequence[TeacherMetadata],
    backbone: nn.Module,
    *,
    size: int,
    models: Mapping[str, str],
    folder: Path | None,
) -> Found:
    """Load the teachers of the backbone's architecture, apart from their classifiers, for inputs of `size` pixels.

    A teacher is looked for where `models` says, else under its name in the store: as it stands, and relative to
    `folder`, which holds the store. Raises UserError where what is found has other weights than those that made the
    labels, or holds NaN, or where a place that `models` names holds no model.
    """
    kind = architecture_of(backbone)
    found = Found(members={}, other_architecture={}, not_found={})
    for metadata in teacher_metadata:
        if metadata.architecture != kind:
            found.other_architecture[metadata.name] = metadata.architecture
            continue
        try:
            model = _load(metadata, models.get(metadata.name, ""), folder)
        except _NotFoundError as error:
            found.not_found[metadata.name] = str(error)
            continue
        require_finite(metadata.name, model)
        set_input_size(model, metadata.model, size, now=int(metadata.preprocessing["size"]))
        found.members[metadata.name] = as_member(model, size)
    return found


class _NotFoundError(Exception):
    """A teacher's weights are in none of the places."""


def _load(metadata: TeacherMetadata, named: str, folder: Path | None) -> nn.Module:
    """The teacher in float32, from the first place whose weights are those that made the labels."""
    if custom.is_factory(metadata.model) and not named:
        raise _NotFoundError(f"its model is a function; --models {metadata.name}={metadata.model} runs it")
    refused: UserError | None = None
    missing = ""
    for place in [named] if named else _places(metadata.model, folder):
        if not named and ":" in place.removeprefix("local-dir:").removeprefix(PACKAGE):
            hint = f"a store's own word is not enough to download it; --models {metadata.name}={place} does"
            missing = missing or f"its model is {place}; {hint}"
            continue
        size = int(metadata.preprocessing.get("size", 0))
        config = TeacherConfig(name=metadata.name, model=place, size=size, licence=metadata.licence)
        try:
            teacher = teachers.load(config, "cpu")
        except UserError as error:
            if named:
                raise
            missing = missing or str(error)
            continue
        try:
            teachers.require_same(metadata, teacher.metadata, place)
        except UserError as error:
            refused = refused or error
            continue
        return teacher.module
    if refused is not None:
        hint = f"--models {metadata.name}=MODEL names the right one, init = 'backbone' does without"
        raise UserError(f"{refused}; {hint}")
    raise _NotFoundError(missing)


def _places(model: str, folder: Path | None) -> list[str]:
    """The model as the store names it, then relative to the store's folder."""
    beside = [] if folder is None else [folder / model, folder.parent / model]
    return [model, *(str(place) for place in beside if not Path(model).is_absolute() and place.is_dir())]
