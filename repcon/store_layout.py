"""Where things lie in a store: heads, arrays, work units and the files of their shards."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from repcon import gaps
from repcon.errors import UserError
from repcon.store_manifest import Manifest, TeacherSection
from repcon.topk import id_dtype


@dataclass(frozen=True, slots=True)
class HeadInfo:
    """One head of the store: `k` = min(store's k, classes)."""

    name: str
    classes: int
    k: int
    temperatures: tuple[float, ...]
    section: TeacherSection


@dataclass(frozen=True, slots=True)
class Unit:
    """The smallest piece of work: some crops of some images, for all heads of a part; one shard of each array."""

    name: str
    heads: tuple[str, ...]
    crops: range
    rows: range
    writes_boxes: bool


@dataclass(frozen=True, slots=True)
class Layout:
    """One array: `(crops, images, width)`, or `(crops, images)` where width is 0."""

    path: str
    width: int
    dtype: np.dtype
    fill: int | float

    @property
    def bytes_per_row(self) -> int:
        return max(self.width, 1) * self.dtype.itemsize


def heads_of(manifest: Manifest) -> dict[str, HeadInfo]:
    """The heads in the order of their sections."""
    return {
        t.name: HeadInfo(t.name, t.num_classes, min(manifest.k, t.num_classes), manifest.temperatures, t)
        for t in manifest.teachers
    }


def box_layouts() -> tuple[Layout, Layout]:
    """The arrays of boxes and flips."""
    return (
        Layout("crops/box", 4, np.dtype("<u2"), 65_535),
        Layout("crops/flip", 0, np.dtype("u1"), 255),
    )


def head_layouts(manifest: Manifest, head: HeadInfo) -> tuple[Layout, Layout]:
    """The arrays of ids and of values."""
    ids = np.dtype(id_dtype(head.classes)).newbyteorder("<")
    folder = f"heads/{head.name}"
    if manifest.values == "gaps8":
        values = Layout(f"{folder}/gaps", gaps.width(head.k, head.temperatures), np.dtype("u1"), gaps.POISON)
    else:
        values = Layout(f"{folder}/logp", head.k + len(head.temperatures), np.dtype("<f2"), float("nan"))
    return Layout(f"{folder}/ids", head.k, ids, int(np.iinfo(ids).max)), values


def layouts_of(manifest: Manifest) -> Iterator[Layout]:
    """Every array of the store."""
    yield from box_layouts()
    for head in heads_of(manifest).values():
        yield from head_layouts(manifest, head)


def units_of(manifest: Manifest) -> Iterator[Unit]:
    """All work, part by part, crops before rows."""
    for number, part in enumerate(manifest.parts):
        for crop in range(part.crops[0], part.crops[1], manifest.crops_per_shard):
            for row in range(0, manifest.images, manifest.rows_per_shard):
                yield unit_at(manifest, number, crop, row)


def unit_at(manifest: Manifest, number: int, crop: int, row: int) -> Unit:
    """The unit of part `number` that holds this crop of this image."""
    part, depth, rows = manifest.parts[number], manifest.crops_per_shard, manifest.rows_per_shard
    first_crop, first_row = crop // depth * depth, row // rows * rows
    return Unit(
        f"part-{number}-crop-{first_crop}-row-{first_row}",
        part.heads,
        range(first_crop, first_crop + depth),
        range(first_row, min(first_row + rows, manifest.images)),
        part.boxes,
    )


def part_of(manifest: Manifest, head: str | None, crop: int) -> int:
    """The part that wrote this crop of this head; of the boxes where head is None."""
    for number, part in enumerate(manifest.parts):
        if part.crops[0] <= crop < part.crops[1] and (part.boxes if head is None else head in part.heads):
            return number
    raise UserError(
        f"crop {crop} of {head or 'the boxes'} is not in the store, which has crops 0 to {manifest.crops - 1}"
    )


def shard_name(manifest: Manifest, layout: Layout, crop: int, row: int) -> str:
    """The file that holds this crop of this image, by Zarr's default chunk keys."""
    place = f"{layout.path}/c/{crop // manifest.crops_per_shard}/{row // manifest.rows_per_shard}"
    return f"{place}/0" if layout.width else place
