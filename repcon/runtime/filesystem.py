"""Files below a local folder or a URL: one interface, `FileSystem`, opened by `open_filesystem`.

Local writes are durable and atomic. Object stores replace objects atomically.
"""

import contextlib
import errno
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Protocol

from repcon.runtime import atomic_files
from repcon.runtime.atomic_files import fsync_folder, write_atomic
from repcon.runtime.errors import UserError
from repcon.runtime.local_files import OpenFile, OpenFileCache, error_reason
from repcon.runtime.object_store import ObjectStore

_NOT_THERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
_SAFE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*(/[A-Za-z0-9_][A-Za-z0-9_.\-]*)*")


class RangeReader(Protocol):
    """Files that are read by range."""

    def read_range(self, name: str, start: int, length: int) -> bytes:
        """Bytes [start, start + length) of a file that nobody replaces, such as a shard: it may stay open.

        Gives fewer at the end of the file. Raises OSError.
        """
        ...


class FileSystem(ABC):
    """Files below one root; names are relative and use `/`."""

    root: str

    @abstractmethod
    def read(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        """Bytes [start, start + length), fewer at the end of the file. Raises FileNotFoundError."""

    def read_range(self, name: str, start: int, length: int) -> bytes:
        """As `RangeReader.read_range`."""
        return self.read(name, start, length)

    @abstractmethod
    def size(self, name: str) -> int | None:
        """Bytes in the file, None where there is none."""

    @abstractmethod
    def list_names(self, folder: str) -> list[str]:
        """Names directly in the folder, sorted; empty where there is none.

        Locally without those that begin with a dot: files that are being written.
        """

    def list_unsafe_names(self, folder: str) -> list[str]:
        """Names in the folder that are not `is_safe_name`, and those in folders of such names: `a b/zarr.json`.

        Files that are being written are left out; a folder that does not exist has none. Raises OSError where the
        folder cannot be listed.
        """
        found: list[str] = []
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            for name in sorted(self._list(folder)):
                if not is_safe_name(name) and not atomic_files.is_temporary(name):
                    found.append(name)
                    with contextlib.suppress(OSError):  # not a folder
                        found += [f"{name}/{inner}" for inner in self._list(folder, name)]
        return found

    @abstractmethod
    def _list(self, folder: str, inner: str = "") -> list[str]:
        """All names in the folder, or in the folder `inner` in it, whose name may be unsafe. Raises OSError."""

    @abstractmethod
    def write(self, name: str, data: bytes, check: Callable[[], object] = lambda: None) -> None:
        """Writes the whole file at once, in place of an earlier one. Raises UserError.

        check: called just before the file appears; an error that it raises cancels the write. Locally it is called once
        the temporary file is complete, so that no write goes through between `cancel_writes` and the next check.
        """

    @abstractmethod
    def delete(self, name: str) -> None:
        """Deletes the file if it is there."""

    def cancel_writes(self, names: Collection[str]) -> None:  # noqa: B027
        """Keeps other processes from finishing writes of files of these names, in any folder, without another check.

        Does nothing behind a URL, where an object is in place as soon as it is written.
        """

    def remove_abandoned(self) -> None:  # noqa: B027
        """Deletes the temporary files of killed writers, and no other file; behind a URL there are none."""


def open_filesystem(url: str, *, follow_links: bool = False) -> FileSystem:
    """Opens a path, `file://`, or a URL of one of `object_client.SCHEMES`, for example `s3://bucket/folder`.

    follow_links: read files of a local folder also through links that lead out of it. Raises UserError.
    """
    scheme, separator, path = url.partition("://")
    if not separator or scheme in ("file", "local"):
        return LocalFileSystem(Path(path if separator else url), follow_links=follow_links)
    return UrlFileSystem(url)


def is_safe_name(name: str) -> bool:
    """Whether the name cannot leave the root: no `..`, nothing absolute, no odd characters."""
    return bool(_SAFE_NAME.fullmatch(name)) and ".." not in name


def require_safe_name(name: str) -> str:
    """The name, if `is_safe_name`. Raises UserError."""
    if not is_safe_name(name):
        raise UserError(f"file name {name!r} is not one that a store may use")
    return name


class LocalFileSystem(FileSystem):
    """Files in a local folder; a link that leads out of the folder is refused unless `follow_links`."""

    def __init__(self, root: Path, *, follow_links: bool = False) -> None:
        self.root = str(root)
        self._root, self._follow_links = root, follow_links
        self._checked: dict[str, Path] = {}
        self._open = OpenFileCache()

    def read(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        file = OpenFile(self._inside(name))
        return file.read(start, file.bytes if length is None else length)

    def read_range(self, name: str, start: int, length: int) -> bytes:
        return self._open.read(str(self._inside(name)), start, length)

    def size(self, name: str) -> int | None:
        try:
            return os.stat(self._inside(name)).st_size
        except OSError as error:
            if error.errno in _NOT_THERE:
                return None
            raise

    def list_names(self, folder: str) -> list[str]:
        try:
            return sorted(entry for entry in self._list(folder) if not entry.startswith("."))
        except OSError as error:
            if error.errno in _NOT_THERE:
                return []
            raise

    def _list(self, folder: str, inner: str = "") -> list[str]:
        return os.listdir(Path(self._inside(folder), inner))

    def write(self, name: str, data: bytes, check: Callable[[], object] = lambda: None) -> None:
        path = self._inside(name)
        try:
            _make_folders(path.parent)
            write_atomic(path, data, check)
            self._open.forget(str(path))
        except OSError as error:
            kept = "what was finished is kept, the same command goes on from there"
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise UserError(f"{path}: the disk is full ({error.strerror}); make room: {kept}") from error
            raise UserError(f"{path}: cannot write ({error.strerror}); {kept}") from error

    def delete(self, name: str) -> None:
        path = self._inside(name)
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            path.unlink()
            fsync_folder(path.parent)
        self._open.forget(str(path))

    def cancel_writes(self, names: Collection[str]) -> None:
        atomic_files.cancel_writes(self._root, names)

    def remove_abandoned(self) -> None:
        atomic_files.remove_abandoned(self._root)

    def _inside(self, name: str) -> Path:
        """The file's path. A name is checked once: `realpath` costs more than a read."""
        if name not in self._checked:
            path = self._root / require_safe_name(name) if name else self._root
            inside = os.path.realpath(path).startswith(os.path.realpath(self._root) + os.sep)
            if name and not inside and not self._follow_links:
                raise UserError(f"{path} is a link that leads out of {self._root}; a store holds its own files only")
            self._checked[name] = path
        return self._checked[name]


def _make_folders(folder: Path) -> None:
    """Like mkdir -p, with the parents fsynced, so that the new folders outlive a power cut."""
    if folder.is_dir():
        return
    _make_folders(folder.parent)
    folder.mkdir(exist_ok=True)
    fsync_folder(folder.parent)


class UrlFileSystem(FileSystem):
    """Objects below a URL."""

    def __init__(self, url: str) -> None:
        self.root = url
        self._objects = ObjectStore(url)

    def read(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        return self._objects.read(require_safe_name(name), start, length)

    def size(self, name: str) -> int | None:
        return self._objects.size(require_safe_name(name))

    def list_names(self, folder: str) -> list[str]:
        try:
            return self._list(folder)
        except FileNotFoundError:
            return []

    def _list(self, folder: str, inner: str = "") -> list[str]:
        folder = require_safe_name(folder) if folder else ""
        return self._objects.list_names(f"{folder}/{inner}" if inner else folder)

    def write(self, name: str, data: bytes, check: Callable[[], object] = lambda: None) -> None:
        check()
        try:
            self._objects.write(require_safe_name(name), data)
        except OSError as error:
            raise UserError(f"{self.root}/{name}: cannot write ({error_reason(error)})") from error

    def delete(self, name: str) -> None:
        self._objects.delete(require_safe_name(name))
