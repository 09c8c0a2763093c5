"""Reader of the store's shards: index, pread, checksums, decompression directly into the caller's array.

It reads the standard Zarr v3 `sharding_indexed` format with blosc and crc32c, nothing else, several times faster
than zarr-python; the tests compare the two on every codec. It returns only what a completion record lists.
"""

import os
import struct
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial

import google_crc32c
import numcodecs.blosc
import numpy as np

from repcon.labels import quantize
from repcon.labels.completion import CompletionIndex, CompletionRecord, ShardFile
from repcon.labels.layout import BOX, FLIP, HeadInfo, Layout, Unit, head_layouts, heads_of, part_of, shard_name, unit_at
from repcon.labels.manifest import Manifest
from repcon.runtime.errors import UserError
from repcon.runtime.filesystem import FileSystem, LocalFileSystem
from repcon.runtime.local_files import error_reason, is_transient
from repcon.runtime.system import cores

_INDEX_ENTRY_BYTES, _CRC_BYTES = 16, 4
_BLOSC_HEADER = struct.Struct("<4I")
"""Version and flags, bytes decoded, bytes of a block, bytes encoded."""
_ABSENT = np.uint64(2**64 - 1)
_INFINITY_BITS = 0x7C00  # of float16; as integers, what is above it and positive is NaN
_REMEDY = (
    "restore the file from a copy, or delete the unit's completion record in done/ and run `repcon precompute` again"
)


def chunk_crcs(shard: bytes, chunks: int) -> tuple[int, ...]:
    """The crc32c of each of the shard's chunks."""
    index = _parse_index(shard[-(_INDEX_ENTRY_BYTES * chunks + _CRC_BYTES) :], chunks, "new shard")
    starts_and_ends = [(int(offset), int(offset + length) - _CRC_BYTES) for offset, length in index]
    return tuple(google_crc32c.value(shard[start:end]) for start, end in starts_and_ends)


class ShardReader:
    """Decodes any crop's rows, several chunks at a time. Thread-safe."""

    def __init__(self, files: FileSystem, manifest: Manifest, completion: CompletionIndex) -> None:
        self._files, self._manifest, self._completion = files, manifest, completion
        self._heads = heads_of(manifest)
        self._layouts = {name: head_layouts(head, manifest.values) for name, head in self._heads.items()}
        self._indexes: dict[str, np.ndarray] = {}
        self._lock = threading.Lock()
        # Locally the threads decompress; over a network they wait.
        self._is_local = isinstance(files, LocalFileSystem)
        self._threads = min(8, cores()) if self._is_local else 16
        self._pools: dict[int, ThreadPoolExecutor] = {}

    def require(self, crop: int, heads: Iterable[str]) -> None:
        """Raises UserError unless the crop is finished for all images; to be called before memory is allocated."""
        for name in (None, *heads):
            part = part_of(self._manifest, name, crop)
            for row in range(0, self._manifest.images, self._manifest.rows_per_shard):
                self._completion.get(unit_at(self._manifest, part, crop, row))

    def read(
        self,
        crop: int,
        rows: Sequence[range],
        boxes: np.ndarray,
        flips: np.ndarray,
        labels: Mapping[str, tuple[np.ndarray, np.ndarray]],
    ) -> None:
        """Fills boxes, flips, and the ids and values of each head with the ranges of rows, one after the other."""
        jobs: list[Callable[[], None]] = []
        for part, place in self._pieces(rows):
            jobs.append(partial(self._boxes, crop, part, boxes[place], flips[place]))
            for name, (ids, logp) in labels.items():
                jobs.append(partial(self._labels, self._heads[name], crop, part, ids[place], logp[place]))
        self._run(jobs)

    def _run(self, jobs: Sequence[Callable[[], None]]) -> None:
        """Runs the jobs in this thread and the pool's. Raises the error of one that failed after all have ended.

        A thread that reads local files ahead runs them alone: it has time, and its consumer has use for the cores.
        """
        reads_ahead = self._is_local and threading.current_thread() is not threading.main_thread()
        threads = 1 if reads_ahead else min(self._threads, len(jobs))
        remaining = iter(jobs)

        def work() -> None:
            for job in remaining:
                job()

        # The calling thread works too: waking another costs as much as decoding a chunk.
        helpers = [self._pool().submit(work) for _ in range(threads - 1)]
        try:
            work()
        finally:
            wait(helpers)
        for helper in helpers:
            helper.result()

    def _pool(self) -> ThreadPoolExecutor:
        """This process's threads, kept between reads; a forked process does not inherit its parent's."""
        with self._lock:
            if os.getpid() not in self._pools:
                self._pools[os.getpid()] = ThreadPoolExecutor(self._threads, thread_name_prefix="repcon-shards")
            return self._pools[os.getpid()]

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
        unit = self._unit(None, crop, rows)
        self._rows(BOX, unit, crop, rows, boxes)
        self._rows(FLIP, unit, crop, rows, flips)
        if flips.max(initial=0) > 1 or (boxes.max(initial=0) == BOX.fill and (boxes == BOX.fill).all(1).any()):
            raise self._unwritten(BOX, crop, rows)

    def _labels(self, head: HeadInfo, crop: int, rows: range, ids: np.ndarray, logp: np.ndarray) -> None:
        id_layout, value_layout = self._layouts[head.name]
        unit = self._unit(head.name, crop, rows)
        self._rows(id_layout, unit, crop, rows, ids)
        if ids.max(initial=0) >= head.classes:
            self._require_missing(unit, np.flatnonzero((ids >= head.classes).any(1)), id_layout, crop, rows)
        if self._manifest.values == "quantized8":
            first = rows.start - unit.rows.start
            codes = self._chunk(value_layout, unit, crop)[:, first : first + len(rows)]
            quantize.decode(codes, head.k, head.classes, head.temperatures, logp)
        else:
            self._rows(value_layout, unit, crop, rows, logp)
        if logp.view(np.int16).max(initial=0) > _INFINITY_BITS:
            self._require_missing(unit, np.flatnonzero(np.isnan(logp).any(1)), value_layout, crop, rows)

    def _unit(self, head: str | None, crop: int, rows: range) -> Unit:
        return unit_at(self._manifest, part_of(self._manifest, head, crop), crop, rows.start)

    def _require_missing(self, unit: Unit, unwritten: np.ndarray, layout: Layout, crop: int, rows: range) -> None:
        """Raises UserError for fill values in a row that the completion record does not list as missing."""
        if not {int(row) + rows.start for row in unwritten} <= set(self._completion.get(unit).missing):
            raise self._unwritten(layout, crop, rows)

    def _unwritten(self, layout: Layout, crop: int, rows: range) -> UserError:
        name = shard_name(self._manifest, layout, crop, rows.start)
        where = f"{self._files.root}/{name}: crop {crop} of rows {rows.start} to {rows.stop - 1}"
        return UserError(f"{where} holds values that were never written; {_REMEDY}")

    def _rows(self, layout: Layout, unit: Unit, crop: int, rows: range, out: np.ndarray) -> None:
        """Rows of one chunk, decompressed directly into `out` where they are the whole chunk."""
        if len(rows) == self._manifest.rows_per_shard:
            self._chunk(layout, unit, crop, out)
        else:
            first = rows.start - unit.rows.start
            out[:] = self._chunk(layout, unit, crop)[first : first + len(rows)]

    def _chunk(self, layout: Layout, unit: Unit, crop: int, out: np.ndarray | None = None) -> np.ndarray:
        """One crop's chunk of the unit's shard, decompressed into `out` or a new array."""
        name = shard_name(self._manifest, layout, crop, unit.rows.start)
        payload = self._payload(name, self._completion.get(unit), crop % self._manifest.crops_per_shard)
        _, decoded_bytes, _, encoded_bytes = _BLOSC_HEADER.unpack_from(payload.data)
        if decoded_bytes != self._manifest.rows_per_shard * layout.bytes_per_row or encoded_bytes != len(payload):
            raise self._damaged(name, "its compressed data do not have the length of a chunk")
        target = np.empty(layout.shape(1, self._manifest.rows_per_shard)[1:], layout.dtype) if out is None else out
        try:
            numcodecs.blosc.decompress(payload, target)
        except (RuntimeError, ValueError) as error:
            raise self._damaged(name, f"it does not decompress ({error})") from error
        return target

    def _payload(self, name: str, record: CompletionRecord, chunk: int) -> np.ndarray:
        """The chunk's compressed bytes. Raises UserError unless index, checksum and completion record agree."""
        shard = record.files.get(name)
        if shard is None:
            raise self._damaged(name, "the unit's completion record does not list it")
        offset, length = self._index(name, shard)[chunk].tolist()
        if offset + length > shard.bytes or length <= _BLOSC_HEADER.size + _CRC_BYTES:
            raise self._damaged(name, f"its index points outside the file for chunk {chunk}")
        data = self._read(name, offset, length)
        payload, stored = np.frombuffer(data, np.uint8)[:-_CRC_BYTES], int.from_bytes(data[-_CRC_BYTES:], "little")
        if len(data) != length or google_crc32c.value(payload) != stored:
            raise self._damaged(name, f"the checksum of chunk {chunk} is wrong")
        if len(shard.crc32c) <= chunk or shard.crc32c[chunk] != stored:
            raise self._damaged(name, f"chunk {chunk} is not the one that was written")
        return payload

    def _index(self, name: str, shard: ShardFile) -> np.ndarray:
        """(chunks, 2) uint64 offsets and lengths; read once per shard, checked against the file's length."""
        with self._lock:
            index = self._indexes.get(name)
        if index is not None:
            return index
        size = self._files.size(name)
        if size != shard.bytes:
            state = "it is missing" if size is None else f"it has {size} bytes instead of {shard.bytes}"
            raise self._damaged(name, state)
        length = _INDEX_ENTRY_BYTES * self._manifest.crops_per_shard + _CRC_BYTES
        data = self._read(name, max(0, shard.bytes - length), length)
        index = _parse_index(data, self._manifest.crops_per_shard, f"{self._files.root}/{name}")
        with self._lock:
            if len(self._indexes) > 100_000:
                self._indexes.clear()
            self._indexes[name] = index
        return index

    def _read(self, name: str, start: int, length: int) -> bytes:
        try:
            return self._files.read_range(name, start, length)
        except OSError as error:
            if is_transient(error):
                where = f"{self._files.root}/{name}"
                raise UserError(
                    f"{where}: cannot be read now ({error_reason(error)}); it may be whole: try again"
                ) from error
            raise self._damaged(name, f"it cannot be read ({error_reason(error)})") from error

    def _damaged(self, name: str, reason: str) -> UserError:
        return UserError(f"{self._files.root}/{name}: {reason}; {_REMEDY}")


def _parse_index(data: bytes, chunks: int, origin: str) -> np.ndarray:
    """(chunks, 2) uint64 offsets and lengths. Raises UserError."""
    if len(data) != _INDEX_ENTRY_BYTES * chunks + _CRC_BYTES:
        raise UserError(f"{origin}: too short for the shard's index; {_REMEDY}")
    if google_crc32c.value(data[:-_CRC_BYTES]) != int.from_bytes(data[-_CRC_BYTES:], "little"):
        raise UserError(f"{origin}: the checksum of the shard's index is wrong; {_REMEDY}")
    index = np.frombuffer(data[:-_CRC_BYTES], "<u8").reshape(-1, 2)
    if (index == _ABSENT).any():
        raise UserError(f"{origin}: a chunk was never written; {_REMEDY}")
    return index
