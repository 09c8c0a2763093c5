"""List sources: the images of folders, of WebDataset tars or of Parquet files, in a fixed order, with labels.

Nothing is decoded here.
"""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePosixPath

from repcon.images import hub
from repcon.images.archives import FoundImage, ParquetColumns, SourceScan, add_tar, plain_file_status, unreadable_error
from repcon.images.class_labels import assign_classes, name_warnings, number_warnings, sort_classes
from repcon.images.file_names import ARCHIVE, HIDDEN, SUFFIXES, display_name, is_hidden, rejection_reason, utf8_name
from repcon.images.format import MANIFEST
from repcon.images.parquet import SUFFIX as PARQUET
from repcon.images.parquet import add_parquet
from repcon.runtime.errors import UserError
from repcon.runtime.local_files import OpenFile
from repcon.runtime.text import abbreviate

_COMPRESSED = (".tar.gz", ".tgz", ".tar.xz", ".tar.bz2", ".tar.zst", ".zip")


@dataclass(frozen=True, slots=True)
class SourceItem:
    """One image file that is to be packed."""

    name: str
    """Path below the source, or inside the tar, with `/`; valid UTF-8."""
    key: str
    """Unique name in the pack: the path without suffix and without dots."""
    container: str
    """Path of the file that holds its bytes: itself, or a tar or Parquet file."""
    offset: int
    length: int
    label: int
    """-1 where unlabelled."""
    column: str = ""
    """Of a Parquet row: the column that holds its image; `offset` is then the row's number."""


@dataclass(frozen=True, slots=True)
class SourceListing:
    """The images of a source and their classes."""

    items: list[SourceItem]
    classes: tuple[str, ...]
    left_out: list[tuple[str, str]]
    """(name, reason) of the files that are not images."""
    identity: str
    """Hash of the name, size and modification time of each file that is packed."""
    warnings: tuple[str, ...] = ()
    """One line each: how labels were found, and what is probably a mistake."""


def source_paths(source: str | tuple[str, ...]) -> tuple[str, ...]:
    """The sources of a setting that names one or several."""
    return (source,) if isinstance(source, str) else source


def format_sources(source: str | tuple[str, ...]) -> str:
    """The sources as text for a message."""
    return ", ".join(source_paths(source))


def list_sources(
    source: str | tuple[str, ...], limit: int = 0, columns: ParquetColumns = ParquetColumns()  # noqa: B008 (frozen)
) -> SourceListing:  # fmt: skip
    """Lists all sources, in the order given, as one; at most `limit` images in all unless that is 0.

    Classes of the same name are one class. With several sources, each image's name starts with the last part of its
    source's path. Raises UserError where a source has no images, or is named twice, and where columns are named and
    there is no Parquet file.
    """
    names = source_paths(source)
    if not names:
        raise UserError("source: none given; name an image folder, a .tar, a .parquet, or a folder of such files")
    if len({Path(name).resolve() for name in names}) < len(names):
        raise UserError(f"source: {format_sources(source)}: one of them is named twice")
    listings = [list_source(name, columns) for name in names]
    if columns != ParquetColumns() and not any(item.column for listing in listings for item in listing.items):
        flag = "image_column" if columns.image else "label_column"
        raise UserError(f"{flag}: {format_sources(source)} has no Parquet files, whose columns it names; leave it out")
    if len(listings) == 1 and not limit:
        return listings[0]
    shares = split_limit([len(listing.items) for listing in listings], limit)
    identity = _joint_identity(listings, limit)
    if len(listings) == 1:
        return replace(listings[0], items=_sample_evenly(listings[0].items, shares[0]), identity=identity)
    return _join(listings, _prefixes(names), shares, identity)


def split_limit(sizes: Sequence[int], limit: int) -> list[int]:
    """Number of images to take from sets of these sizes: equal numbers, at most the whole set, `limit` in all."""
    if not limit or sum(sizes) <= limit:
        return list(sizes)
    shares, left = [0] * len(sizes), limit
    order = sorted(range(len(sizes)), key=lambda place: (sizes[place], place))
    for number, place in enumerate(order):
        shares[place] = min(sizes[place], left // (len(order) - number))
        left -= shares[place]
    return shares


def _sample_evenly(items: list[SourceItem], count: int) -> list[SourceItem]:
    """`count` of the items at equal distances, in the order of their folders."""
    return items if count == len(items) else [items[place * len(items) // count] for place in range(count)]


def _join(listings: list[SourceListing], prefixes: list[str], shares: list[int], identity: str) -> SourceListing:
    """One listing of all sources, with labels renumbered."""
    classes = tuple(sort_classes({name for listing in listings for name in listing.classes}))
    numbers = {name: number for number, name in enumerate(classes)}
    items, left_out = [], []
    for listing, prefix, share in zip(listings, prefixes, shares, strict=True):
        for item in _sample_evenly(listing.items, share):
            label = numbers[listing.classes[item.label]] if item.label >= 0 else -1
            key = f"{prefix.replace('.', '_')}/{item.key}"
            items.append(replace(item, name=f"{prefix}/{item.name}", key=key, label=label))
        left_out += [(f"{prefix}/{name}", reason) for name, reason in listing.left_out]
    warnings = [warning for listing in listings for warning in listing.warnings]
    warnings += name_warnings(classes) + number_warnings(listing.classes for listing in listings)
    return SourceListing(items, classes, left_out, identity, tuple(dict.fromkeys(warnings)))


def _prefixes(names: Sequence[str]) -> list[str]:
    """The last part of each path, with a number where another has the same; no two differ in dots only."""
    found: list[str] = []
    for name in names:
        end = hub.short_name(name) if hub.is_dataset(name) else Path(name).resolve().name
        end = end.encode("utf-8", "surrogateescape").decode("utf-8", "replace") or "root"
        taken = {prefix.replace(".", "_") for prefix in found}
        number, prefix = 1, end
        while prefix.replace(".", "_") in taken:
            number += 1
            prefix = f"{end}~{number}"
        found.append(prefix)
    return found


def _joint_identity(listings: list[SourceListing], limit: int) -> str:
    """A hash of the sources' identities, their order, and the limit."""
    words = "\n".join([f"limit {limit}", *(listing.identity for listing in listings)])
    return hashlib.sha256(words.encode()).hexdigest()


def list_source(source: str, columns: ParquetColumns = ParquetColumns()) -> SourceListing:  # noqa: B008 (frozen)
    """Lists a folder of images, tars or Parquet files, one such file, or a dataset of the Hugging Face hub.

    columns: of Parquet files. Raises UserError where there is nothing to pack.
    """
    if hub.is_dataset(source):
        folder, identity = hub.download(source)
        return replace(list_source(str(folder), columns), identity=_identity(identity, columns))
    scan = _scan(source, columns)
    if not scan.found:
        raise _no_images(source, scan)
    numbers, classes, warnings = assign_classes(scan)
    keys: dict[str, int] = {}
    items: list[SourceItem] = []
    for entry, number in zip(scan.found, numbers, strict=True):
        key = _key(entry.name.encode("utf-8", "surrogateescape").decode("utf-8", "replace"), keys)
        name, place = display_name(entry.name), (entry.container, entry.offset, entry.length)
        items.append(SourceItem(name, key, *place, number, entry.column))
    left_out = [(display_name(name), display_name(reason)) for name, reason in scan.left_out]
    return SourceListing(items, classes, left_out, _identity(scan.identity.hexdigest(), columns), warnings)


def _scan(source: str, columns: ParquetColumns) -> SourceScan:
    """The files of a local source. Raises UserError for what is none, and for a pack."""
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
    scan = SourceScan(columns)
    if path.is_dir():
        _folder(path, scan)
    elif path.suffix.lower() == ".tar":
        add_tar(path, utf8_name(path.name), scan)
    elif path.suffix.lower() == PARQUET:
        add_parquet(path, utf8_name(path.name), scan)
    else:
        raise UserError(f"{source}: neither a folder nor a .tar or .parquet")
    return scan


def _identity(files: str, columns: ParquetColumns) -> str:
    """The hash of the files, with the columns where any is named."""
    if columns == ParquetColumns():
        return files
    return hashlib.sha256("\0".join((files, columns.image, columns.label)).encode()).hexdigest()


def _no_images(source: str, scan: SourceScan) -> UserError:
    archives = [display_name(name) for name, reason in scan.left_out if reason == ARCHIVE]
    if archives:
        names = abbreviate(archives)
        return UserError(f"{source}: holds no images but archives ({names}); unpack the outer one and name its folder")
    why = f" ({display_name(scan.left_out[0][0])}: {display_name(scan.left_out[0][1])})" if scan.left_out else ""
    return UserError(f"{source}: holds no images{why}; known suffixes: {' '.join(sorted(SUFFIXES))}")


def read_item(item: SourceItem) -> bytes:
    """Reads the bytes of a file or a tar member. Raises OSError, also where the file is shorter than when listed."""
    data = OpenFile(item.container).read(item.offset, item.length)
    if len(data) != item.length:
        raise OSError(None, f"{len(data)} of {item.length} bytes are left")
    return data


def _folder(root: Path, scan: SourceScan) -> None:
    """Adds all files in sorted order; follows links to folders, and reads each real folder once.

    Raises UserError where a folder that is not hidden cannot be read: the number of its images is unknown.
    """
    visited = {os.path.realpath(root)}
    start = len(os.path.join(root, ""))
    pending = [str(root)]
    while pending:  # not os.walk's own recursion: folders may be nested deeper than the stack
        parent = pending.pop()
        on_error = partial(_require_hidden, parent, parent[start:])
        _, folders, files = next(os.walk(parent, onerror=on_error), (parent, [], []))
        subfolders: list[str] = []
        for path in (os.path.join(parent, name) for name in sorted(folders, key=utf8_name)):
            real = os.path.realpath(path)
            if real not in visited:
                subfolders.append(path)
            else:
                name = utf8_name(path[start:]) + "/"
                scan.left_out.append((name, "a folder that was read before, under another name"))
            visited.add(real)
        for path in (os.path.join(parent, name) for name in sorted(files, key=utf8_name)):
            _file(path, utf8_name(path[start:]), scan)
        pending += reversed(subfolders)


def _require_hidden(folder: str, name: str, error: OSError) -> None:
    if not (name and is_hidden(utf8_name(name))):
        raise unreadable_error(folder, error) from error


def _file(path: str, name: str, scan: SourceScan) -> None:
    if is_hidden(name):
        scan.left_out.append((name, HIDDEN))
        return
    if name.lower().endswith(".tar"):
        add_tar(Path(path), name, scan)
        return
    if name.lower().endswith(PARQUET):
        add_parquet(Path(path), name, scan)
        return
    reason = rejection_reason(name, 1)
    if reason:
        scan.left_out.append((name, reason))
        return
    if (status := plain_file_status(path, name, scan)) is None:
        return
    if reason := rejection_reason(name, status.st_size):
        scan.left_out.append((name, reason))
    else:
        scan.identify(f"{name}\0{status.st_size}\0{status.st_mtime_ns}")
        scan.found.append(FoundImage(name, path, 0, status.st_size, None))


def _key(name: str, taken: dict[str, int]) -> str:
    """A unique WebDataset key: the path without suffix, with no dot in the file's name (it would start the suffix).

    taken: every key so far, with the last number that was appended to make a duplicate unique.
    """
    path = PurePosixPath(name)
    key = base = (path.parent / path.stem.replace(".", "_")).as_posix()
    while key in taken:
        taken[base] = taken.get(base, 1) + 1
        key = f"{base}~{taken[base]}"
    taken[key] = 1
    return key
