"""A pack's files, on a disk or behind a URL, read whole or by range."""

import os
import threading
from pathlib import Path
from typing import Any, Protocol

import fsspec

OPEN_SHARDS = 256
"""Local shards that a pack keeps open; of further ones each read opens the file again."""


class Files(Protocol):
    """A pack's files, wherever they lie. Raises OSError."""

    def whole(self, name: str) -> bytes: ...
    def part(self, name: str, offset: int, length: int) -> bytes: ...


class LocalFiles:
    """Files below a folder; `pread` needs no lock, and never asks for more memory than the file is long."""

    def __init__(self, root: str) -> None:
        self._root, self._lock = root, threading.Lock()
        self._open: dict[str, int] = {}

    def whole(self, name: str) -> bytes:
        return Path(self._root, name).read_bytes()

    def part(self, name: str, offset: int, length: int) -> bytes:
        descriptor, keep = self._descriptor(name)
        try:
            room = os.fstat(descriptor).st_size - offset
            return os.pread(descriptor, max(0, min(length, room)), offset)
        finally:
            if not keep:
                os.close(descriptor)

    def _descriptor(self, name: str) -> tuple[int, bool]:
        """A descriptor, and whether it stays open."""
        with self._lock:
            if name in self._open:
                return self._open[name], True
            descriptor = os.open(os.path.join(self._root, name), os.O_RDONLY)
            keep = len(self._open) < OPEN_SHARDS
            if keep:
                self._open[name] = descriptor
            return descriptor, keep

    def __del__(self) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)


class RemoteFiles:
    """Files below an fsspec URL, read by range."""

    def __init__(self, system: Any, root: str) -> None:
        self._system, self._root = system, root.rstrip("/")

    def whole(self, name: str) -> bytes:
        return self._system.cat_file(f"{self._root}/{name}")

    def part(self, name: str, offset: int, length: int) -> bytes:
        return self._system.cat_file(f"{self._root}/{name}", start=offset, end=offset + length)


def files_below(url: str) -> tuple[Files, str]:
    """How the files below `url` are read, and the pack's name wherever the process may stand."""
    if "://" not in url:
        return LocalFiles(os.path.abspath(url)), os.path.abspath(url)
    system, root = fsspec.core.url_to_fs(url)
    return (LocalFiles(root), root) if url.startswith(("file://", "local://")) else (RemoteFiles(system, root), url)
