"""A direct reader of the store's shards: index, pread, checksums, decompression straight into the caller's array.

It reads the standard Zarr v3 `sharding_indexed` format with blosc and crc32c, nothing else, several times faster
than zarr-python; the tests compare the two on every codec. It serves only what a marker vouches for.
"""

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import google_crc32c
import numcodecs.blosc
import numpy as np

from repcon import gaps
from repcon.errors import UserError
from repcon.store_files import Files, LocalFiles
from repcon.store_layout import HeadInfo, Layout, Unit, box_layouts, head_layouts, part_of, shard_name, unit_at
from repcon.store_manifest import Manifest
from repcon.store_markers import Marker, Markers, ShardFile
from repcon.store_slabs import Slab

_INDEX_ENTRY_BYTES, _CRC_BYTES, _BLOSC_HEADER_BYTES = 16, 4, 16
_ABSENT = np.uint64(2**64 - 1)
_REMEDY = "restore the file from a copy, or delete the unit's marker in done/ and run `repcon precompute` again"


def chunk_crcs(shard: bytes, chunks: int) -> tuple[int, ...]:
    """The crc32c of each of the shard's chunks, as its index finds them."""
    index = _parse_index(shard[-(_INDEX_ENTRY_BYTES * chunks + _CRC_BYTES) :], "new shard")
    starts_and_ends = [(int(offset), int(offset + length) - _CRC_BYTES) for offset, length in index]
    return tuple(google_crc32c.value(shard[start:end]) for start, end in starts_and_ends)


class ShardReader:
    """Decodes any crop's rows, several chunks at a time. Thread-safe."""

    def __init__(self, files: Files, manifest: Manifest, markers: Markers) -> None:
        self._files, self._manifest, self._markers = files, manifest, markers
        self._indexes: dict[str, np.ndarray] = {}
        self._lock = threading.Lock()
        # Locally the threads decompress; over a network they wait.
        self._threads = min(8, os.cpu_count() or 1) if isinstance(files, LocalFiles) else 16

    def require(self, crop: int, heads: Sequence[HeadInfo]) -> None:
        """Makes sure that the crop is finished for all images, before memory is set aside for it."""
        for name in (None, *(head.name for head in heads)):
            part = part_of(self._manifest, name, crop)
            for row in range(0, self._manifest.images, self._manifest.rows_per_shard):
                self._markers.get(unit_at(self._manifest, part, crop, row))

    def read(self, crop: int, rows: Sequence[range], out: Slab, heads: Sequence[HeadInfo]) -> Slab:
        """Fills `out` with the ranges of rows, one after the other: boxes, flips, and the labels of these heads."""
        jobs: list[tuple[Callable[..., None], tuple]] = []
        for part, place in self._pieces(rows):
            jobs.append((self._boxes, (crop, part, out.boxes[place], out.flips[place])))
            for head in heads:
                ids, logp = out.labels[head.name]
                jobs.append((self._ids, (head, crop, part, ids[place])))
                jobs.append((self._values, (head, crop, part, logp[place])))
        with ThreadPoolExecutor(self._threads, thread_name_prefix="repcon-shards") as pool:
            running = [pool.submit(job, *arguments) for job, arguments in jobs]
        for job in running:
            job.result()
        return replace(out, crop=crop)

    def _pieces(self, rows: Sequence[range]) -> Iterator[tuple[range, slice]]:
        """The rows cut at shard borders, each piece with its place in the caller's arrays."""
        size, place = self._manifest.rows_per_shard, 0
        for wanted in rows:
            start = wanted.start
            while start < wanted.stop:
                stop = min(wanted.stop, (start // size + 1) * size)
                yield range(start, stop), slice(place, place + stop - start)
                place += stop - start
                start = stop

    def _boxes(self, crop: int, rows: range, boxes: np.ndarray, flips: np.ndarray) -> None:
        box, flip = box_layouts()
        unit = unit_at(self._manifest, part_of(self._manifest, None, crop), crop, rows.start)
        self._decode(box, unit, crop, rows, boxes)
        self._decode(flip, unit, crop, rows, flips)
        if flips.max(initial=0) > 1 or boxes[:, 2:].max(initial=0) == box.fill or not boxes[:, 2:].all():
            raise self._poisoned(box, crop, rows)

    def _ids(self, head: HeadInfo, crop: int, rows: range, out: np.ndarray) -> None:
        layout, _ = head_layouts(self._manifest, head)
        unit = unit_at(self._manifest, part_of(self._manifest, head.name, crop), crop, rows.start)
        self._decode(layout, unit, crop, rows, out)
        if out.max(initial=0) >= head.classes:
            self._allow(unit, (out >= head.classes).any(1), layout, crop, rows)

    def _values(self, head: HeadInfo, crop: int, rows: range, out: np.ndarray) -> None:
        _, layout = head_layouts(self._manifest, head)
        unit = unit_at(self._manifest, part_of(self._manifest, head.name, crop), crop, rows.start)
        if self._manifest.values == "gaps8":
            codes = np.empty((len(rows), layout.width), np.uint8)
            self._decode(layout, unit, crop, rows, codes)
            gaps.decode(codes, head.k, head.classes, head.temperatures, out)
        else:
            self._decode(layout, unit, crop, rows, out)
        if (out.view(np.uint16) & 0x7FFF).max(initial=0) > 0x7C00:
            self._allow(unit, np.isnan(out).any(1), layout, crop, rows)

    def _allow(self, unit: Unit, poisoned: np.ndarray, layout: Layout, crop: int, rows: range) -> None:
        """Poison is right only where the marker lists the row as missing."""
        found = np.flatnonzero(poisoned) + rows.start
        if not set(found.tolist()) <= set(self._markers.get(unit).missing):
            raise self._poisoned(layout, crop, rows)

    def _poisoned(self, layout: Layout, crop: int, rows: range) -> UserError:
        name = shard_name(self._manifest, layout, crop, rows.start)
        where = f"{self._files.root}/{name}: crop {crop} of rows {rows.start} to {rows.stop - 1}"
        return UserError(f"{where} holds values that were never written; {_REMEDY}")

    def _decode(self, layout: Layout, unit: Unit, crop: int, rows: range, out: np.ndarray) -> None:
        """Decompresses one crop's chunk of one shard into `out`, by way of a buffer where only a part is wanted."""
        name = shard_name(self._manifest, layout, crop, rows.start)
        payload = self._payload(name, self._markers.get(unit), crop % self._manifest.crops_per_shard)
        rows_per_shard = self._manifest.rows_per_shard
        wanted = rows_per_shard * layout.bytes_per_row
        sizes = payload[:_BLOSC_HEADER_BYTES].view("<u4")
        if len(sizes) < 4 or sizes[1] != wanted or sizes[3] != len(payload):
            raise self._damaged(name, "its compressed data do not have the length of a chunk")
        whole = len(rows) == rows_per_shard and out.flags.c_contiguous
        target = out if whole else np.empty((rows_per_shard, *out.shape[1:]), layout.dtype)
        try:
            numcodecs.blosc.decompress(payload, target)
        except (RuntimeError, ValueError) as error:
            raise self._damaged(name, f"it does not decompress ({error})") from error
        if not whole:
            first = rows.start % rows_per_shard
            out[:] = target[first : first + len(rows)]

    def _payload(self, name: str, marker: Marker, chunk: int) -> np.ndarray:
        """The chunk's compressed bytes, after index, checksum and marker have been found to agree."""
        shard = marker.files.get(name)
        if shard is None:
            raise self._damaged(name, "the unit's marker does not list it")
        offset, length = (int(value) for value in self._index(name, shard)[chunk])
        if offset + length > shard.bytes or length <= _BLOSC_HEADER_BYTES + _CRC_BYTES:
            raise self._damaged(name, f"its index points outside the file for chunk {chunk}")
        data = np.frombuffer(self._read(name, offset, length), np.uint8)
        payload, stored = data[:-_CRC_BYTES], int.from_bytes(data[-_CRC_BYTES:].tobytes(), "little")
        if len(data) != length or google_crc32c.value(payload) != stored:
            raise self._damaged(name, f"the checksum of chunk {chunk} is wrong")
        if len(shard.crc32c) <= chunk or shard.crc32c[chunk] != stored:
            raise self._damaged(name, f"chunk {chunk} is not the one that was written")
        return payload

    def _index(self, name: str, shard: ShardFile) -> np.ndarray:
        """(chunks, 2) uint64 offsets and lengths; read once per shard, checked against the file's length."""
        with self._lock:
            known = self._indexes.get(name)
        if known is not None:
            return known
        size = self._files.size(name)
        if size != shard.bytes:
            state = "it is missing" if size is None else f"it has {size} bytes instead of {shard.bytes}"
            raise self._damaged(name, state)
        length = _INDEX_ENTRY_BYTES * self._manifest.crops_per_shard + _CRC_BYTES
        index = _parse_index(self._read(name, max(0, shard.bytes - length), length), f"{self._files.root}/{name}")
        with self._lock:
            if len(self._indexes) > 100_000:
                self._indexes.clear()
            self._indexes[name] = index
        return index

    def _read(self, name: str, start: int, length: int) -> bytes:
        try:
            return self._files.read(name, start, length)
        except OSError as error:
            raise self._damaged(name, f"it cannot be read ({error.strerror or error})") from error

    def _damaged(self, name: str, reason: str) -> UserError:
        return UserError(f"{self._files.root}/{name}: {reason}; {_REMEDY}")


def _parse_index(data: bytes, origin: str) -> np.ndarray:
    if google_crc32c.value(data[:-_CRC_BYTES]) != int.from_bytes(data[-_CRC_BYTES:], "little"):
        raise UserError(f"{origin}: the checksum of the shard's index is wrong; {_REMEDY}")
    index = np.frombuffer(data[:-_CRC_BYTES], "<u8").reshape(-1, 2)
    if (index == _ABSENT).any():
        raise UserError(f"{origin}: a chunk was never written; {_REMEDY}")
    return index
