"""What there is to pack: the images of a folder or of WebDataset tars, in one fixed order, with their labels.

Labels are the `.cls` members of a WebDataset tar, or the first folder of the path (after a folder that holds
everything). Nothing is decoded here.
"""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from repcon.errors import UserError
from repcon.packs.archives import SUFFIXES, Found, Scan, add_tar, refusal

MANIFEST = "pack.json"
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


@dataclass(frozen=True, slots=True)
class Listing:
    """Everything found in a source."""

    items: list[Item]
    classes: tuple[str, ...]
    left_out: list[tuple[str, str]]
    """(name, reason) of the files that are no images."""
    identity: str
    """Changes with any file's name, size or time of change."""


def read(source: str) -> Listing:
    """Lists a folder of images, a folder of tars, or one tar. Raises UserError where there is nothing to pack."""
    path = Path(source)
    if "://" in source:
        raise UserError(f"{source}: images are packed from local folders and tars; copy them here first")
    if not path.exists():
        raise UserError(f"{source}: no such folder or tar; name an image folder, a .tar, or a folder of .tar files")
    if path.name.endswith(_COMPRESSED):
        raise UserError(f"{source}: compressed archives cannot be read by offset; unpack it to a .tar or a folder")
    if (path / MANIFEST).is_file():
        raise UserError(f"{source} is a pack already; to pack with other settings, name what it was made of")
    scan = Scan()
    if path.is_dir():
        _folder(path, scan)
    elif path.suffix == ".tar":
        add_tar(path, path.name, scan)
    else:
        raise UserError(f"{source}: neither a folder nor a .tar")
    if not scan.found:
        why = f" ({_text(scan.left_out[0][0])}: {scan.left_out[0][1]})" if scan.left_out else ""
        raise UserError(f"{source}: holds no images{why}; known suffixes: {' '.join(sorted(SUFFIXES))}")
    identity = hashlib.sha256("\n".join(scan.identity).encode("utf-8", "surrogateescape")).hexdigest()
    labels = _labels(scan.found)
    classes = _classes(labels)
    numbers = {name: number for number, name in enumerate(classes)}
    keys: set[str] = set()
    items: list[Item] = []
    for entry, label in zip(scan.found, labels, strict=True):
        name, number = _text(entry.name), numbers[label] if label else -1
        items.append(Item(name, _key(name, keys), entry.container, entry.offset, entry.length, number))
    left_out = [(_text(name), reason) for name, reason in scan.left_out]
    return Listing(items, classes, left_out, identity)


def contents(item: Item) -> bytes:
    """The item's bytes as they lie in the source. Raises OSError, also where the file has become shorter."""
    with open(item.container, "rb") as file:
        file.seek(item.offset)
        data = file.read(item.length)
    if len(data) != item.length:
        raise OSError(None, f"{len(data)} of {item.length} bytes are left")
    return data


def _folder(root: Path, scan: Scan) -> None:
    """Walks in sorted order, through links to folders, each real folder once."""
    seen = {os.path.realpath(root)}
    start = len(os.path.join(root, ""))

    def lost(error: OSError) -> None:
        scan.left_out.append((str(error.filename)[start:] + "/", f"cannot be read: {error.strerror}"))

    for parent, folders, files in os.walk(root, onerror=lost, followlinks=True):
        folders[:] = [name for name in sorted(folders) if _first(os.path.join(parent, name), seen)]
        for file in sorted(files):
            path = os.path.join(parent, file)
            name = path[start:]
            if name.endswith(".tar"):
                add_tar(Path(path), name, scan)
            else:
                _file(path, name, scan)


def _first(folder: str, seen: set[str]) -> bool:
    """Whether the folder is new, by its real path; it is not new again."""
    real = os.path.realpath(folder)
    new = real not in seen
    seen.add(real)
    return new


def _file(path: str, name: str, scan: Scan) -> None:
    try:
        status = os.stat(path)
    except OSError as error:
        scan.left_out.append((name, f"cannot be read: {error.strerror}"))
        return
    scan.identity.append(f"{name}\0{status.st_size}\0{status.st_mtime_ns}")
    reason = refusal(name, status.st_size)
    if reason:
        scan.left_out.append((name, reason))
    else:
        scan.found.append(Found(name, path, 0, status.st_size, None))


def _labels(found: list[Found]) -> list[str | None]:
    """Each file's class name: its `.cls`, else its first folder below the folder that all of them share."""
    groups: dict[str, list[list[str]]] = {}
    for entry in found:
        groups.setdefault(_group(entry), []).append(entry.name.split("/"))
    depths = {group: _shared_depth(paths) for group, paths in groups.items()}
    labels: list[str | None] = []
    for entry in found:
        parts, depth = entry.name.split("/"), depths[_group(entry)]
        folder = parts[depth] if len(parts) > depth + 1 else None
        labels.append((entry.label or None) if entry.label is not None else folder and _text(folder))
    return labels


def _group(entry: Found) -> str:
    """Each tar has its own shared folder; plain files (which start at 0, as no member does) have one together."""
    return entry.container if entry.offset else ""


def _shared_depth(paths: list[list[str]]) -> int:
    """How many folders all paths share above a further folder."""
    depth = 0
    while all(len(parts) > depth + 2 and parts[depth] == paths[0][depth] for parts in paths):
        depth += 1
    return depth


def _text(name: str) -> str:
    """A file's name as valid UTF-8."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _classes(labels: list[str | None]) -> tuple[str, ...]:
    """Sorted; by value where every name is a number, as in `.cls` files."""
    names = {label for label in labels if label}
    numeric = all(name.isascii() and name.isdigit() for name in names)
    return tuple(sorted(names, key=(lambda name: (int(name), name)) if numeric else None))


def _key(name: str, taken: set[str]) -> str:
    """A WebDataset key: no dot in the file's name (it would start the suffix), and unique."""
    path = PurePosixPath(name)
    stem = path.stem.replace(".", "_")
    key = base = (path.parent / stem).as_posix()
    number = 1
    while key in taken:
        number += 1
        key = f"{base}~{number}"
    taken.add(key)
    return key
