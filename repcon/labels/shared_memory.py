"""Tables of arrays in shared memory: the first process of a node decodes, the others map the result.

A file in a private folder of /dev/shm holds a table. Every user of it holds a shared lock on the file; the last one
deletes it. Locks end with their process, so the next process deletes what killed ones have left.

Any user of the machine may create files in /dev/shm. So the folder and the files are used only if they belong to this
user and are closed to others, and a table's name and seal depend on a secret in the folder.
"""

import contextlib
import hmac
import math
import mmap
import os
import secrets
import stat
import time
import weakref
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import TypeVar

import numpy as np

from repcon.runtime.atomic_files import create_exclusive, lock
from repcon.runtime.errors import UserError
from repcon.runtime.text import format_bytes

FOLDER = Path("/dev/shm")
WAIT_SECONDS, _POLL_SECONDS = 600.0, 0.05
"""How long a process waits for another that decodes the same table; then it decodes its own."""
_HEADER_BYTES, _ALIGNMENT = 64, 64
_SECRET, _SECRET_BYTES = "secret", 32
_READY = b"repcon tables are complete\n"
_FOLDERS = 8

Table = TypeVar("Table")


def shared_table(
    name: str,
    arrays: Sequence[tuple[tuple[int, ...], np.dtype]],
    table_of: Callable[[list[np.ndarray]], Table],
    decode: Callable[[Table], object],
) -> Table:
    """The table called `name`, of arrays of these shapes and dtypes, that this node holds once.

    `table_of` makes it of the arrays, `decode` fills it in the first process. The memory is freed when no process
    refers to its table any more. Raises UserError when shared memory is full.
    """
    folder, secret = private_folder()
    sweep(folder)
    key = hmac.digest(secret, name.encode(), "sha256")
    path, ready = folder / key.hex(), _READY + hmac.digest(secret, b"complete" + key, "sha256")
    sizes = [-(-math.prod(shape) * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT for shape, dtype in arrays]
    places = [_HEADER_BYTES + start for start in accumulate(sizes, initial=0)]
    descriptor = _open_locked(path, ready)
    try:
        memory = _map(descriptor, places[-1])
        table = table_of(
            [
                np.frombuffer(memory, dtype, math.prod(shape), place).reshape(shape)
                for (shape, dtype), place in zip(arrays, places[:-1], strict=True)
            ]
        )
        if memory[: len(ready)] != ready:
            decode(table)
            memory[: len(ready)] = ready
        lock(descriptor, shared=True, wait=True)
    except BaseException:
        path.unlink(missing_ok=True)
        os.close(descriptor)
        raise
    weakref.finalize(table, _release, path, descriptor, os.getpid())
    return table


def private_folder() -> tuple[Path, bytes]:
    """This user's private folder in shared memory, and the secret in it.

    Raises UserError where other users have taken all its names.
    """
    for number in range(_FOLDERS):
        folder = FOLDER / f"repcon-labels-{os.getuid()}-{number}"
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        found = folder.lstat()
        if stat.S_ISDIR(found.st_mode) and _is_private(found):
            return folder, _secret(folder)
    raise UserError(f"{FOLDER}: the folders repcon-labels-{os.getuid()}-* there are not this user's alone; remove them")


def _is_private(found: os.stat_result) -> bool:
    """Whether it belongs to this user and is closed to others."""
    return found.st_uid == os.getuid() and not stat.S_IMODE(found.st_mode) & 0o077


def _secret(folder: Path) -> bytes:
    """The folder's secret; the first process creates it atomically."""
    path = folder / _SECRET
    while True:
        with contextlib.suppress(FileNotFoundError):
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                held = os.read(descriptor, _SECRET_BYTES)
                found = os.fstat(descriptor)  # with a second name until the process that makes it has dropped that
                if not stat.S_ISREG(found.st_mode) or not _is_private(found) or len(held) < _SECRET_BYTES:
                    raise UserError(f"{path}: not a secret of this user's; remove the folder")
                return held
            finally:
                os.close(descriptor)
        create_exclusive(path, secrets.token_bytes(_SECRET_BYTES), 0o600)


def _is_private_file(found: os.stat_result) -> bool:
    """Whether it is a regular file of this user's with a single hard link."""
    return stat.S_ISREG(found.st_mode) and _is_private(found) and found.st_nlink <= 1


def tables_in(folder: Path) -> list[Path]:
    """The files of tables in a private folder."""
    return [path for path in folder.iterdir() if len(path.name) == 64]


def sweep(folder: Path) -> None:
    """Deletes tables that no process uses."""
    for path in tables_in(folder):
        with contextlib.suppress(OSError):
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                _delete_if_unused(path, descriptor)
            finally:
                os.close(descriptor)


def _open_locked(path: Path, ready: bytes) -> int:
    """Opens the file: under a shared lock if its table is complete, else under an exclusive one, to complete it."""
    limit = time.monotonic() + WAIT_SECONDS
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
        try:
            if _lock(path, descriptor, ready):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        # Another process is completing it, or its last user deleted it after it was opened here.
        os.close(descriptor)
        if time.monotonic() > limit:
            raise UserError(f"{path}: another process has been decoding these labels for {WAIT_SECONDS:.0f} s")
        time.sleep(_POLL_SECONDS)


def _lock(path: Path, descriptor: int, ready: bytes) -> bool:
    """Locks the file to use or to complete it; False if that fails. Raises UserError where it is another user's."""
    with contextlib.suppress(FileNotFoundError):
        if lock(descriptor, shared=True) is False:
            return False
        # Without waiting: another process that saw it incomplete may complete it and then keep it while it trains.
        if os.pread(descriptor, len(ready), 0) != ready and lock(descriptor) is False:
            return False
        here, there = os.fstat(descriptor), path.lstat()
        if (here.st_ino, here.st_dev) != (there.st_ino, there.st_dev):
            return False
        if not _is_private_file(here):
            raise UserError(f"{path}: is not a file of this user's alone; remove it")
        return True
    return False


def _map(descriptor: int, size: int) -> mmap.mmap:
    """Maps the file and allocates its pages now: a page that cannot be allocated later would crash the process."""
    if os.fstat(descriptor).st_size != size:
        try:
            os.ftruncate(descriptor, 0)
            os.posix_fallocate(descriptor, 0, size)
        except OSError as error:
            room = f"{FOLDER} has no room for {format_bytes(size)} of labels ({error.strerror})"
            raise UserError(f"{room}; enlarge it, or read fewer crops at a time") from error
    return mmap.mmap(descriptor, size)


def _release(path: Path, descriptor: int, owner: int) -> None:
    # A forked child inherits the lock with the descriptor; its parent releases it.
    if os.getpid() == owner:
        _delete_if_unused(path, descriptor)
        os.close(descriptor)


def _delete_if_unused(path: Path, descriptor: int) -> None:
    with contextlib.suppress(OSError):
        if lock(descriptor):
            path.unlink(missing_ok=True)
