"""What there is to pack: the images of a folder or of WebDataset tars, in one fixed order, with their labels.

Labels are the `.cls` members of a WebDataset tar, or the first folder of the path (after a folder that holds
everything). Nothing is decoded here, and no name that a tar gives is ever used as a path.
"""

import hashlib
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from repcon.errors import UserError

JPEG_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif")
OTHER_SUFFIXES = (".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".jp2", ".avif")
SUFFIXES = frozenset(JPEG_SUFFIXES + OTHER_SUFFIXES)
MAX_FILE_BYTES = 1 << 30
_COMPRESSED = (".tar.gz", ".tgz", ".tar.xz", ".tar.bz2", ".tar.zst", ".zip")


@dataclass(frozen=True, slots=True)
class Item:
    """One image file that is to be packed."""

    name: str
    """Path below the source, or inside the tar, with `/`."""
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


@dataclass(slots=True)
class _Found:
    """A file before its key and label are known."""

    name: str
    container: str
    offset: int
    length: int
    label: str | None


@dataclass(slots=True)
class _Scan:
    found: list[_Found] = field(default_factory=list)
    left_out: list[tuple[str, str]] = field(default_factory=list)
    identity: list[str] = field(default_factory=list)


def read(source: str) -> Listing:
    """Lists a folder of images, a folder of tars, or one tar. Raises UserError where there is nothing to pack."""
    path = Path(source)
    if "://" in source:
        raise UserError(f"{source}: images are packed from local folders and tars; copy them here first")
    if not path.exists():
        raise UserError(f"{source}: no such folder or tar; name an image folder, a .tar, or a folder of .tar files")
    if path.name.endswith(_COMPRESSED):
        raise UserError(f"{source}: compressed archives cannot be read by offset; unpack it to a .tar or a folder")
    scan = _Scan()
    if path.is_dir():
        _folder(path, scan)
    elif path.suffix == ".tar":
        _tar(path, path.name, scan)
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
    items = [
        Item(
            entry.name,
            _key(entry.name, keys),
            entry.container,
            entry.offset,
            entry.length,
            numbers[label] if label else -1,
        )
        for entry, label in zip(scan.found, labels, strict=True)
    ]
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


def _folder(root: Path, scan: _Scan) -> None:
    """Walks in sorted order, through links to folders, each real folder once."""
    seen = {os.path.realpath(root)}
    for parent, folders, files in os.walk(root, followlinks=True):
        fresh = [name for name in sorted(folders) if os.path.realpath(os.path.join(parent, name)) not in seen]
        seen.update(os.path.realpath(os.path.join(parent, name)) for name in fresh)
        folders[:] = fresh
        for file in sorted(files):
            path = os.path.join(parent, file)
            name = Path(path).relative_to(root).as_posix()
            if name.endswith(".tar"):
                _tar(Path(path), name, scan)
            else:
                _file(path, name, scan)


def _file(path: str, name: str, scan: _Scan) -> None:
    try:
        status = os.stat(path)
    except OSError as error:
        scan.left_out.append((name, f"cannot be read: {error.strerror}"))
        return
    scan.identity.append(f"{name}\0{status.st_size}\0{status.st_mtime_ns}")
    reason = _refusal(name, status.st_size)
    if reason:
        scan.left_out.append((name, reason))
    else:
        scan.found.append(_Found(name, path, 0, status.st_size, None))


def _refusal(name: str, length: int) -> str:
    """Why a file is no image by its name and length; empty where it may be one."""
    path = PurePosixPath(name)
    if any(part.startswith(".") or part == "__MACOSX" for part in path.parts):
        return "a hidden file"
    if path.suffix.lower() not in SUFFIXES:
        return f"not an image's file name ({path.suffix or 'no suffix'})"
    if length > MAX_FILE_BYTES:
        return f"{length} bytes, more than the {MAX_FILE_BYTES} that are read"
    return "" if length else "an empty file"


def _tar(path: Path, name: str, scan: _Scan) -> None:
    """Adds a tar's images; `name` is how the tar is called in the list of what was left out."""
    status = path.stat()
    scan.identity.append(f"{name}\0{status.st_size}\0{status.st_mtime_ns}")
    members: list[tuple[str, int, int]] = []
    labels: dict[str, str] = {}
    try:
        with tarfile.open(path, "r:", errors="surrogateescape") as tar:
            for member in _members(tar):
                reason = _unsafe(member, status.st_size)
                if reason:
                    scan.left_out.append((f"{name}: {member.name}", reason))
                elif member.isreg() and member.name.endswith(".cls"):
                    labels[_sample(member.name)] = _label(tar, member)
                elif member.isreg():
                    members.append((member.name.removeprefix("./"), member.offset_data, member.size))
    except (tarfile.TarError, OSError, ValueError, RecursionError) as error:
        scan.left_out.append((name, f"truncated or damaged tar, read up to there: {error}"))
    _add_members(path, name, members, labels, scan)


def _members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The members in order; raises on offsets that do not rise, which would never end."""
    last = -1
    while (member := tar.next()) is not None:
        if member.offset <= last or member.size < 0:
            raise tarfile.ReadError("offsets do not rise")
        last = member.offset
        _forget(tar)
        yield member


def _forget(tar: tarfile.TarFile) -> None:
    """tarfile keeps every header that it has read; a list of a million would not stay flat."""
    vars(tar)["members"] = []


def _unsafe(member: tarfile.TarInfo, tar_bytes: int) -> str:
    path = PurePosixPath(member.name)
    if path.is_absolute() or ".." in path.parts or "\0" in member.name:
        return "a path that leaves the archive"
    if member.issym() or member.islnk():
        return "a link"
    if not (member.isreg() or member.isdir()) or member.issparse():
        return "not a plain file"
    if member.offset_data + member.size > tar_bytes:
        return "truncated: the tar ends inside it"
    return ""


def _sample(name: str) -> str:
    """A member's WebDataset key: its path up to the file name's first dot."""
    folder, slash, file = name.removeprefix("./").rpartition("/")
    return folder + slash + file.split(".", 1)[0]


def _label(tar: tarfile.TarFile, member: tarfile.TarInfo) -> str:
    file = tar.extractfile(member)
    text = file.read(256).decode("utf-8", "replace").strip() if file else ""
    return text


def _add_members(
    path: Path, name: str, members: list[tuple[str, int, int]], labels: dict[str, str], scan: _Scan
) -> None:
    """Images become items; what lies beside an image under the same WebDataset key is its sidecar."""
    refusals = [_refusal(member, length) for member, _, length in members]
    images = {_sample(member) for (member, _, _), reason in zip(members, refusals, strict=True) if not reason}
    for (member, offset, length), reason in zip(members, refusals, strict=True):
        sample = _sample(member)
        if not reason and labels and PurePosixPath(member).name.count(".") > 1:
            reason = f"a further file of sample {sample}"
        if not reason:
            label = labels.get(sample, "") if labels else None
            scan.found.append(_Found(member, str(path), offset, length, label))
        elif sample not in images or PurePosixPath(member).suffix.lower() in SUFFIXES:
            scan.left_out.append((f"{name}: {member}", reason))


def _labels(found: list[_Found]) -> list[str | None]:
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


def _group(entry: _Found) -> str:
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
    """A WebDataset key: no dot in the file's name (it would start the suffix), valid UTF-8, unique."""
    path = PurePosixPath(_text(name))
    stem = path.stem.replace(".", "_")
    key = base = (path.parent / stem).as_posix()
    number = 1
    while key in taken:
        number += 1
        key = f"{base}~{number}"
    taken.add(key)
    return key
