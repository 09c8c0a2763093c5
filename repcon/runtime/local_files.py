"""Local files: a cache of open files for reads by range, atomic and durable writes, locks.

Opening a file costs as much as reading tens of kilobytes of it, and each system call hands the interpreter's lock to
another thread, for which the caller then waits. So a bounded number of files stays open.
"""

import contextlib
import errno
import fcntl
import os
import re
import resource
import stat
import time
import uuid
import weakref
from collections.abc import Callable, Collection, Iterator
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any, BinaryIO, ClassVar

MAX_OPEN_FILES = 4096
"""Maximum number of open files per `OpenFileCache`; further files are opened at each read."""
DESCRIPTOR_SHARE = 4
"""All caches of a process together hold at most 1 / DESCRIPTOR_SHARE of its descriptor limit."""
_PERMANENT_ERRORS = frozenset(
    getattr(errno, name)
    for name in "ENOENT EACCES EPERM ELOOP ENOTDIR EISDIR EINVAL ENAMETOOLONG EILSEQ EOVERFLOW EFBIG".split()  # noqa: SIM905
)
_FILE_KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}


def is_transient(error: OSError) -> bool:
    """Whether a retry may succeed: errors of memory, descriptors, disk or network, which are not the file's.

    Permanent are missing files, missing permissions, and names of something other than a file.
    """
    return error.errno is not None and error.errno not in _PERMANENT_ERRORS


def error_reason(error: OSError) -> str:
    """The operating system's description of the error, with a remedy where descriptors have run out."""
    reason = error.strerror or str(error) or type(error).__name__
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return f"{reason}: raise the limit with `ulimit -n`"
    return reason


def require_regular_file(mode: int, path: str) -> None:
    """Raises OSError unless `mode` (`st_mode`) is that of a regular file: no other can be read by range."""
    if not stat.S_ISREG(mode):
        kind = _FILE_KINDS.get(stat.S_IFMT(mode), "something else")
        raise OSError(errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL, f"{kind}, not a plain file", path)


def open_regular(
    path: str | os.PathLike[str],
    mode: str = "rb",
    *,
    encoding: str | None = None,
    follow_links: bool = True,
    **options: Any,
) -> Any:
    """As `open`, for regular files only: a pipe in the file's place is not waited for. Raises OSError.

    follow_links: False for files that are written, so that a link in the file's place cannot redirect the write.
    """
    opener = partial(_open_descriptor, follow_links=follow_links)
    return open(path, mode, encoding=encoding, opener=opener, **options)


def _open_descriptor(path: str, flags: int, *, follow_links: bool) -> int:
    flags |= os.O_NONBLOCK | (0 if follow_links else os.O_NOFOLLOW)
    try:
        descriptor = os.open(path, flags, 0o666)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):
            raise OSError(error.errno, "a link, a pipe or a socket, not a plain file: remove it", path) from error
        raise
    try:
        require_regular_file(os.fstat(descriptor).st_mode, path)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


class OpenFile:
    """A file open for reading, closed by its last reference, so never while a thread reads it."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Opens without waiting for the other end of a pipe. Raises OSError, also for what is not a regular file."""
        self._path = str(path)
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        status = os.fstat(self._descriptor)
        require_regular_file(status.st_mode, self._path)
        self.bytes = status.st_size
        """The file's length when it was opened."""

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)

    def read(self, start: int, length: int) -> bytes:
        """Bytes [start, start + length), fewer at the file's end; allocates no more than the file's length."""
        length = max(0, min(length, self.bytes - start))
        try:
            found = os.pread(self._descriptor, length, start)
            # One call reads at most 2 GiB.
            while len(found) < length and (more := os.pread(self._descriptor, length - len(found), start + len(found))):
                found += more
        except OSError as error:
            error.filename = self._path  # unknown to a descriptor
            raise
        return found


class OpenFileCache:
    """Open files by path, each opened at its first read.

    A pack and a store are read side by side, so the limit is that of the process (`DESCRIPTOR_SHARE`). Where
    descriptors run out all the same, all open files are closed and the file is opened again.
    """

    _all: ClassVar["weakref.WeakSet[OpenFileCache]"] = weakref.WeakSet()
    _lock = Lock()

    def __init__(self) -> None:
        self._files: dict[str, OpenFile] = {}
        with OpenFileCache._lock:
            OpenFileCache._all.add(self)

    def read(self, path: str, start: int, length: int) -> bytes:
        """As `OpenFile.read`. Raises OSError."""
        file = self._files.get(path)
        if file is None:
            file = _open(path)
            with OpenFileCache._lock:
                total = sum(len(cache._files) for cache in OpenFileCache._all)
                if len(self._files) < MAX_OPEN_FILES and total < _limit():
                    self._files[path] = file
        return file.read(start, length)

    def forget(self, path: str) -> None:
        """Drops a file that was replaced, so that the next read opens the new one."""
        self._files.pop(path, None)

    @classmethod
    def forget_all(cls) -> None:
        """Closes all files that are not being read."""
        with cls._lock:
            for cache in cls._all:
                cache._files.clear()


def _limit() -> int:
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return MAX_OPEN_FILES if soft == resource.RLIM_INFINITY else max(16, soft // DESCRIPTOR_SHARE)


def _open(path: str) -> OpenFile:
    try:
        return OpenFile(path)
    except OSError as error:
        if error.errno not in (errno.EMFILE, errno.ENFILE):
            raise
        OpenFileCache.forget_all()
        return OpenFile(path)


_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOLCK, errno.EBADF)
"""Errors of `flock` on file systems without locks: Lustre without its option, some NFS and FUSE mounts."""
_NO_SYNC = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EBADF, errno.EACCES, errno.EPERM)
"""Errors of syncing a folder where that is not supported: VirtualBox shares, some SMB and FUSE mounts."""


def read_file(path: str | os.PathLike[str], max_bytes: int | None = None) -> bytes:
    """Reads a regular file, or its first `max_bytes`. Raises OSError that names the file."""
    file = OpenFile(path)
    return file.read(0, file.bytes if max_bytes is None else max_bytes)


def fsync_folder(folder: str | os.PathLike[str]) -> None:
    """Syncs a folder to disk, without which a file that was renamed there may be lost in a power cut.

    Does nothing on file systems that cannot sync folders.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            error.filename = os.fspath(folder)
            raise


def try_lock(descriptor: int, kind: int = fcntl.LOCK_EX) -> bool | None:
    """Locks an open file (`fcntl.LOCK_EX` or `LOCK_SH`) without waiting, until its descriptor is closed.

    True if it is locked now, False if another process holds a lock, None on a file system without locks.
    """
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        if error.errno not in _NO_LOCKS:
            raise
        return None
    return True


_TEMPORARY = re.compile(r"\.[A-Za-z0-9_][A-Za-z0-9_.\-]*\.[0-9a-f]{32}\.repcon\.tmp")
"""Names of files that are being written: `remove_abandoned` deletes no other."""
_DAY_SECONDS = 86_400.0


class WriteCancelledError(FileNotFoundError):
    """The temporary file of an `AtomicFile` was deleted by another process's `cancel_writes`."""


class AtomicFile:
    """A file that is written next to `path` and replaces it, durably, once it is complete.

    A reader, also after a power cut, sees the old file or the new one. As a context manager it gives the open binary
    file, commits at the end of the block, and aborts where the block raises. Raises OSError that names `path`. The
    temporary file is locked while it is written, so that `remove_abandoned` knows that its writer lives.

    check: called by `commit` once the temporary file is complete; an error that it raises cancels the write.
    """

    def __init__(self, path: str | os.PathLike[str], check: Callable[[], object] = lambda: None) -> None:
        self.path, self._check = Path(path), check
        try:
            while not self._create():
                pass
        except OSError as error:
            error.filename = str(self.path)
            raise

    def _create(self) -> bool:
        """Opens and locks a new file; False where `remove_abandoned` took it in the instant before it was locked."""
        self._temporary = self.path.with_name(f".{self.path.name}.{uuid.uuid4().hex}.repcon.tmp")
        self.file: BinaryIO = self._temporary.open("xb")
        try:
            locked = try_lock(self.file.fileno()) is not False and self._temporary.exists()
        except BaseException:
            self.abort()
            raise
        if not locked:
            self.file.close()
        return locked

    def commit(self) -> None:
        """Syncs the file, calls `check`, renames the file, and syncs the folder.

        Raises WriteCancelledError where another process cancelled the write. An error before the rename leaves the old
        file in place and no temporary one.
        """
        try:
            self.file.flush()
            os.fsync(self.file.fileno())
            self._check()
            try:
                os.replace(self._temporary, self.path)
            except FileNotFoundError as error:
                raise WriteCancelledError(errno.ENOENT, "another process cancelled the write", self.path) from error
            self.file.close()
        except BaseException as error:
            self.abort()
            if isinstance(error, OSError):
                error.filename, error.filename2 = str(self.path), None
            raise
        fsync_folder(self.path.parent)

    def abort(self) -> None:
        """Deletes what was written; no effect after `commit`."""
        with contextlib.suppress(OSError):  # closing flushes, to a disk that may be full
            self.file.close()
        self._temporary.unlink(missing_ok=True)

    def __enter__(self) -> BinaryIO:
        return self.file

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is None:
            self.commit()
            return
        self.abort()
        if isinstance(error, OSError) and error.filename is None:  # a write to a full disk does not name the file
            error.filename = str(self.path)


def write_atomic(path: str | os.PathLike[str], data: bytes, check: Callable[[], object] = lambda: None) -> None:
    """Writes a whole file with `AtomicFile`; writes it again, after `check`, where another process cancelled it.

    Raises OSError that names `path`, and what `check` raises.
    """
    while True:
        try:
            with AtomicFile(path, check) as file:
                file.write(data)
            return
        except WriteCancelledError:
            continue


def remove_abandoned(folder: str | os.PathLike[str]) -> None:
    """Deletes the temporary files below the folder whose writers were killed, and no other file."""
    for path in _temporary_files(folder):
        with contextlib.suppress(OSError):
            _remove_unlocked(path)


def is_temporary(name: str) -> bool:
    """Whether a file of this name is one that an `AtomicFile` is writing."""
    return bool(_TEMPORARY.fullmatch(name))


def cancel_writes(folder: str | os.PathLike[str], names: Collection[str]) -> None:
    """Deletes the temporary files of all processes, below the folder, of files of these names."""
    for path in _temporary_files(folder):
        if path.name[1:].rsplit(".", 3)[0] in names:
            path.unlink(missing_ok=True)


def _temporary_files(folder: str | os.PathLike[str]) -> Iterator[Path]:
    for parent, _, names in os.walk(folder):
        yield from (Path(parent, name) for name in filter(_TEMPORARY.fullmatch, names))


def _remove_unlocked(temporary: Path) -> None:
    """Deletes the file unless it is locked; on a file system without locks, once it has not changed for a day."""
    descriptor = os.open(temporary, os.O_RDWR | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        free = try_lock(descriptor)
        if free or (free is None and time.time() - os.fstat(descriptor).st_mtime > _DAY_SECONDS):
            temporary.unlink()
    finally:
        os.close(descriptor)
