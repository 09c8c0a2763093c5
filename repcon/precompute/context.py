"""What a process labels with: recipe, pack, store, teachers and device; and the units that are left."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from repcon.config import PrecomputeConfig, check_minimum
from repcon.crops.plan import check_crop_config
from repcon.images.pack import ImagePack, ReadAheadPack
from repcon.labels.layout import part_of, unit_at
from repcon.labels.manifest import HEAD_NAME
from repcon.labels.store import LabelStore, Unit
from repcon.models import teacher as teachers
from repcon.models.teacher import Teacher
from repcon.precompute.batching import find_batch_size
from repcon.precompute.output_store import open_or_create_store, with_store_settings
from repcon.runtime.device import choose
from repcon.runtime.errors import UserError

_LOCAL_FOLDER = "local-dir:"
"""timm's prefix for the model in a folder."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PrecomputeContext:
    """Recipe, pack, store, teachers and device of one process."""

    config: PrecomputeConfig
    pack: ImagePack
    store: LabelStore
    teachers: tuple[Teacher, ...]
    device: torch.device

    def todo(self) -> list[Unit]:
        """The unfinished units of this recipe's teachers; checks every unit of theirs in the store.

        Raises UserError where one of these units belongs to a further teacher as well, which the recipe does not name.
        """
        units = self.store.completion.unfinished([unit for unit in self.store.units() if set(unit.heads) & self.names])
        if unnamed := sorted({name for unit in units for name in unit.heads} - self.names):
            what = f"units that are not finished need {', '.join(unnamed)} as well"
            raise UserError(f"{self.store.url}: {what}; name all of them in the recipe")
        return units

    @property
    def names(self) -> set[str]:
        """The recipe's teachers."""
        return {teacher.name for teacher in self.teachers}

    def has_boxes(self, unit: Unit) -> bool:
        """Whether the unit writes its boxes itself, or the unit that does is finished."""
        return unit.writes_boxes or self.store.completion.is_done(self._box_unit(unit))

    def units_of_missing_boxes(self, units: list[Unit]) -> list[Unit]:
        """The unfinished units of other recipes that have to write the boxes of these units."""
        box_units = {unit.name: unit for unit in map(self._box_unit, units)}.values()
        return [
            unit for unit in box_units if not set(unit.heads) <= self.names and not self.store.completion.is_done(unit)
        ]

    def _box_unit(self, unit: Unit) -> Unit:
        manifest, crop, row = self.store.manifest, unit.crops.start, unit.rows.start
        return unit_at(manifest, part_of(manifest, None, crop), crop, row)


def check(config: PrecomputeConfig) -> None:
    """Raises UserError for settings that are wrong by themselves, before anything is loaded."""
    names = [teacher.name for teacher in config.teachers]
    if not names:
        raise UserError("teachers: none named; a recipe needs at least one [[teachers]] with name and model")
    if len(set(names)) < len(names):
        raise UserError(f"teachers: {', '.join(names)}: each needs a name of its own")
    if wrong := next((name for name in names if not HEAD_NAME.fullmatch(name)), None):
        raise UserError(f"teachers: {wrong!r} is no name for a head; use letters, digits, `-` and `_`, 64 at most")
    check_crop_config(config.crop)
    check_minimum(config, crops=0, k=0, batch_size=0, num_workers=0, rows_per_shard=0, processes=0)
    for teacher in config.teachers:
        if teacher.size < 0:
            raise UserError(f"teacher {teacher.name}: size {teacher.size} makes no sense; 0 takes the model's own")


def resolve(config: PrecomputeConfig) -> PrecomputeConfig:
    """The recipe with its open settings taken from the store, and its teachers' relative folders found.

    Raises UserError naming every teacher whose folder does not exist.
    """
    models = locate({teacher.name: teacher.model for teacher in config.teachers}, config.out, "--teachers")
    teachers = tuple(replace(teacher, model=models[teacher.name]) for teacher in config.teachers)
    return with_store_settings(replace(config, teachers=teachers))


def locate(models: Mapping[str, str], store: str, option: str) -> dict[str, str]:
    """{teacher: model}; a relative folder counts from the working directory, then from the store's folder.

    Raises UserError naming all teachers whose folder is in neither place, and the command's `option` that names it.
    Models that are no paths stay as they are.
    """
    found = {name: _locate(model, store) for name, model in models.items()}
    if missing := [name for name, model in found.items() if model is None]:
        listed = "; ".join(f"teacher {name}: model {models[name]}: no such folder" for name in missing)
        hint = " ".join(f"{option} {name}=MODEL" for name in missing)
        raise UserError(f"{listed}; neither here nor beside {store}; name where it lies: {hint}")
    return {name: model for name, model in found.items() if model is not None}


def _locate(model: str, store: str) -> str | None:
    """The model, with a relative path resolved; None where it is a path that does not exist."""
    prefix = _LOCAL_FOLDER if model.startswith(_LOCAL_FOLDER) else ""
    name = model.removeprefix(prefix)
    is_path = prefix or name.startswith((".", "/", "~")) or ("/" in name and ":" not in name)
    if ":" in name or Path(name).expanduser().exists():
        return model
    if "://" not in store and not name.startswith(("/", "~")):
        folder = Path(store).absolute()
        for place in (folder, folder.parent, folder.parent.parent):
            if (place / name).is_dir():
                return f"{prefix}{place / name}"
    return None if is_path else model


def load(
    config: PrecomputeConfig, device: str = "", *, pack_type: type[ImagePack] = ImagePack
) -> tuple[ImagePack, tuple[Teacher, ...], torch.device]:
    """Loads pack and teachers, on `device` or on the recipe's."""
    pack = pack_type.open(config.pack)
    if not len(pack):
        raise UserError(f"{config.pack}: the pack holds no images")
    place = torch.device(device) if device else choose(config.device)
    if place.index is not None:
        torch.cuda.set_device(place)  # Pinned memory and streams then belong to this GPU, not to the first.
    try:
        return pack, tuple(teachers.load_teacher(teacher, place) for teacher in config.teachers), place
    except torch.OutOfMemoryError as error:
        hint = "name fewer of them, and append the others in a further run"
        raise UserError(f"device {place}: its memory does not hold the teachers; {hint}") from error


def set_up(config: PrecomputeConfig, device: str = "") -> PrecomputeContext:
    """Loads pack and teachers, and opens the store; it is created, or compared with the recipe and extended."""
    config = resolve(config)
    pack_type = ReadAheadPack if "://" in config.pack else ImagePack
    pack, loaded, place = load(config, device, pack_type=pack_type)
    size = config.batch_size or find_batch_size(loaded, place)
    # Last, so that a failure before it leaves no store behind.
    store = open_or_create_store(config, pack, [teacher.metadata for teacher in loaded])
    return PrecomputeContext(
        config=replace(config, batch_size=size), pack=pack, store=store, teachers=loaded, device=place
    )


def absolute(config: PrecomputeConfig) -> PrecomputeConfig:
    """The recipe with absolute local paths: processes on a cluster have other working directories."""
    named = (replace(teacher, model=_absolute(teacher.model, only_folders=True)) for teacher in config.teachers)
    return replace(config, pack=_absolute(config.pack), out=_absolute(config.out), teachers=tuple(named))


def _absolute(path: str, *, only_folders: bool = False) -> str:
    """The absolute path; unchanged for a URL and, with `only_folders`, for what is no folder here."""
    if "://" in path or (only_folders and not Path(path).expanduser().is_dir()):
        return path
    return str(Path(path).expanduser().absolute())
