"""What a folder or a tar holds, before anything is decoded; no name that a tar gives is ever used as a path.

Names are the bytes on the disk or in the tar, as UTF-8 with surrogate escapes: two names are equal where their bytes
are, whatever the locale. `repcon.images.names.readable` makes text of them.
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

from repcon.images.names import LABEL_SUFFIX, SUFFIXES, hidden, refusal
from repcon.images.samples import FURTHER, Label, Member, Samples
from repcon.runtime.errors import UserError
from repcon.runtime.open_files import is_passing, reason_of, require_plain

MAX_LABEL_BYTES = 4096
"""A class's name in a `.cls`; a longer one is refused, never cut."""
_PIECE_BYTES = 1 << 20
_HEADER_BYTES = 4 << 20
"""The most that one header of a tar may claim; tarfile would read whatever it claims into memory."""


@dataclass(slots=True)
class Found:
    """A file before its key and class are known."""

    name: str
    container: str
    offset: int
    length: int
    labels: tuple[Label, ...] | None
    """Its sample's, () where only others of the tar have some; None where the class is the folder's name."""
    column: str = ""
    """Of a Parquet row: the column that holds its image; `offset` is then the row's number."""


@dataclass(slots=True)
class Scan:
    """What has been found so far."""

    found: list[Found] = field(default_factory=list)
    left_out: list[tuple[str, str]] = field(default_factory=list)
    """(name, reason); a reason is a kind, or `kind: detail`."""
    crowded: list[tuple[str, list[str]]] = field(default_factory=list)
    """(sample, its images' names) of each sample with one label and several images, none of them named as it is."""
    cautions: dict[str, None] = field(default_factory=dict)
    """One line each, in order: how the labels were found."""
    class_order: dict[str, None] = field(default_factory=dict)
    """Class names in the order in which the source numbers them, where it does."""
    sidecars: set[str] = field(default_factory=set)
    """Suffixes of members that share an image's key and are neither images nor labels: `json`, `cls.txt`."""
    identity: Any = field(default_factory=hashlib.sha256)
    """SHA-256 over name, size and time of change of each file that is packed, with a line break between files."""
    _between: bytes = b""

    def identify(self, line: str) -> None:
        """Adds a file's line."""
        self.identity.update(self._between + line.encode("utf-8", "surrogateescape"))
        self._between = b"\n"


def leave_out(scan: Scan, path: str, name: str, error: OSError) -> None:
    """Lists a file that is not there as left out. Raises UserError for what may pass or be mended."""
    if is_passing(error) or error.errno in (errno.EACCES, errno.EPERM):
        raise unreadable(path, error) from error
    scan.left_out.append((name, f"cannot be read: {reason_of(error)}"))


def unreadable(path: str, error: OSError) -> UserError:
    """The error for a source of which nobody knows what it holds, so that nothing may be packed without it."""
    return UserError(
        f"{path}: cannot be read ({reason_of(error)}); nothing is left out for that: make it readable, or move it away"
    )


def add_tar(path: Path, name: str, scan: Scan) -> None:
    """Adds a tar's images; `name` is how the tar is called in the list of what was left out.

    Raises UserError where it cannot be read to its end: nobody knows how many images are missing then.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            scan.left_out.append((name, "not a plain file"))
            return
        file = open(path, "rb", opener=_plainly)  # noqa: SIM115 (closed below; only its opening is tried here)
    except OSError as error:
        raise unreadable(str(path), error) from error
    members: list[Member] = []
    with file:
        damage = _damage(lambda: _list_members(file, name, status.st_size, members, scan), path)
    if damage:
        images = sum(not member.refusal and member.text is None for member in members)
        what = f"a truncated or damaged tar ({damage}); images in it that can be read: {images:,}"
        raise UserError(f"{path}: {what}; copy it again, or unpack what is whole (tar -xf) and pack that folder")
    count = len(scan.found)
    _add_members(path, name, members, scan)
    if len(scan.found) > count:
        scan.identify(f"{name}\0{status.st_size}\0{status.st_mtime_ns}")


def _damage(read: Callable[[], None], path: Path) -> str:
    """Why the tar could not be read to its end; empty where it could. Raises UserError for what is no damage."""
    try:
        read()
    except MemoryError as error:
        raise UserError(f"{path}: not enough memory to list it; free some and run the same command again") from error
    except OSError as error:
        if is_passing(error):
            raise unreadable(str(path), error) from error
        return str(error)
    except Exception as error:  # tarfile raises many kinds on damaged headers
        return str(error) or type(error).__name__
    return ""


def _plainly(path: str, flags: int) -> int:
    """Opens as `OpenFile` does: what became a pipe since it was looked at must not be waited for."""
    descriptor = os.open(path, flags | os.O_NONBLOCK)
    try:
        require_plain(os.fstat(descriptor).st_mode, path)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


class _Bounded:
    """A file of which no more is read at once than a header may take."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int) -> bytes:
        if not 0 <= size <= _HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {size:,} bytes at byte {self.tell():,}")
        return self._file.read(size)


def _list_members(file: BinaryIO, name: str, size: int, members: list[Member], scan: Scan) -> None:
    """Adds the plain members in order; raises tarfile's errors and others where the tar is damaged."""
    bounded: Any = _Bounded(file)
    with tarfile.open(fileobj=bounded, mode="r:", encoding="utf-8", errors="surrogateescape") as tar:
        for member in _members(tar):
            reason = _unsafe(member, size)
            if reason:
                scan.left_out.append((f"{name}: {member.name}", reason))
            elif member.isreg():
                inside = PurePosixPath(member.name).as_posix()
                refused = refusal(inside, member.size)
                if not inside.lower().endswith(LABEL_SUFFIX):
                    members.append(Member(inside, member.offset_data, member.size, refused))
                elif not hidden(inside):
                    members.append(Member(inside, 0, 0, refused, *_label(tar, member)))
        _check_end(tar)


def _members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The members in order; raises on offsets that do not rise, which would never end."""
    last = -1
    while (member := tar.next()) is not None:
        if member.offset <= last or member.size < 0:
            raise tarfile.ReadError("offsets do not rise")
        last = member.offset
        _forget(tar)
        yield member


def _check_end(tar: tarfile.TarFile) -> None:
    """Raises ReadError where what follows the last member is not zeros: tarfile takes a damaged header for the end."""
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


def _label(tar: tarfile.TarFile, member: tarfile.TarInfo) -> tuple[str, str]:
    """A label's text, and why it is none."""
    if member.size > MAX_LABEL_BYTES:
        return "", f"its label has {member.size} bytes, of which at most {MAX_LABEL_BYTES} are read"
    file = tar.extractfile(member)
    data = file.read() if file else b""
    if b"\0" in data:
        return "", "its label is no text in UTF-8: it holds zero bytes"
    return data.removeprefix(codecs.BOM_UTF8).decode("utf-8", "surrogateescape").strip(), ""


def _add_members(path: Path, name: str, members: list[Member], scan: Scan) -> None:
    """Images become items; what lies beside an image under the same WebDataset key is its sidecar."""
    samples = Samples(members)
    for number, member in enumerate(members):
        if member.text is not None:
            continue
        reason = member.refusal or (FURTHER if samples.is_further(number) else "")
        if not reason:
            labels = samples.labels(number) if samples.labelled else None
            scan.found.append(Found(member.name, str(path), member.offset, member.length, labels))
        elif not samples.is_beside(member.name) or PurePosixPath(member.name).suffix.lower() in SUFFIXES:
            scan.left_out.append((f"{name}: {member.name}", reason))
        else:
            scan.sidecars.add(PurePosixPath(member.name).name.partition(".")[2])
    scan.crowded += [(f"{name}: {sample}", images) for sample, images in samples.crowded.items()]
