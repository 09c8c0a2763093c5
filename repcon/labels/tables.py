"""Labels in memory: `CropLabels` (one crop), `LabelTable` (several crops), the plan of windows."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from repcon.labels.layout import HeadInfo, head_layouts
from repcon.runtime.errors import UserError
from repcon.runtime.memory import memory_total


@dataclass(frozen=True, slots=True, kw_only=True)
class CropLabels:
    """Decoded labels of one crop of all N images, or of some of them."""

    crop: int
    boxes: np.ndarray
    """(N, 4) uint16: x, y, width, height in the pack's pixels."""
    flips: np.ndarray
    """(N,) uint8."""
    labels: dict[str, tuple[np.ndarray, np.ndarray]]
    """Per head: ids (N, k) uint16 or uint32, log-probabilities and log-tails (N, k + T) float16."""


@dataclass(frozen=True, slots=True, kw_only=True, weakref_slot=True)
class LabelTable:
    """Decoded labels of some crops of all N images: crop `crops[j]` of image i is row j * N + i of every array."""

    crops: tuple[int, ...]
    boxes: np.ndarray
    """(c * N, 4) uint16."""
    flips: np.ndarray
    """(c * N,) uint8."""
    labels: dict[str, tuple[np.ndarray, np.ndarray]]
    """Per head: ids (c * N, k), log-probabilities and log-tails (c * N, k + T) float16."""

    def crop_labels(self, place: int) -> CropLabels:
        """A view of crop `crops[place]`."""
        images = len(self.flips) // len(self.crops)
        rows = slice(place * images, (place + 1) * images)
        labels = {name: (ids[rows], logp[rows]) for name, (ids, logp) in self.labels.items()}
        return CropLabels(crop=self.crops[place], boxes=self.boxes[rows], flips=self.flips[rows], labels=labels)


def arrays_of(heads: Sequence[HeadInfo], rows: int) -> list[tuple[tuple[int, ...], np.dtype]]:
    """Shape and dtype of the arrays of a table of `rows` rows: boxes, flips, then ids and logp of each head."""
    shapes: list[tuple[tuple[int, ...], np.dtype]] = [((rows, 4), np.dtype(np.uint16)), ((rows,), np.dtype(np.uint8))]
    for head in heads:
        shapes.append(((rows, head.k), head_layouts(head, "float16")[0].dtype))  # every encoding decodes to it
        shapes.append(((rows, head.k + len(head.temperatures)), np.dtype(np.float16)))
    return shapes


def table_bytes(heads: Sequence[HeadInfo], rows: int) -> int:
    """Memory in bytes of a table of `rows` rows."""
    return sum(int(np.prod(shape)) * dtype.itemsize for shape, dtype in arrays_of(heads, rows))


def table_of(crops: Sequence[int], heads: Sequence[HeadInfo], arrays: Sequence[np.ndarray]) -> LabelTable:
    """A table of these arrays, which come in the order of `arrays_of`."""
    pairs = zip(arrays[2::2], arrays[3::2], strict=True)
    labels = {head.name: pair for head, pair in zip(heads, pairs, strict=True)}
    return LabelTable(crops=tuple(crops), boxes=arrays[0], flips=arrays[1], labels=labels)


def empty_table(heads: Sequence[HeadInfo], crops: Sequence[int], rows: int) -> LabelTable:
    """An uninitialised table for `rows` images of these crops. Raises UserError where the memory is too small."""
    check_memory(table_bytes(heads, rows * len(crops)))
    shapes = arrays_of(heads, rows * len(crops))
    return table_of(crops, heads, [np.empty(shape, dtype) for shape, dtype in shapes])


def check_memory(needed: int) -> None:
    """Raises UserError for more bytes than the machine's memory."""
    if needed > memory_total():
        size = f"{needed / 2**30:.1f} GiB of labels, more than this machine's memory"
        raise UserError(
            f"the store was asked for {size}; read fewer crops at a time, or windows (train: label_cache_gib)"
        )


def window_plan(
    images: int, rows_per_shard: int, bytes_per_row: int, memory_bytes: int, seed: int | Sequence[int]
) -> Iterator[np.ndarray]:
    """Splits the rows into windows: one if two copies of all rows fit the memory, else shards in shuffled groups.

    Each window is sorted (n,) int64; together they hold every row once. Two windows (the one in use and the one
    being decoded) stay within `memory_bytes`; a window has at least one shard. seed: one or two integers.
    """
    if 2 * images * bytes_per_row <= memory_bytes:
        yield np.arange(images)
        return
    shards = -(-images // rows_per_shard)
    shards_per_window = max(1, memory_bytes // 2 // max(1, bytes_per_row * rows_per_shard))
    # Raw Philox words are stable over numpy's versions, `permutation` is not promised to be.
    order = np.argsort(np.random.Philox(key=seed).random_raw(shards), kind="stable")
    offsets = np.arange(rows_per_shard)
    for start in range(0, shards, shards_per_window):
        group = np.sort(order[start : start + shards_per_window])
        window = (group[:, None] * rows_per_shard + offsets).reshape(-1)
        yield window[window < images]


def ranges(rows: np.ndarray) -> list[range]:
    """Sorted row numbers (n,) as ranges of consecutive ones."""
    breaks = np.flatnonzero(np.diff(rows) != 1) + 1
    return [range(int(run[0]), int(run[-1]) + 1) for run in np.split(rows, breaks) if len(run)]
