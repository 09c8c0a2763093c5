"""Slabs in memory: one crop of all images, decoded ahead, once per process or once per node, or window by window."""

import contextlib
import fcntl
import hashlib
import mmap
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np

from repcon.errors import UserError
from repcon.store_layout import HeadInfo, head_layouts
from repcon.store_manifest import Manifest

Item = TypeVar("Item")
Result = TypeVar("Result")
_HEADER_BYTES, _ALIGNMENT = 64, 64
_READY = b"repcon slab is complete\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Slab:
    """One crop of all images, or of a window of them, decoded."""

    crop: int
    boxes: np.ndarray
    """(N, 4) uint16: x, y, width, height in the pack's pixels."""
    flips: np.ndarray
    """(N,) uint8."""
    labels: dict[str, tuple[np.ndarray, np.ndarray]]
    """Per head: ids (N, k) uint16 or uint32, log-probabilities and log-tails (N, k + T) float16."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """Part of a crop: row i of the slab is image `rows[i]`."""

    rows: np.ndarray
    """(n,) int64."""
    slab: Slab


def _arrays(manifest: Manifest, heads: Sequence[HeadInfo], rows: int) -> list[tuple[tuple[int, ...], np.dtype]]:
    """Shape and type of a slab's arrays, in order: boxes, flips, then ids and logp of each head."""
    shapes: list[tuple[tuple[int, ...], np.dtype]] = [((rows, 4), np.dtype(np.uint16)), ((rows,), np.dtype(np.uint8))]
    for head in heads:
        shapes.append(((rows, head.k), head_layouts(manifest, head)[0].dtype))
        shapes.append(((rows, head.k + len(head.temperatures)), np.dtype(np.float16)))
    return shapes


def slab_bytes(manifest: Manifest, heads: Sequence[HeadInfo], rows: int) -> int:
    """Memory that a slab of so many rows takes."""
    return sum(int(np.prod(shape)) * dtype.itemsize for shape, dtype in _arrays(manifest, heads, rows))


def empty_slab(manifest: Manifest, heads: Sequence[HeadInfo], rows: int, buffer: mmap.mmap | None = None) -> Slab:
    """Arrays for a slab, fresh or laid out one after the other in `buffer`. Raises UserError beyond the memory."""
    needed = slab_bytes(manifest, heads, rows)
    if needed > memory_total():
        raise UserError(f"a slab of {rows} images takes {needed / 2**30:.1f} GiB, more than this machine's memory; "
                        "read it in windows")  # fmt: skip
    arrays, start = [], _HEADER_BYTES
    for shape, dtype in _arrays(manifest, heads, rows):
        if buffer is None:
            arrays.append(np.empty(shape, dtype))
        else:
            count = int(np.prod(shape))
            arrays.append(np.frombuffer(buffer, dtype, count, start).reshape(shape))
            start += -(-count * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
    pairs = zip(arrays[2::2], arrays[3::2], strict=True)
    labels = {head.name: pair for head, pair in zip(heads, pairs, strict=True)}
    return Slab(crop=-1, boxes=arrays[0], flips=arrays[1], labels=labels)


def memory_total() -> int:
    """Bytes of memory in the machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def memory_available() -> int:
    """Bytes that could be taken now without swapping."""
    with contextlib.suppress(OSError), open("/proc/meminfo") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    return memory_total() // 2


def ahead(
    work: Callable[[Item], Result], items: Iterable[Item], drop: Callable[[Result], None] | None = None
) -> Iterator[Result]:
    """`work` of each item, the next one done by a thread while the caller uses the last.

    `drop` gets the result that was done ahead when the caller stops before it.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="repcon-ahead") as pool:
        coming = None
        try:
            for item in items:
                ready, coming = coming, pool.submit(work, item)
                if ready is not None:
                    yield ready.result()
            ready, coming = coming, None
            if ready is not None:
                yield ready.result()
        finally:
            if coming is not None and drop is not None and coming.exception() is None:
                drop(coming.result())


def window_plan(images: int, rows_per_shard: int, bytes_per_row: int, memory_bytes: int, seed: int) -> list[np.ndarray]:
    """Which rows are held together: all in one window if two such slabs fit, otherwise shards in shuffled groups.

    Each window is sorted (n,) int64; together they hold every row once. Two windows (the one in use and the one
    being decoded) stay within `memory_bytes`; a single shard per window is the least.
    """
    shards = -(-images // rows_per_shard)
    together = max(1, memory_bytes // 2 // max(1, bytes_per_row * rows_per_shard))
    if together >= shards:
        return [np.arange(images)]
    order = np.random.default_rng(seed).permutation(shards)
    groups = [np.sort(order[start : start + together]) for start in range(0, shards, together)]
    inside = np.arange(rows_per_shard)
    windows = [(group[:, None] * rows_per_shard + inside).reshape(-1) for group in groups]
    return [window[window < images] for window in windows]


class NodeSlabs:
    """Slabs that the processes of a node share: the first to ask decodes into shared memory, the others map it.

    A file in `folder` holds the slab; whoever uses it holds a shared lock on it, and the last one deletes it. What
    killed processes left is deleted by the next to come.
    """

    def __init__(
        self, manifest: Manifest, heads: Sequence[HeadInfo], identity: str, decode: Callable[[int, Slab], Slab],
        folder: str = "/dev/shm",
    ) -> None:  # fmt: skip
        self._manifest, self._heads, self._decode = manifest, heads, decode
        key = hashlib.sha256(f"{identity} {[head.name for head in heads]}".encode()).hexdigest()[:16]
        self._prefix = Path(folder) / f"repcon-{os.getuid()}-{key}"
        sizes = _arrays(manifest, heads, manifest.images)
        padded = [-(-int(np.prod(shape)) * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT for shape, dtype in sizes]
        self._bytes = _HEADER_BYTES + sum(padded)
        self.sweep()

    def slabs(self, crops: Iterable[int]) -> Iterator[Slab]:
        """Slabs in the order of `crops`, decoded ahead; each stays valid for as long as it is referred to."""
        for slab, release in ahead(self._acquire, crops, drop=lambda pair: pair[1]()):
            try:
                yield slab
            finally:
                release()

    def sweep(self) -> None:
        """Deletes slabs that nobody uses any more."""
        for path in self._prefix.parent.glob(f"repcon-{os.getuid()}-*.slab"):
            with contextlib.suppress(OSError), path.open("rb") as file:
                _delete_if_unused(path, file.fileno())

    def _acquire(self, crop: int) -> tuple[Slab, Callable[[], None]]:
        path = self._prefix.with_name(f"{self._prefix.name}-{crop}.slab")
        descriptor = self._locked(path)
        try:
            if os.fstat(descriptor).st_size != self._bytes:
                _allocate(descriptor, self._bytes)
            memory = mmap.mmap(descriptor, self._bytes)
            slab = empty_slab(self._manifest, self._heads, self._manifest.images, memory)
            if memory[: len(_READY)] == _READY:
                slab = replace(slab, crop=crop)
            else:
                slab = self._decode(crop, slab)
                memory[: len(_READY)] = _READY
            fcntl.flock(descriptor, fcntl.LOCK_SH)
        except BaseException:
            path.unlink(missing_ok=True)
            os.close(descriptor)
            raise

        def release() -> None:
            _delete_if_unused(path, descriptor)
            os.close(descriptor)

        return slab, release

    def _locked(self, path: Path) -> int:
        """The file, opened and locked for us alone, and still the one of that name."""
        while True:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            with contextlib.suppress(FileNotFoundError):
                if path.stat().st_ino == os.fstat(descriptor).st_ino:
                    return descriptor
            os.close(descriptor)


def _allocate(descriptor: int, size: int) -> None:
    """Takes the memory now: an error here is a message, a page that is missing later would be a crash."""
    try:
        os.ftruncate(descriptor, 0)
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        raise UserError(f"/dev/shm has no room for a slab of {size / 2**30:.2f} GiB ({error.strerror}); enlarge it, "
                        "or read the store in windows")  from error  # fmt: skip


def _delete_if_unused(path: Path, descriptor: int) -> None:
    with contextlib.suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink(missing_ok=True)
