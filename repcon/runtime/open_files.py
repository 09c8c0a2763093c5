"""Local files that are read by range, over and over, from several threads: a bounded number of them stays open.

Opening costs as much as reading some tens of kilobytes, and each system call hands the interpreter's lock to another
thread, which the caller then has to wait for. And folders on disk, and the file system behind a URL.
"""

import errno
import os
import resource
from functools import partial
from typing import Any

from repcon.runtime.errors import UserError

MOST = min(4096, max(128, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4))
"""Files that stay open at most, per `OpenFiles`; of further ones each reading opens the file again."""
_BUCKETS = ("s3", "s3a", "gs", "gcs", "abfs", "abfss", "az")
"""Schemes without folders, whose first name is a bucket's."""
SCHEMES = ("file", "local", "memory", "http", "https", *_BUCKETS)
"""The schemes that are opened. fsspec knows others that read further URLs, or run code, that a file names."""


class OpenFile:
    """A file that is closed once nobody holds it, so never under a thread that reads it."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Raises OSError."""
        self._path = str(path)
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.bytes = os.fstat(self._descriptor).st_size
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
    """Files by their paths, each opened at its first reading."""

    def __init__(self) -> None:
        self._held: dict[str, OpenFile] = {}

    def read(self, path: str, start: int, length: int) -> bytes:
        """As `OpenFile.read`. Raises OSError."""
        file = self._held.get(path)
        if file is None:
            file = OpenFile(path)
            if len(self._held) < MOST:
                self._held[path] = file
        return file.read(start, length)

    def forget(self, path: str) -> None:
        """Opens the file anew at its next reading: another has taken its place."""
        self._held.pop(path, None)


def sync_folder(folder: str | os.PathLike[str]) -> None:
    """Puts a folder's names on disk: only then does a file that was renamed there outlive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
