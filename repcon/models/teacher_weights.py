"""Find the weights of a store's teachers, to initialise a student of the same architecture."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

from repcon.config import TeacherConfig
from repcon.labels.manifest import TeacherMetadata
from repcon.models import custom
from repcon.models import teacher as teachers
from repcon.models.factory import PACKAGE, set_input_size
from repcon.models.identity import architecture_of
from repcon.models.merge import SplitModel, require_finite, split_classifier
from repcon.runtime.errors import UserError


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherWeights:
    """The teachers of one architecture that were loaded, and why others were not."""

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
) -> TeacherWeights:
    """Load the teachers of the backbone's architecture for inputs of `size` pixels, split into backbone and classifier.

    A teacher is loaded from `models` if it is there, else from the model that the store names: as it is, and relative
    to `folder`, which holds the store. Raises UserError where the model found has other weights than those that made
    the labels, or holds NaN, or where `models` names something that is no model.
    """
    architecture = architecture_of(backbone)
    result = TeacherWeights()
    for metadata in teacher_metadata:
        if metadata.architecture != architecture:
            result.other_architecture[metadata.name] = metadata.architecture
            continue
        try:
            model = _load(metadata, models.get(metadata.name, ""), folder)
        except _NotFoundError as error:
            result.not_found[metadata.name] = str(error)
            continue
        require_finite(metadata.name, model)
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
