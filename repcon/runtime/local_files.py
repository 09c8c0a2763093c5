"""Regular local files opened for reading, by range and with a cache of open files; errors that may pass.

Opening a file costs as much as reading tens of kilobytes of it, and each system call hands the interpreter's lock to
another thread, for which the caller then waits. So a bounded number of files stays open.
"""

import errno
import os
import resource
import stat
import weakref
from functools import partial
from threading import Lock
from typing import Any, ClassVar

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


def read_file(path: str | os.PathLike[str], max_bytes: int | None = None) -> bytes:
    """Reads a regular file, or its first `max_bytes`. Raises OSError that names the file."""
    file = OpenFile(path)
    return file.read(0, file.bytes if max_bytes is None else max_bytes)
