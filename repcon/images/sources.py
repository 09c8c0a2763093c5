"""What there is to pack: the images of a folder, of WebDataset tars or of Parquet files, in one fixed order, labelled.

Nothing is decoded here.
"""

import os
import stat
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from repcon.images import hub
from repcon.images.archives import Found, Scan, add_tar, leave_out, unreadable
from repcon.images.format import MANIFEST
from repcon.images.labels import resolve
from repcon.images.names import ARCHIVE, HIDDEN, SUFFIXES, bytes_of, hidden, readable, refusal
from repcon.images.parquet import SUFFIX as PARQUET
from repcon.images.parquet import add_parquet
from repcon.runtime.errors import UserError
from repcon.runtime.open_files import OpenFile

_COMPRESSED = (".tar.gz", ".tgz", ".tar.xz", ".tar.bz2", ".tar.zst", ".zip")


@dataclass(frozen=True, slots=True)
class Item:
    """One image file that is to be packed."""

    name: str
    """Path below the source, or inside the tar, with `/`; valid UTF-8."""
    key: str
    """Its name in the pack: the path without suffix and without dots, unique."""
    container: str
    """The file that holds its bytes: itself or a tar."""
    offset: int
    length: int
    label: int
    """-1 where unlabelled."""
    column: str = ""
    """Of a Parquet row: the column that holds its image; `offset` is then the row's number."""


@dataclass(frozen=True, slots=True)
class Listing:
    """Everything found in a source."""

    items: list[Item]
    classes: tuple[str, ...]
    left_out: list[tuple[str, str]]
    """(name, reason) of the files that are no images."""
    identity: str
    """Changes with the name, size or time of change of any file that is packed."""
    cautions: tuple[str, ...] = ()
    """One line each: how the labels were found, and what looks like a mistake."""


def read(source: str) -> Listing:
    """Lists a folder of images, tars or Parquet files, one such file, or a dataset of the Hugging Face hub.

    Raises UserError where there is nothing to pack.
    """
    if hub.is_dataset(source):
        held = hub.download(source)
        return replace(read(str(held.folder)), identity=held.identity)
    path = Path(source)
    if "://" in source:
        raise UserError(
            f"{source}: images are packed from local folders, tars and Parquet files, and hf://datasets/OWNER/NAME; "
            "copy them here first"
        )
    if not path.exists():
        raise UserError(
            f"{source}: no such folder or tar; name an image folder, a .tar, a .parquet, or a folder of such files"
        )
    if path.name.endswith(_COMPRESSED):
        raise UserError(f"{source}: compressed archives cannot be read by offset; unpack it to a .tar or a folder")
    if (path / MANIFEST).is_file():
        raise UserError(
            f"{source} is a pack already; to pack with other settings, name what it was made of; to add FFCV's file, "
            "give --ffcv and name the pack as OUT too"
        )
    scan = Scan()
    if path.is_dir():
        _folder(path, scan)
    elif path.suffix.lower() == ".tar":
        add_tar(path, bytes_of(path.name), scan)
    elif path.suffix.lower() == PARQUET:
        add_parquet(path, bytes_of(path.name), scan)
    else:
        raise UserError(f"{source}: neither a folder nor a .tar or .parquet")
    if not scan.found:
        raise _no_images(source, scan)
    labels = resolve(scan)
    keys: dict[str, int] = {}
    items: list[Item] = []
    for entry, number in zip(scan.found, labels.numbers, strict=True):
        key = _key(entry.name.encode("utf-8", "surrogateescape").decode("utf-8", "replace"), keys)
        name, place = readable(entry.name), (entry.container, entry.offset, entry.length)
        items.append(Item(name, key, *place, number, entry.column))
    left_out = [(readable(name), readable(reason)) for name, reason in scan.left_out]
    return Listing(items, labels.classes, left_out, scan.identity.hexdigest(), labels.cautions)


def _no_images(source: str, scan: Scan) -> UserError:
    archives = [readable(name) for name, reason in scan.left_out if reason == ARCHIVE]
    if archives:
        few = ", ".join(archives[:3]) + (", …" if len(archives) > 3 else "")
        return UserError(f"{source}: holds no images but archives ({few}); unpack the outer one and name its folder")
    why = f" ({readable(scan.left_out[0][0])}: {readable(scan.left_out[0][1])})" if scan.left_out else ""
    return UserError(f"{source}: holds no images{why}; known suffixes: {' '.join(sorted(SUFFIXES))}")


def contents(item: Item) -> bytes:
    """A file's or a member's bytes as they lie in the source. Raises OSError, also where the file became shorter."""
    data = OpenFile(item.container).read(item.offset, item.length)
    if len(data) != item.length:
        raise OSError(None, f"{len(data)} of {item.length} bytes are left")
    return data


def _folder(root: Path, scan: Scan) -> None:
    """Walks in sorted order, through links to folders, each real folder once.

    Raises UserError where a folder that is not hidden cannot be read: nobody knows how many images it holds.
    """
    seen = {os.path.realpath(root)}
    start = len(os.path.join(root, ""))
    waiting = [str(root)]
    while waiting:
        parent = waiting.pop()
        below: list[str] = []
        folders, files = _entries(parent, parent[start:])
        for path in folders:
            if _first(path, seen):
                below.append(path)
            else:
                name = bytes_of(path[start:]) + "/"
                scan.left_out.append((name, "a folder that was read before, under another name"))
        for path in files:
            _file(path, bytes_of(path[start:]), scan)
        waiting += reversed(below)


def _entries(folder: str, name: str) -> tuple[list[str], list[str]]:
    """The paths of the folders and of the files in a folder, each sorted by the names' bytes."""
    folders: list[str] = []
    files: list[str] = []
    try:
        with os.scandir(folder) as entries:
            for entry in sorted(entries, key=lambda entry: bytes_of(entry.name)):
                (folders if _is_folder(entry) else files).append(os.path.join(folder, entry.name))
    except OSError as error:
        if not (name and hidden(bytes_of(name))):
            raise unreadable(folder, error) from error
    return folders, files


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # which its own reading will tell
        return False


def _first(folder: str, seen: set[str]) -> bool:
    """Whether the folder is new, by its real path; it is not new again."""
    real = os.path.realpath(folder)
    new = real not in seen
    seen.add(real)
    return new


def _file(path: str, name: str, scan: Scan) -> None:
    if hidden(name):
        scan.left_out.append((name, HIDDEN))
        return
    if name.lower().endswith(".tar"):
        add_tar(Path(path), name, scan)
        return
    if name.lower().endswith(PARQUET):
        add_parquet(Path(path), name, scan)
        return
    reason = refusal(name, 1)
    if reason:
        scan.left_out.append((name, reason))
        return
    try:
        status = os.stat(path)
    except OSError as error:
        leave_out(scan, path, name, error)
        return
    reason = refusal(name, status.st_size) if stat.S_ISREG(status.st_mode) else "not a plain file"
    if reason:
        scan.left_out.append((name, reason))
    else:
        scan.identify(f"{name}\0{status.st_size}\0{status.st_mtime_ns}")
        scan.found.append(Found(name, path, 0, status.st_size, None))


def _key(name: str, taken: dict[str, int]) -> str:
    """A WebDataset key: no dot in the file's name (it would start the suffix), and unique.

    taken: every key so far, with the last number that was given to its doubles.
    """
    path = PurePosixPath(name)
    key = base = (path.parent / path.stem.replace(".", "_")).as_posix()
    while key in taken:
        taken[base] = taken.get(base, 1) + 1
        key = f"{base}~{taken[base]}"
    taken[key] = 1
    return key
