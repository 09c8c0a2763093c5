"""Label tables that the processes of a node share: the first to ask decodes into shared memory, the others map it.

A file in /dev/shm holds the tables. Whoever uses it holds a shared lock on it; the last to let go deletes it. Locks
die with their process, so what killed processes left is deleted by the next to come.
"""

import contextlib
import fcntl
import hashlib
import mmap
import os
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from repcon.labels.layout import HeadInfo
from repcon.labels.tables import Tables, arrays_of, check_memory, tables_of
from repcon.runtime.errors import UserError

FOLDER = Path("/dev/shm")
_HEADER_BYTES, _ALIGNMENT = 64, 64
_READY = b"repcon tables are complete\n"


def shared_tables(
    heads: Sequence[HeadInfo],
    crops: Sequence[int],
    images: int,
    identity: str,
    decode: Callable[[Tables], object],
) -> Tables:
    """The tables of so many images that this node holds once; `decode` fills them where this process is the first.

    `identity` tells stores apart. The memory is given back when no process refers to its tables any more.
    Raises UserError when shared memory has no room.
    """
    sweep()
    key = hashlib.sha256(f"{identity} {[head.name for head in heads]} {tuple(crops)}".encode()).hexdigest()[:24]
    path = FOLDER / f"{_prefix()}{key}"
    shapes = arrays_of(heads, images * len(crops))
    places = np.cumsum([0] + [_padded(int(np.prod(shape)) * dtype.itemsize) for shape, dtype in shapes]) + _HEADER_BYTES
    check_memory(int(places[-1]))
    descriptor = _opened(path)
    try:
        memory = _mapped(descriptor, int(places[-1]))
        arrays = [
            np.frombuffer(memory, dtype, int(np.prod(shape)), int(place)).reshape(shape)
            for (shape, dtype), place in zip(shapes, places[:-1], strict=True)
        ]
        tables = tables_of(crops, heads, arrays)
        if memory[: len(_READY)] != _READY:
            decode(tables)
            memory[: len(_READY)] = _READY
        fcntl.flock(descriptor, fcntl.LOCK_SH)
    except BaseException:
        path.unlink(missing_ok=True)
        os.close(descriptor)
        raise
    weakref.finalize(tables, _release, path, descriptor, os.getpid())
    return tables


def sweep() -> None:
    """Deletes tables that nobody uses any more."""
    for path in FOLDER.glob(f"{_prefix()}*"):
        with contextlib.suppress(OSError), path.open("rb") as file:
            _delete_if_unused(path, file.fileno())


def _prefix() -> str:
    return f"repcon-labels-{os.getuid()}-"


def _padded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _opened(path: Path) -> int:
    """The file under a shared lock where its tables are complete, or else locked for us alone to complete it."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        with contextlib.suppress(FileNotFoundError, BlockingIOError):
            if os.pread(descriptor, len(_READY), 0) != _READY:
                # Never waiting: who else saw it incomplete may complete it, and then keeps it as long as it trains.
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.stat().st_ino == os.fstat(descriptor).st_ino:
                return descriptor
        # Between our opening and our lock its last user deleted it, or another came to complete it.
        os.close(descriptor)


def _mapped(descriptor: int, size: int) -> mmap.mmap:
    """The file's memory, taken now: an error here is a message, a page that is missing later would be a crash."""
    if os.fstat(descriptor).st_size != size:
        try:
            os.ftruncate(descriptor, 0)
            os.posix_fallocate(descriptor, 0, size)
        except OSError as error:
            room = f"{FOLDER} has no room for {size / 2**30:.2f} GiB of labels ({error.strerror})"
            raise UserError(f"{room}; enlarge it, or read fewer crops at a time") from error
    return mmap.mmap(descriptor, size)


def _release(path: Path, descriptor: int, owner: int) -> None:
    # A forked child inherits the lock with the descriptor; letting go is its parent's business.
    if os.getpid() == owner:
        _delete_if_unused(path, descriptor)
        os.close(descriptor)


def _delete_if_unused(path: Path, descriptor: int) -> None:
    with contextlib.suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink(missing_ok=True)
