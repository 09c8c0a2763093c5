"""The layout of a store: heads, arrays, work units and the files of their shards."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from repcon.config import Values
from repcon.labels import quantize
from repcon.labels.manifest import Manifest, TeacherMetadata
from repcon.labels.topk import id_dtype
from repcon.runtime.errors import UserError


@dataclass(frozen=True, slots=True)
class HeadInfo:
    """One head of the store: `k` = min(store's k, classes)."""

    name: str
    classes: int
    k: int
    temperatures: tuple[float, ...]
    metadata: TeacherMetadata


@dataclass(frozen=True, slots=True)
class Unit:
    """The unit of work: some crops of some images, for all heads of a part; one shard of each array."""

    name: str
    heads: tuple[str, ...]
    crops: range
    rows: range
    writes_boxes: bool


@dataclass(frozen=True, slots=True)
class Layout:
    """One array: (crops, images, width), (crops, width, images) where slots come first, or (crops, images)."""

    path: str
    width: int
    """Values per crop; 0 for an array without slots."""
    dtype: np.dtype
    fill: int | float
    shuffle: Literal["shuffle", "bitshuffle"]
    """Blosc's filter: bits for values that use a part of their bytes, bytes otherwise."""
    slots_first: bool = False

    def shape(self, crops: int, images: int) -> tuple[int, ...]:
        """Shape of the array, of a shard or of a chunk with this number of crops and images."""
        if self.slots_first:
            return crops, self.width, images
        return (crops, images, self.width) if self.width else (crops, images)

    @property
    def bytes_per_row(self) -> int:
        return max(self.width, 1) * self.dtype.itemsize

    def max_shard_bytes(self, crops: int, images: int) -> int:
        """Upper bound of a shard's size: data that does not compress grows a little."""
        raw = self.bytes_per_row * images
        return crops * (raw + raw // 16 + 1024) + 1024


def heads_of(manifest: Manifest) -> dict[str, HeadInfo]:
    """The heads in the order of the manifest's teachers."""
    return {
        t.name: HeadInfo(t.name, t.num_classes, min(manifest.k, t.num_classes), manifest.temperatures, t)
        for t in manifest.teachers
    }


BOX = Layout("crops/box", 4, np.dtype("<u2"), 65_535, "shuffle")
FLIP = Layout("crops/flip", 0, np.dtype("u1"), 255, "bitshuffle")


def head_layouts(head: HeadInfo, values: Values) -> tuple[Layout, Layout]:
    """The arrays of a head's ids and values in this encoding."""
    ids = np.dtype(id_dtype(head.classes)).newbyteorder("<")
    folder, fill = f"heads/{head.name}", int(np.iinfo(ids).max)
    # Ids of up to 256 classes fill one byte: zstd compresses it well, lz4 decodes it four times faster than bits.
    shuffle = "bitshuffle" if head.classes > 256 else "shuffle"
    ids_layout = Layout(f"{folder}/ids", head.k, ids, fill, shuffle)
    if values == "quantized8":
        width = quantize.width(head.k, head.temperatures)
        return ids_layout, Layout(
            f"{folder}/gaps", width, np.dtype("u1"), quantize.FILL, "bitshuffle", slots_first=True
        )
    width = head.k + len(head.temperatures)
    return ids_layout, Layout(f"{folder}/logp", width, np.dtype("<f2"), float("nan"), "shuffle")


def layouts_of(manifest: Manifest, unit: Unit | None = None) -> Iterator[Layout]:
    """Every array of the store, or those that a unit writes to."""
    if unit is None or unit.writes_boxes:
        yield from (BOX, FLIP)
    for head in heads_of(manifest).values():
        if unit is None or head.name in unit.heads:
            yield from head_layouts(head, manifest.values)


def units_of(manifest: Manifest) -> Iterator[Unit]:
    """All units, part by part, crops before rows."""
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
    """Number of the part that writes this crop of this head; of the boxes where head is None."""
    for number, part in enumerate(manifest.parts):
        if part.crops[0] <= crop < part.crops[1] and (part.boxes if head is None else head in part.heads):
            return number
    raise UserError(
        f"crop {crop} of {head or 'the boxes'} is not in the store, which has crops 0 to {manifest.crops - 1}"
    )


def shard_name(manifest: Manifest, layout: Layout, crop: int, row: int) -> str:
    """File of the shard with this crop of this image, by Zarr's default chunk keys."""
    depth, rows = crop // manifest.crops_per_shard, row // manifest.rows_per_shard
    place = f"{depth}/0/{rows}" if layout.slots_first else f"{depth}/{rows}/0" if layout.width else f"{depth}/{rows}"
    return f"{layout.path}/c/{place}"


def shards_of(manifest: Manifest, unit: Unit) -> list[str]:
    """Files of the unit's shards."""
    return [shard_name(manifest, layout, unit.crops.start, unit.rows.start) for layout in layouts_of(manifest, unit)]
