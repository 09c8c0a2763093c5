"""Stored labels as arrays: rows, one crop of all images, tables of several crops, windows that fit the memory."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from repcon.labels.completion import CompletionIndex
from repcon.labels.layout import HeadInfo, head_layouts, heads_of
from repcon.labels.manifest import Manifest
from repcon.labels.shard_reader import ShardReader
from repcon.labels.shared_memory import shared_table
from repcon.runtime.errors import UserError
from repcon.runtime.filesystem import FileSystem
from repcon.runtime.memory import memory_total
from repcon.runtime.prefetch import map_ahead
from repcon.runtime.text import format_bytes


@dataclass(frozen=True, slots=True, kw_only=True, weakref_slot=True)
class CropLabels:
    """Decoded labels of some crops of n images: crop `crops[j]` of image i is row j * n + i of every array."""

    crops: tuple[int, ...]
    boxes: np.ndarray
    """(c * n, 4) uint16: x, y, width, height in the pack's pixels."""
    flips: np.ndarray
    """(c * n,) uint8."""
    labels: dict[str, tuple[np.ndarray, np.ndarray]]
    """Per head: ids (c * n, k) uint16 or uint32, log-probabilities and log-tails (c * n, k + T) float16."""

    def of_crop(self, place: int) -> "CropLabels":
        """A view of crop `crops[place]`."""
        images = len(self.flips) // len(self.crops)
        return self.take((self.crops[place],), slice(place * images, (place + 1) * images))

    def take(self, crops: tuple[int, ...], rows: slice | np.ndarray) -> "CropLabels":
        """Some rows, which are these crops'."""
        labels = {name: (ids[rows], logp[rows]) for name, (ids, logp) in self.labels.items()}
        return CropLabels(crops=crops, boxes=self.boxes[rows], flips=self.flips[rows], labels=labels)


class LabelReader:
    """Decodes labels of a store. Thread-safe. `heads` None stands for all heads in every method."""

    def __init__(self, files: FileSystem, manifest: Manifest, completion: CompletionIndex, identity: str) -> None:
        """`identity` tells the store from others in memory that processes share."""
        self._url, self._manifest, self._heads, self._identity = files.root, manifest, heads_of(manifest), identity
        self._shards = ShardReader(files, manifest, completion)

    def choose(self, heads: Iterable[str] | None) -> list[HeadInfo]:
        """The heads of these names. Raises UserError for one that the store does not have."""
        names = list(self._heads) if heads is None else list(heads)
        if unknown := [name for name in names if name not in self._heads]:
            raise UserError(f"{self._url}: no head {', '.join(unknown)}; it holds {', '.join(self._heads)}")
        return [self._heads[name] for name in names]

    def boxes(self, crops: range, rows: range) -> tuple[np.ndarray, np.ndarray]:
        """Stored boxes (m, r, 4) uint16 and flips (m, r) uint8."""
        boxes = np.empty((len(crops), len(rows), 4), np.uint16)
        flips = np.empty((len(crops), len(rows)), np.uint8)
        for place, crop in enumerate(crops):
            self._shards.read(crop, [rows], boxes[place], flips[place], {})
        return boxes, flips

    def read_rows(self, crop: int, rows: range, heads: Iterable[str] | None = None) -> CropLabels:
        """Consecutive rows of one crop; whole shards are cheapest. Only these rows need to be finished."""
        return self._read([crop], [rows], self.choose(heads))

    def crop_labels_bytes(self, heads: Iterable[str] | None = None) -> int:
        """Memory in bytes of one crop's labels for all images."""
        return _table_bytes(self.choose(heads), self._manifest.images)

    def crop_labels(self, crop: int, heads: Iterable[str] | None = None) -> CropLabels:
        """Decodes one crop of all images. A UserError names the place of any damage."""
        return self.table([crop], heads)

    def iter_crop_labels(self, crops: Iterable[int], heads: Iterable[str] | None = None) -> Iterator[CropLabels]:
        """Labels of these crops in order; a thread decodes the next crop while the caller uses the last."""
        names = [head.name for head in self.choose(heads)]
        return map_ahead(lambda crop: self.crop_labels(crop, names), crops)

    def table(self, crops: Sequence[int], heads: Iterable[str] | None = None, *, shared: bool = False) -> CropLabels:
        """Several crops of all images, decoded one after the other into one array per kind.

        With `shared` the processes of a node that ask for the same crops and heads share one copy, in shared memory;
        it is freed when the last of them drops its `CropLabels`.
        """
        chosen, images = self._finished_heads(crops, heads), self._manifest.images
        if not shared:
            return self._read(crops, [range(images)], chosen)
        name = f"{self._identity} {[head.name for head in chosen]} {tuple(crops)} {images}"
        arrays = _arrays_of(chosen, images * len(crops))
        return shared_table(name, arrays, partial(_table_of, crops, chosen), partial(self._decode, [range(images)]))

    def window_plan(
        self,
        crops: Sequence[int],
        heads: Iterable[str] | None = None,
        *,
        seed: int | Sequence[int],
        memory_bytes: int,
    ) -> Iterator[np.ndarray]:
        """The rows (n,), rising, of each window in which these crops are read together; see `window_plan` below.

        Raises UserError where one of the crops is not finished.
        """
        per_image = _table_bytes(self._finished_heads(crops, heads), len(crops))
        return window_plan(self._manifest.images, self._manifest.rows_per_shard, per_image, memory_bytes, seed)

    def window(self, crops: Sequence[int], rows: np.ndarray, heads: Iterable[str] | None = None) -> CropLabels:
        """Some rising rows of several crops: image rows[i] of crop crops[j] is row j * n + i of every array.

        Only these rows need to be finished.
        """
        return self._read(crops, ranges(rows), self.choose(heads))

    def _finished_heads(self, crops: Sequence[int], heads: Iterable[str] | None) -> list[HeadInfo]:
        """The heads of these names. Raises UserError where one of the crops is not finished for all images."""
        chosen = self.choose(heads)
        for crop in crops:
            self._shards.require(crop, [head.name for head in chosen])
        return chosen

    def _read(self, crops: Sequence[int], rows: Sequence[range], heads: Sequence[HeadInfo]) -> CropLabels:
        """A table of these rows. Raises UserError where the memory is too small."""
        arrays = [np.empty(shape, dtype) for shape, dtype in _arrays_of(heads, sum(map(len, rows)) * len(crops))]
        return self._decode(rows, _table_of(crops, heads, arrays))

    def _decode(self, rows: Sequence[range], table: CropLabels) -> CropLabels:
        """The table, with these rows of each of its crops decoded into it."""
        for place, crop in enumerate(table.crops):
            target = table.of_crop(place)
            self._shards.read(crop, rows, target.boxes, target.flips, target.labels)
        return table


def _arrays_of(heads: Sequence[HeadInfo], rows: int) -> list[tuple[tuple[int, ...], np.dtype]]:
    """Shape and dtype of the arrays of a table of `rows` rows: boxes, flips, then ids and logp of each head.

    Raises UserError where they take more than the machine's memory.
    """
    if (needed := _table_bytes(heads, rows)) > memory_total():
        size = f"{format_bytes(needed)} of labels, more than this machine's memory"
        raise UserError(
            f"the store was asked for {size}; read fewer crops at a time, or windows (train: label_cache_gib)"
        )
    arrays: list[tuple[tuple[int, ...], np.dtype]] = [((rows, 4), np.dtype(np.uint16)), ((rows,), np.dtype(np.uint8))]
    for head in heads:
        arrays.append(((rows, head.k), _id_dtype(head)))
        arrays.append(((rows, head.k + len(head.temperatures)), np.dtype(np.float16)))
    return arrays


def _table_bytes(heads: Sequence[HeadInfo], rows: int) -> int:
    """Memory in bytes of a table of `rows` rows: 9 for a row's box and flip, 2 for a value."""
    return rows * (9 + sum(head.k * _id_dtype(head).itemsize + 2 * (head.k + len(head.temperatures)) for head in heads))


def _id_dtype(head: HeadInfo) -> np.dtype:
    return head_layouts(head, "float16")[0].dtype  # that of every encoding


def _table_of(crops: Sequence[int], heads: Sequence[HeadInfo], arrays: Sequence[np.ndarray]) -> CropLabels:
    """A table of these arrays, which come in the order of `_arrays_of`."""
    pairs = zip(arrays[2::2], arrays[3::2], strict=True)
    labels = {head.name: pair for head, pair in zip(heads, pairs, strict=True)}
    return CropLabels(crops=tuple(crops), boxes=arrays[0], flips=arrays[1], labels=labels)


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
