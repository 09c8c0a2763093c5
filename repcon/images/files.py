"""A pack's files, on a disk or behind a URL, read whole or by range."""

import errno
import os
from typing import Any, Protocol

from repcon.runtime.open_files import OpenFile, OpenFiles, behind


class Files(Protocol):
    """A pack's files, wherever they lie. Raises OSError."""

    def whole(self, name: str, most: int) -> bytes:
        """All of the file's bytes; a file of a stranger's that is longer than `most` raises OSError."""
        ...

    def part(self, name: str, offset: int, length: int) -> bytes:
        """Bytes [offset, offset + length), fewer at the file's end."""
        ...


class LocalFiles:
    """Files below a folder."""

    def __init__(self, root: str) -> None:
        self._root, self._open = root, OpenFiles()

    def whole(self, name: str, most: int) -> bytes:
        file = OpenFile(f"{self._root}/{name}")
        _require_at_most(file.bytes, most, name)
        return file.read(0, file.bytes)

    def part(self, name: str, offset: int, length: int) -> bytes:
        return self._open.read(f"{self._root}/{name}", offset, length)


class RemoteFiles:
    """Files below an fsspec URL, read by range."""

    def __init__(self, system: Any, root: str) -> None:
        self._system, self._root = system, root.rstrip("/")

    def whole(self, name: str, most: int) -> bytes:
        _require_at_most(int(self._system.info(f"{self._root}/{name}")["size"]), most, name)
        return self._system.cat_file(f"{self._root}/{name}")

    def part(self, name: str, offset: int, length: int) -> bytes:
        return self._system.cat_file(f"{self._root}/{name}", start=offset, end=offset + length)


def _require_at_most(size: int, most: int, name: str) -> None:
    if size > most:
        raise OSError(errno.EFBIG, f"{name} has {size:,} bytes, of which at most {most:,} are read")


def files_below(url: str) -> tuple[Files, str]:
    """How the files below `url` are read, and the pack's name wherever the process may stand. Raises UserError."""
    if "://" not in url:
        return LocalFiles(os.path.abspath(url)), os.path.abspath(url)
    system, root = behind(url)
    return (LocalFiles(root), root) if url.startswith(("file://", "local://")) else (RemoteFiles(system, root), url)
