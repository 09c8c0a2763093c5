"""Stored labels as arrays: rows, one crop of all images, tables of several crops, windows that fit the memory."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from repcon.labels.completion import CompletionIndex
from repcon.labels.layout import HeadInfo
from repcon.labels.manifest import Manifest
from repcon.labels.shard_reader import ShardReader
from repcon.labels.shared_memory import shared_tables
from repcon.labels.tables import CropLabels, LabelTable, empty_table, ranges, table_bytes, window_plan
from repcon.runtime.errors import UserError
from repcon.runtime.filesystem import FileSystem
from repcon.runtime.prefetch import map_ahead


class LabelReader:
    """Decodes labels of a store. Thread-safe. `heads` None stands for all heads in every method."""

    def __init__(
        self,
        files: FileSystem,
        manifest: Manifest,
        heads: Mapping[str, HeadInfo],
        completion: CompletionIndex,
        identity: str,
    ) -> None:
        """`identity` tells the store from others in memory that processes share."""
        self._url, self._manifest, self._heads, self._identity = files.root, manifest, heads, identity
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
            out = CropLabels(crop=crop, boxes=boxes[place], flips=flips[place], labels={})
            self._shards.read(crop, [rows], out, [])
        return boxes, flips

    def read_rows(self, crop: int, rows: range, heads: Iterable[str] | None = None) -> CropLabels:
        """Consecutive rows of one crop; whole shards are cheapest. Only these rows need to be finished."""
        chosen = self.choose(heads)
        return self._filled(empty_table(chosen, [crop], len(rows)), [rows], chosen).crop_labels(0)

    def crop_labels_bytes(self, heads: Iterable[str] | None = None) -> int:
        """Memory in bytes of one crop's labels for all images."""
        return table_bytes(self.choose(heads), self._manifest.images)

    def crop_labels(self, crop: int, heads: Iterable[str] | None = None, out: CropLabels | None = None) -> CropLabels:
        """Decodes one crop of all images, into `out` where given. A UserError names the place of any damage."""
        chosen = self.choose(heads)
        self._shards.require(crop, chosen)
        target = out or empty_table(chosen, [crop], self._manifest.images).crop_labels(0)
        return self._shards.read(crop, [range(self._manifest.images)], target, chosen)

    def iter_crop_labels(self, crops: Iterable[int], heads: Iterable[str] | None = None) -> Iterator[CropLabels]:
        """Labels of these crops in order; a thread decodes the next crop while the caller uses the last."""
        names = [head.name for head in self.choose(heads)]
        return map_ahead(lambda crop: self.crop_labels(crop, names), crops)

    def table(self, crops: Sequence[int], heads: Iterable[str] | None = None, *, shared: bool = False) -> LabelTable:
        """Several crops of all images, decoded one after the other into one array per kind.

        With `shared` the processes of a node that ask for the same crops and heads share one copy, in shared memory;
        it is freed when the last of them drops its `LabelTable`.
        """
        chosen = self.choose(heads)
        for crop in crops:
            self._shards.require(crop, chosen)

        def decode(table: LabelTable) -> LabelTable:
            return self._filled(table, [range(self._manifest.images)], chosen)

        if shared:
            return shared_tables(chosen, crops, self._manifest.images, self._identity, decode)
        return decode(empty_table(chosen, crops, self._manifest.images))

    def window_plan(
        self,
        crops: Sequence[int],
        heads: Iterable[str] | None = None,
        *,
        seed: int | Sequence[int],
        memory_bytes: int,
    ) -> Iterator[np.ndarray]:
        """The rows (n,), rising, of each window in which these crops are read together; see `tables.window_plan`.

        Raises UserError where one of the crops is not finished.
        """
        chosen = self.choose(heads)
        for crop in crops:
            self._shards.require(crop, chosen)
        per_image = table_bytes(chosen, len(crops))
        return window_plan(self._manifest.images, self._manifest.rows_per_shard, per_image, memory_bytes, seed)

    def window(self, crops: Sequence[int], rows: np.ndarray, heads: Iterable[str] | None = None) -> LabelTable:
        """Some rising rows of several crops: image rows[i] of crop crops[j] is row j * n + i of every array.

        Only these rows need to be finished.
        """
        chosen = self.choose(heads)
        return self._filled(empty_table(chosen, crops, len(rows)), ranges(rows), chosen)

    def _filled(self, table: LabelTable, rows: Sequence[range], heads: Sequence[HeadInfo]) -> LabelTable:
        """The table, with these rows of each of its crops decoded into it."""
        for place, crop in enumerate(table.crops):
            self._shards.read(crop, rows, table.crop_labels(place), heads)
        return table
