"""Where claims on units lie: small files in a local folder or below a URL, each made by one claimant only."""

import contextlib
import errno
import os
from pathlib import Path

from repcon.runtime.atomic_files import create_exclusive, temporary_path, write_atomic
from repcon.runtime.local_files import read_file
from repcon.runtime.object_store import ObjectStore


class LocalClaims:
    """A folder; the file system makes `create` and `rename` atomic."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def create(self, name: str, data: bytes) -> bool:
        """Makes the file, whole at once; False where it exists already."""
        while True:
            self._folder.mkdir(parents=True, exist_ok=True)
            # Another process that ends may remove the empty folder in between: then once more.
            with contextlib.suppress(FileNotFoundError):
                return create_exclusive(self._folder / name, data)

    def read(self, name: str) -> bytes | None:
        """The content; None where there is no such file."""
        try:
            return read_file(self._folder / name)
        except FileNotFoundError:
            return None
        except OSError as error:
            if error.errno != errno.ESTALE:
                raise
            return read_file(self._folder / name)  # NFS: its owner replaced it just now; the new one is there

    def write(self, name: str, data: bytes) -> None:
        """Replaces the file, without a wait for the disk, which may be busy for longer than a claim lives."""
        write_atomic(self._folder / name, data, durable=False)

    def replace_dead(self, name: str, dead: bytes, data: bytes) -> bool:
        """Puts `data` in the place of the content `dead`; False where another heir was faster.

        It moves the dead claim aside, which only one of several heirs can do, and creates its own.
        """
        aside = temporary_path(self._folder / name)
        try:
            os.rename(self._folder / name, aside)
        except FileNotFoundError:
            return False
        held = read_file(aside)
        if held != dead:  # Another heir was faster, and this is its living claim: back with it.
            create_exclusive(self._folder / name, held)
        aside.unlink()
        return held == dead and self.create(name, data)

    def remove(self, name: str) -> None:
        """Removes the file if it is there."""
        (self._folder / name).unlink(missing_ok=True)

    def remove_folder(self) -> None:
        """Removes the folder if it is empty."""
        with contextlib.suppress(OSError):
            self._folder.rmdir()


class RemoteClaims:
    """As `LocalClaims`, objects below a URL; atomic where the store has conditional writes (S3 has)."""

    def __init__(self, url: str) -> None:
        """Raises UserError."""
        self._objects = ObjectStore(url)

    def create(self, name: str, data: bytes) -> bool:
        return self._objects.create(name, data)

    def read(self, name: str) -> bytes | None:
        try:
            return self._objects.read(name)
        except FileNotFoundError:
            return None

    def write(self, name: str, data: bytes) -> None:
        self._objects.write(name, data)

    def replace_dead(self, name: str, dead: bytes, data: bytes) -> bool:
        return self._objects.replace(name, dead, data)

    def remove(self, name: str) -> None:
        self._objects.delete(name)

    def remove_folder(self) -> None:
        """Object stores have no folders."""


def open_claims(folder: str) -> LocalClaims | RemoteClaims:
    """The claims in a local folder, or below a URL."""
    return RemoteClaims(folder) if "://" in folder else LocalClaims(Path(folder))
