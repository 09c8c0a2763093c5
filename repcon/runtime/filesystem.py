"""Where a store's bytes live: a local folder, or any file system that fsspec opens by URL.

Local writes are durable and whole: temporary file, fsync, rename, fsync of the folder. What a killed writer left
is known by its name and by its lock, which died with it: `sweep` takes no living writer's file, and none of others.
"""

import contextlib
import errno
import os
import re
import time
import uuid
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, Protocol

from repcon.runtime.errors import UserError
from repcon.runtime.open_files import OpenFile, OpenFiles, behind, lock, sync_folder

_TEMPORARY = re.compile(r"\.[A-Za-z0-9_][A-Za-z0-9_.\-]*\.[0-9a-f]{32}\.repcon\.tmp")
"""How a file that is being written is called: nothing else is ever swept away."""
_DAY_SECONDS = 86_400.0
_NOT_THERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
_SAFE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*(/[A-Za-z0-9_][A-Za-z0-9_.\-]*)*")


class Files(Protocol):
    """Files below one root; names are relative and use `/`."""

    root: str

    def read(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        """Bytes [start, start + length), fewer at the end of the file. Raises FileNotFoundError."""
        ...

    def part(self, name: str, start: int, length: int) -> bytes:
        """`read`, for a file that others never replace, such as a shard: it may stay open."""
        ...

    def size(self, name: str) -> int | None:
        """Bytes in the file, None where there is none."""
        ...

    def names(self, folder: str) -> list[str]:
        """What lies directly in the folder, sorted; empty where there is none. Locally without what begins with a dot:
        files that are being written."""
        ...

    def unsafe_names(self, folder: str) -> list[str]:
        """What lies there under names that are not `is_safe`, and what lies in folders of such names: `a b/zarr.json`.
        Files that are being written are left out."""
        ...

    def write(self, name: str, data: bytes, require: Callable[[], object] | None = None) -> None:
        """Puts the whole file in place at once, replacing what was there. `require` is called just before that, and may
        raise: locally once the file is complete under its temporary name, which `withdraw` of another process takes
        away, so that nothing can be put in place between a `withdraw` and the next call."""
        ...

    def withdraw(self, names: Collection[str]) -> None:
        """Keeps other processes from putting in place what they are writing under these names (of files, in any
        folder). Where writes have no temporary file, as behind a URL, it does nothing."""
        ...

    def delete(self, name: str) -> None:
        """Removes the file if it is there."""
        ...

    def sweep(self) -> None:
        """Removes what killed writers left behind, and no other file."""
        ...


def open_files(url: str) -> Files:
    """A path, `file://`, or anything that fsspec opens: `memory://`, `s3://`, ..."""
    scheme, separator, path = url.partition("://")
    if not separator:
        return LocalFiles(Path(url))
    if scheme in ("file", "local"):
        return LocalFiles(Path(path))
    return UrlFiles(url, *behind(url))


def is_safe(name: str) -> bool:
    """Whether the name cannot leave the root: no `..`, nothing absolute, no odd characters."""
    return bool(_SAFE_NAME.fullmatch(name)) and ".." not in name


def safe(name: str) -> str:
    """The name, if `is_safe`. Raises UserError."""
    if not is_safe(name):
        raise UserError(f"file name {name!r} is not one that a store may use")
    return name


class LocalFiles:
    """Files in a local folder; a link that leads out of the folder is refused."""

    def __init__(self, root: Path) -> None:
        self.root = str(root)
        self._root = root
        self._checked: dict[str, Path] = {}
        self._open = OpenFiles()

    def read(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        file = OpenFile(self._inside(name))
        return file.read(start, file.bytes if length is None else length)

    def part(self, name: str, start: int, length: int) -> bytes:
        return self._open.read(str(self._inside(name)), start, length)

    def size(self, name: str) -> int | None:
        try:
            return os.stat(self._inside(name)).st_size
        except OSError as error:
            if error.errno in _NOT_THERE:
                return None
            raise

    def names(self, folder: str) -> list[str]:
        try:
            return sorted(entry for entry in os.listdir(self._inside(folder)) if not entry.startswith("."))
        except OSError as error:
            if error.errno in _NOT_THERE:
                return []
            raise

    def unsafe_names(self, folder: str) -> list[str]:
        found: list[str] = []
        with contextlib.suppress(OSError):
            for name in sorted(os.listdir(self._inside(folder))):
                if not is_safe(name) and not _TEMPORARY.fullmatch(name):
                    found.append(name)
                    with contextlib.suppress(OSError):  # no folder
                        found += [f"{name}/{inner}" for inner in os.listdir(Path(self._inside(folder), name))]
        return found

    def write(self, name: str, data: bytes, require: Callable[[], object] | None = None) -> None:
        path = self._inside(name)
        try:
            _make_folders(path.parent)
            # A sweep may take the temporary file in the instant before it is locked: then it is written again.
            while not _replace(path, data, require):
                pass
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
            sync_folder(path.parent)
        self._open.forget(str(path))

    def withdraw(self, names: Collection[str]) -> None:
        for path in self._temporary():
            if path.name[1:].rsplit(".", 3)[0] in names:
                path.unlink(missing_ok=True)

    def sweep(self) -> None:
        for path in self._temporary():
            with contextlib.suppress(OSError):
                _remove_abandoned(path)

    def _temporary(self) -> Iterator[Path]:
        for folder, _, names in os.walk(self._root):
            yield from (Path(folder, name) for name in filter(_TEMPORARY.fullmatch, names))

    def _inside(self, name: str) -> Path:
        """Where the file lies. A name is checked once: `realpath` costs more than a read."""
        if name not in self._checked:
            path = self._root / safe(name) if name else self._root
            if name and not os.path.realpath(path).startswith(os.path.realpath(self._root) + os.sep):
                raise UserError(f"{path} is a link that leads out of {self._root}; a store holds its own files only")
            self._checked[name] = path
        return self._checked[name]


def _make_folders(folder: Path) -> None:
    """Like mkdir -p, with the parents fsynced, so that the new folders outlive a power cut."""
    if folder.is_dir():
        return
    _make_folders(folder.parent)
    folder.mkdir(exist_ok=True)
    sync_folder(folder.parent)


def _replace(path: Path, data: bytes, require: Callable[[], object] | None) -> bool:
    """One durable write; False when the temporary file was swept away before it was locked, or withdrawn."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.repcon.tmp")
    try:
        with temporary.open("xb") as file:
            if lock(file.fileno()) is False:
                return False
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            if require is not None:
                require()
            try:
                os.replace(temporary, path)
            except FileNotFoundError:
                return False
        sync_folder(path.parent)
        return True
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _remove_abandoned(temporary: Path) -> None:
    """Removes the file unless its writer lives; where locks do not tell, once it has not changed for a day."""
    descriptor = os.open(temporary, os.O_RDWR | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        free = lock(descriptor)
        if free or (free is None and time.time() - os.fstat(descriptor).st_mtime > _DAY_SECONDS):
            temporary.unlink()
    finally:
        os.close(descriptor)


class UrlFiles:
    """Files below a URL; object stores put each object in place whole."""

    def __init__(self, url: str, file_system: Any, root: str) -> None:
        self.root = url
        self._files = file_system
        self._root = root.rstrip("/")

    def read(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        end = None if length is None else start + length
        return self._files.cat_file(self._path(name), start=start, end=end)

    def part(self, name: str, start: int, length: int) -> bytes:
        return self.read(name, start, length)

    def size(self, name: str) -> int | None:
        self._files.invalidate_cache()
        try:
            return int(self._files.info(self._path(name))["size"])
        except FileNotFoundError:
            return None

    def names(self, folder: str) -> list[str]:
        self._files.invalidate_cache()
        try:
            found = self._files.ls(self._path(folder), detail=False)
        except FileNotFoundError:
            return []
        return sorted(path.rstrip("/").rsplit("/", 1)[-1] for path in found)

    def unsafe_names(self, folder: str) -> list[str]:
        found: list[str] = []
        for name in self.names(folder):
            if not is_safe(name):
                found.append(name)
                with contextlib.suppress(OSError):
                    held = self._files.ls(f"{self._path(folder)}/{name}", detail=False)
                    found += [f"{name}/{path.rstrip('/').rsplit('/', 1)[-1]}" for path in held]
        return found

    def write(self, name: str, data: bytes, require: Callable[[], object] | None = None) -> None:
        if require is not None:
            require()
        try:
            self._files.pipe_file(self._path(name), data)
        except OSError as error:
            raise UserError(f"{self.root}/{name}: cannot write ({error})") from error

    def delete(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._files.rm_file(self._path(name))

    def withdraw(self, names: Collection[str]) -> None:
        """An object is in place as soon as it is written."""

    def sweep(self) -> None:
        """Nothing is left behind: an object appears whole or not at all."""

    def _path(self, name: str) -> str:
        return f"{self._root}/{safe(name)}" if name else self._root
