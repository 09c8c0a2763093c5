"""Local files that are read by range, over and over, from several threads: a bounded number of them stays open.

Opening costs as much as reading some tens of kilobytes, and each system call hands the interpreter's lock to another
thread, which the caller then has to wait for. And folders on disk, and the file system behind a URL.
"""

import errno
import fcntl
import os
import resource
import stat
import threading
import weakref
from functools import partial
from typing import Any, ClassVar

from repcon.runtime.errors import UserError

MOST = 4096
"""Files that stay open at most, per `OpenFiles`; of further ones each read opens the file again."""
SHARE = 4
"""All `OpenFiles` of a process together keep one part in so many of the descriptors that it may have."""
_LASTING = frozenset(
    getattr(errno, name)
    for name in "ENOENT EACCES EPERM ELOOP ENOTDIR EISDIR EINVAL ENAMETOOLONG EILSEQ EOVERFLOW EFBIG".split()  # noqa: SIM905
)
_BUCKETS = ("s3", "s3a", "gs", "gcs", "abfs", "abfss", "az")
"""Schemes without folders, whose first name is a bucket's."""
SCHEMES = ("file", "local", "memory", "http", "https", *_BUCKETS)
"""The schemes that are opened. fsspec knows others that read further URLs, or run code, that a file names."""
_SPECIAL = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}


def is_passing(error: OSError) -> bool:
    """Whether the error may be gone at the next try and says nothing of the file: memory, descriptors, disk, network.

    Only a missing file, one without permission and one that is no file are properties of what was named.
    """
    return error.errno is not None and error.errno not in _LASTING


def reason_of(error: OSError) -> str:
    """The system's words for the error, with what to do where it has nothing to do with the file."""
    words = error.strerror or str(error) or type(error).__name__
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return f"{words}: raise the limit with `ulimit -n`"
    return words


def require_plain(mode: int, path: str) -> None:
    """Raises OSError where `mode` (`st_mode`) is not that of a plain file, which alone can be read by range."""
    if not stat.S_ISREG(mode):
        kind = _SPECIAL.get(stat.S_IFMT(mode), "something else")
        raise OSError(errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL, f"{kind}, not a plain file", path)


def open_own(path: str | os.PathLike[str], mode: str, **how: Any) -> Any:
    """As `open`, for files that this program writes: what a stranger has put in their place, a link to a file of the
    user's or a pipe that nobody reads, is neither followed nor waited for. Raises OSError."""
    return open(path, mode, opener=_own, **how)


def _own(path: str, flags: int) -> int:
    try:
        descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):
            raise OSError(error.errno, "a link, a pipe or a socket, not a plain file: remove it", path) from error
        raise
    try:
        require_plain(os.fstat(descriptor).st_mode, path)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


class OpenFile:
    """A file that is closed once nobody holds it, so never under a thread that reads it."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Raises OSError, also for a pipe or a device: opening one must not wait for its other end."""
        self._path = str(path)
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        status = os.fstat(self._descriptor)
        require_plain(status.st_mode, self._path)
        self.bytes = status.st_size
        """The file's length when it was opened."""

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)

    def read(self, start: int, length: int) -> bytes:
        """Bytes [start, start + length), fewer at the file's end; takes no more memory than the file is long."""
        length = max(0, min(length, self.bytes - start))
        try:
            found = os.pread(self._descriptor, length, start)
            # One call gives 2 GiB at most.
            while len(found) < length and (more := os.pread(self._descriptor, length - len(found), start + len(found))):
                found += more
        except OSError as error:
            error.filename = self._path  # which a descriptor does not tell
            raise
        return found


class OpenFiles:
    """Files by their paths, each opened at its first reading.

    A pack and a store are read side by side, so the limit is that of the process (`SHARE`). Where descriptors run out
    all the same, all that is held is closed and the file opened again.
    """

    _all: ClassVar["weakref.WeakSet[OpenFiles]"] = weakref.WeakSet()
    _lock = threading.Lock()

    def __init__(self) -> None:
        self._held: dict[str, OpenFile] = {}
        with OpenFiles._lock:
            OpenFiles._all.add(self)

    def read(self, path: str, start: int, length: int) -> bytes:
        """As `OpenFile.read`. Raises OSError."""
        file = self._held.get(path)
        if file is None:
            file = _opened(path)
            with OpenFiles._lock:
                held = sum(len(files._held) for files in OpenFiles._all)
                if len(self._held) < MOST and held < _limit():
                    self._held[path] = file
        return file.read(start, length)

    def forget(self, path: str) -> None:
        """Opens the file anew at its next reading: another has taken its place."""
        self._held.pop(path, None)

    @classmethod
    def forget_all(cls) -> None:
        """Closes what is held and not being read just now."""
        with cls._lock:
            for files in cls._all:
                files._held.clear()


def _limit() -> int:
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return MOST if soft == resource.RLIM_INFINITY else max(16, soft // SHARE)


def _opened(path: str) -> OpenFile:
    try:
        return OpenFile(path)
    except OSError as error:
        if error.errno not in (errno.EMFILE, errno.ENFILE):
            raise
        OpenFiles.forget_all()
        return OpenFile(path)


_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOLCK, errno.EBADF)
"""What `flock` says on a file system that has no locks: Lustre without its option, some NFS and FUSE mounts."""
_NO_SYNC = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EBADF, errno.EACCES, errno.EPERM)
"""What opening or `fsync` of a folder says where folders cannot be synced: VirtualBox shares, some SMB and FUSE."""


def read_file(path: str | os.PathLike[str], most_bytes: int | None = None) -> bytes:
    """The whole of a plain file, or its first `most_bytes`. Raises OSError with the file's name."""
    file = OpenFile(path)
    return file.read(0, file.bytes if most_bytes is None else most_bytes)


def sync_folder(folder: str | os.PathLike[str]) -> None:
    """Puts a folder's names on disk: only then does a file that was renamed there outlive a power cut.

    Does nothing on a file system that cannot do it for folders.
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


def lock(descriptor: int, kind: int = fcntl.LOCK_EX) -> bool | None:
    """Asks for a lock (`fcntl.LOCK_EX` or `LOCK_SH`) on an open file, without waiting; it ends with the descriptor.

    True where it was given, False where another process's is in the way, None on a file system that has no locks.
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


def behind(url: str) -> tuple[Any, str]:
    """fsspec's file system of a URL (its methods), and the path in it.

    Raises UserError where the scheme is none of `SCHEMES`, the URL is a chain of several, or a library is missing.
    """
    scheme = url.partition("://")[0]
    if "::" in url or scheme not in SCHEMES:
        what = "chains of URLs" if "::" in url else f"{scheme} URLs"
        raise UserError(f"{url}: {what} are not opened, only {', '.join(SCHEMES)}; copy it to a local folder")
    import fsspec

    try:
        system, path = fsspec.url_to_fs(url)
    except (ValueError, ImportError) as error:
        raise UserError(f"{url}: {error}") from error
    return _FileSystem(system, url), path


class _FileSystem:
    """fsspec's, in which what a library raises for want of network or rights comes as an OSError, as on a disk."""

    def __init__(self, system: Any, url: str) -> None:
        self._system, self._url = system, url

    def pipe_file(self, path: str, data: bytes, **how: Any) -> None:
        """Writes a file, into a new folder where that is missing; a bucket that is missing is not made."""
        try:
            self._call("pipe_file", path, data, **how)
        except FileNotFoundError as error:
            if self._url.partition("://")[0] in _BUCKETS:  # its name may be misspelt
                raise FileNotFoundError(errno.ENOENT, f"there is no such bucket ({error})", self._url) from error
            self._call("makedirs", path.rpartition("/")[0], exist_ok=True)
            self._call("pipe_file", path, data, **how)

    def __getattr__(self, name: str) -> Any:
        return partial(self._call, name)

    def _call(self, name: str, *arguments: Any, **named: Any) -> Any:
        method = getattr(self._system, name)
        try:
            return method(*arguments, **named)
        except (OSError, TypeError, ValueError, NotImplementedError):
            raise
        except Exception as error:
            raise OSError(errno.EIO, f"{type(error).__name__}: {error}", self._url) from error
