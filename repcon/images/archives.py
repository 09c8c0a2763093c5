"""List the images in a tar without decoding them; names in a tar are never used as paths.

Names are bytes, held as UTF-8 with surrogate escapes; `repcon.images.file_names.display_name` converts them to text.
"""

import codecs
import errno
import hashlib
import os
import stat
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from repcon.images.file_names import LABEL_SUFFIX, SUFFIXES, is_hidden, rejection_reason
from repcon.images.tar_samples import SECONDARY, Label, TarMember, TarSamples
from repcon.runtime.errors import UserError, first_line
from repcon.runtime.local_files import error_reason, is_transient, open_regular

MAX_LABEL_BYTES = 4096
"""Length of a class name in a `.cls`; a longer one is refused, never truncated."""
_PIECE_BYTES = 1 << 20
_HEADER_BYTES = 4 << 20
"""The largest header that is read: tarfile would read whatever a damaged one claims into memory."""


@dataclass(slots=True)
class FoundImage:
    """An image file before its key and class are known."""

    name: str
    container: str
    offset: int
    length: int
    labels: tuple[Label, ...] | None
    """Labels of its sample; () where only other samples of the tar have some, None where folders are the classes."""
    column: str = ""
    """Of a Parquet row: the column that holds its image; `offset` is then the row's number."""


@dataclass(frozen=True, slots=True)
class ParquetColumns:
    """The columns of a Parquet file to read; an empty name leaves the choice to what the file declares."""

    image: str = ""
    label: str = ""


@dataclass(slots=True)
class SourceScan:
    """Result of listing a source."""

    columns: ParquetColumns = ParquetColumns()
    found: list[FoundImage] = field(default_factory=list)
    left_out: list[tuple[str, str]] = field(default_factory=list)
    """(name, reason); a reason is a kind, or `kind: detail`."""
    ambiguous: list[tuple[str, list[str]]] = field(default_factory=list)
    """(sample, names of its images) of each sample with one label and several images, none with the sample's name."""
    warnings: dict[str, None] = field(default_factory=dict)
    """One line each, in order: how the labels were found."""
    class_order: dict[str, None] = field(default_factory=dict)
    """Class names in the order of their numbers, where the source numbers them."""
    sidecars: set[str] = field(default_factory=set)
    """Suffixes of members that share an image's key and are neither images nor labels: `json`, `cls.txt`."""
    identity: Any = field(default_factory=hashlib.sha256)
    """SHA-256 over name, size and modification time of each file that is packed, with a line break between files."""
    _between: bytes = b""

    def identify(self, line: str) -> None:
        """Adds a line about a file to the identity."""
        self.identity.update(self._between + line.encode("utf-8", "surrogateescape"))
        self._between = b"\n"


def plain_file_status(path: str, name: str, scan: SourceScan) -> os.stat_result | None:
    """The file's status; None for one that is missing or no plain file, which is left out.

    Raises UserError for errors that are transient or can be fixed.
    """
    try:
        status = os.stat(path)
    except OSError as error:
        if is_transient(error) or error.errno in (errno.EACCES, errno.EPERM):
            raise unreadable_error(path, error) from error
        scan.left_out.append((name, f"cannot be read: {error_reason(error)}"))
        return None
    if stat.S_ISREG(status.st_mode):
        return status
    scan.left_out.append((name, "not a plain file"))
    return None


def unreadable_error(path: str, error: OSError) -> UserError:
    """The error for a part of a source that cannot be listed: a pack without it would be incomplete."""
    return UserError(
        f"{path}: cannot be read ({error_reason(error)}); nothing is left out for that: make it readable, or move it "
        "away"
    )


def add_tar(path: Path, name: str, scan: SourceScan) -> None:
    """Adds a tar's images; `name` is the tar's name in the list of files that were left out.

    Raises UserError where it cannot be read to its end: the number of missing images is unknown then.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            scan.left_out.append((name, "not a plain file"))
            return
        file = open_regular(path)
    except OSError as error:
        raise unreadable_error(str(path), error) from error
    members: list[TarMember] = []
    with file:
        try:
            damage = read_or_damage(lambda: _list_members(file, name, status.st_size, members, scan), path)
        except MemoryError as error:
            raise UserError(
                f"{path}: not enough memory to list it; free some and run the same command again"
            ) from error
    if damage:
        images = sum(not member.rejection and member.text is None for member in members)
        what = f"a truncated or damaged tar ({damage}); images in it that can be read: {images:,}"
        raise UserError(f"{path}: {what}; copy it again, or unpack what is whole (tar -xf) and pack that folder")
    count = len(scan.found)
    _add_members(path, name, members, scan)
    if len(scan.found) > count:
        scan.identify(f"{name}\0{status.st_size}\0{status.st_mtime_ns}")


def read_or_damage(read: Callable[[], Any], path: Path) -> Any:
    """The result of `read`, or a description of the damage. Raises UserError for transient errors, and MemoryError."""
    try:
        return read()
    except (UserError, MemoryError):
        raise
    except OSError as error:
        if is_transient(error):
            raise unreadable_error(str(path), error) from error
        return error_reason(error).splitlines()[0]
    except Exception as error:  # tarfile and pyarrow raise many kinds on damaged files
        return first_line(error)


class _BoundedReader:
    """A file that refuses to read more at once than `_HEADER_BYTES`."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int) -> bytes:
        if not 0 <= size <= _HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {size:,} bytes at byte {self.tell():,}")
        return self._file.read(size)


def _list_members(file: BinaryIO, name: str, size: int, members: list[TarMember], scan: SourceScan) -> None:
    """Adds the regular members in order. Raises tarfile's and other errors where the tar is damaged."""
    bounded: Any = _BoundedReader(file)
    with tarfile.open(fileobj=bounded, mode="r:", encoding="utf-8", errors="surrogateescape") as tar:
        for member in _members(tar):
            vars(tar)["members"] = []  # which tarfile keeps in memory, and a tar may have millions of
            reason = _unsafe(member, size)
            if reason:
                scan.left_out.append((f"{name}: {member.name}", reason))
            elif member.isreg():
                inside = PurePosixPath(member.name).as_posix()
                refused = rejection_reason(inside, member.size)
                if not inside.lower().endswith(LABEL_SUFFIX):
                    members.append(TarMember(inside, member.offset_data, member.size, refused))
                elif not is_hidden(inside):
                    members.append(TarMember(inside, 0, 0, refused, *_label(tar, member)))
        _check_end(tar)


def _members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The members in order. Raises ReadError where offsets do not increase, which would never end."""
    last = -1
    while (member := tar.next()) is not None:
        if member.offset <= last or member.size < 0:
            raise tarfile.ReadError("offsets do not increase")
        last = member.offset
        yield member


def _check_end(tar: tarfile.TarFile) -> None:
    """Raises ReadError where the last member is not followed by zeros: tarfile takes a damaged header for the end."""
    file = tar.fileobj
    assert file is not None
    file.seek(tar.offset)
    block = file.read(tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE:
        raise tarfile.ReadError(f"it ends at byte {tar.offset:,} without an end mark")
    if block.strip(b"\0"):
        raise tarfile.ReadError(f"no header at byte {tar.offset:,}")
    while piece := file.read(_PIECE_BYTES):
        if piece.strip(b"\0"):
            raise tarfile.ReadError(f"more follows the end mark at byte {tar.offset:,}; unpack tars that were joined")


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


def _label(tar: tarfile.TarFile, member: tarfile.TarInfo) -> tuple[str, str]:
    """A label's text and "", or "" and the reason why it cannot be used."""
    if member.size > MAX_LABEL_BYTES:
        return "", f"its label has {member.size} bytes, of which at most {MAX_LABEL_BYTES} are read"
    file = tar.extractfile(member)
    data = file.read() if file else b""
    if b"\0" in data:
        return "", "its label is no text in UTF-8: it holds zero bytes"
    return data.removeprefix(codecs.BOM_UTF8).decode("utf-8", "surrogateescape").strip(), ""


def _add_members(path: Path, name: str, members: list[TarMember], scan: SourceScan) -> None:
    """Adds the images; other members with the WebDataset key of an image are sidecars and are not listed."""
    samples = TarSamples(members)
    for number, member in enumerate(members):
        if member.text is not None:
            continue
        reason = member.rejection or (SECONDARY if samples.is_secondary(number) else "")
        if not reason:
            labels = samples.labels(number) if samples.labelled else None
            scan.found.append(FoundImage(member.name, str(path), member.offset, member.length, labels))
        elif not samples.has_image(member.name) or PurePosixPath(member.name).suffix.lower() in SUFFIXES:
            scan.left_out.append((f"{name}: {member.name}", reason))
        else:
            scan.sidecars.add(PurePosixPath(member.name).name.partition(".")[2])
    scan.ambiguous += [(f"{name}: {sample}", images) for sample, images in samples.ambiguous.items()]
