"""What there is to pack: the images of a folder or of WebDataset tars, in one fixed order, with their labels.

Labels are the `.cls` members of a WebDataset tar, or the first folder of the path (after a folder that holds
everything; tars with a first folder in common count as one). Nothing is decoded here.
"""

import os
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from repcon.images.archives import HIDDEN, SUFFIXES, Found, Scan, add_tar, hidden, refusal
from repcon.images.format import MANIFEST
from repcon.runtime.errors import UserError

Folders = tuple[str, ...]
"""The folders of a file's path, from the outermost."""
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
        raise UserError(
            f"{source} is a pack already; to pack with other settings, name what it was made of; to add FFCV's file, "
            "give --ffcv and name the pack as OUT too"
        )
    scan = Scan()
    if path.is_dir():
        _folder(path, scan)
    elif path.suffix.lower() == ".tar":
        add_tar(path, path.name, scan)
    else:
        raise UserError(f"{source}: neither a folder nor a .tar")
    if not scan.found:
        why = f" ({_text(scan.left_out[0][0])}: {scan.left_out[0][1]})" if scan.left_out else ""
        raise UserError(f"{source}: holds no images{why}; known suffixes: {' '.join(sorted(SUFFIXES))}")
    labels = _labels(scan.found)
    classes = _classes(labels)
    numbers = {name: number for number, name in enumerate(classes)}
    keys: dict[str, int] = {}
    items: list[Item] = []
    for entry, label in zip(scan.found, labels, strict=True):
        name, number = _text(entry.name), numbers[label] if label else -1
        items.append(Item(name, _key(name, keys), entry.container, entry.offset, entry.length, number))
    left_out = [(_text(name), reason) for name, reason in scan.left_out]
    return Listing(items, classes, left_out, scan.identity.hexdigest())


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
        every, folders[:] = sorted(folders), []
        for folder in every:
            path = os.path.join(parent, folder)
            if _first(path, seen):
                folders.append(folder)
            else:
                scan.left_out.append((path[start:] + "/", "a folder that was read before, under another name"))
        for file in sorted(files):
            path = os.path.join(parent, file)
            name = path[start:]
            if name.lower().endswith(".tar"):
                if hidden(name):
                    scan.left_out.append((name, HIDDEN))
                else:
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
    scan.identify(f"{name}\0{status.st_size}\0{status.st_mtime_ns}")
    reason = refusal(name, status.st_size)
    if reason:
        scan.left_out.append((name, reason))
    else:
        scan.found.append(Found(name, path, 0, status.st_size, None))


def _labels(found: list[Found]) -> list[str | None]:
    """Each file's class name: its `.cls`, else its first folder below those that all of its set share."""
    folders: dict[str, set[Folders]] = {}
    for entry in found:
        folders.setdefault(_root(entry), set()).add(_folders(entry))
    depths = _depths(folders)
    labels: list[str | None] = []
    for entry in found:
        parts, depth = _folders(entry), depths[_root(entry)]
        folder = parts[depth] if len(parts) > depth else None
        labels.append((entry.label or None) if entry.label is not None else folder and _text(folder))
    return labels


def _folders(entry: Found) -> Folders:
    return tuple(entry.name.split("/")[:-1])


def _root(entry: Found) -> str:
    """Plain files (which start at 0, as no member of a tar does) have one root together, each tar has its own."""
    return entry.container if entry.offset else ""


def _depths(folders: dict[str, set[Folders]]) -> dict[str, int]:
    """How many folders stand above the classes, for each root.

    Tars that have a first folder in common are shards of one set. Of several sets, one whose images all lie in a
    single folder is a class by itself, named by its first folder.
    """
    joined: dict[str, str] = {}  # a first folder -> another one of its set, or itself

    def name_of(first: str) -> str:
        while joined[first] != first:
            joined[first] = joined[joined[first]]
            first = joined[first]
        return first

    names: dict[str, str] = {}
    for root, paths in folders.items():
        firsts = sorted({f"{bool(root):d}/{path[0]}" for path in paths if path}) or [root]
        for first in firsts:
            joined.setdefault(first, first)
            joined[name_of(first)] = name_of(firsts[0])
        names[root] = firsts[0]
    sets: dict[str, set[Folders]] = {}
    for root, paths in folders.items():
        sets.setdefault(name_of(names[root]), set()).update(paths)
    depths = {name: 0 if len(sets) > 1 and len(paths) == 1 else _shared_depth(paths) for name, paths in sets.items()}
    return {root: depths[name_of(name)] for root, name in names.items()}


def _shared_depth(paths: set[Folders]) -> int:
    """How many folders all paths share above a further folder."""
    depth = 0
    while all(len(path) > depth + 1 for path in paths) and len({path[depth] for path in paths}) == 1:
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
