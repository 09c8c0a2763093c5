"""What a folder or a tar holds, before anything is decoded; no name that a tar gives is ever used as a path."""

import hashlib
import stat
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

JPEG_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif")
OTHER_SUFFIXES = (".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".jp2", ".avif")
SUFFIXES = frozenset(JPEG_SUFFIXES + OTHER_SUFFIXES)
MAX_FILE_BYTES = 1 << 30
_PIECE_BYTES = 1 << 20


@dataclass(slots=True)
class Found:
    """A file before its key and label are known."""

    name: str
    container: str
    offset: int
    length: int
    label: str | None
    """What its `.cls` says, "" where only others of the tar have one; None where labels come from folders."""


@dataclass(slots=True)
class Scan:
    """What has been found so far."""

    found: list[Found] = field(default_factory=list)
    left_out: list[tuple[str, str]] = field(default_factory=list)
    """(name, reason); a reason is a kind, or `kind: detail`."""
    identity: Any = field(default_factory=hashlib.sha256)
    """SHA-256 over each file's name, size and time of change, with a line break between files."""
    _between: bytes = b""

    def identify(self, line: str) -> None:
        """Adds a file's line."""
        self.identity.update(self._between + line.encode("utf-8", "surrogateescape"))
        self._between = b"\n"


HIDDEN = "a hidden file"


def hidden(name: str) -> bool:
    """Whether a file or a folder above it is hidden, or macOS's double of a file."""
    return any(part.startswith(".") or part == "__MACOSX" for part in PurePosixPath(name).parts)


def refusal(name: str, length: int) -> str:
    """Why a file is no image by its name and length; empty where it may be one."""
    path = PurePosixPath(name)
    if hidden(name):
        return HIDDEN
    if path.suffix.lower() not in SUFFIXES:
        return f"not an image's file name ({path.suffix or 'no suffix'})"
    if length > MAX_FILE_BYTES:
        return f"too large a file: {length} bytes, of which at most {MAX_FILE_BYTES} are read"
    return "" if length else "an empty file"


def add_tar(path: Path, name: str, scan: Scan) -> None:
    """Adds a tar's images; `name` is how the tar is called in the list of what was left out."""
    try:
        status = path.stat()
    except OSError as error:
        scan.left_out.append((name, f"cannot be read: {error.strerror}"))
        return
    if not stat.S_ISREG(status.st_mode):
        scan.left_out.append((name, "not a plain file"))
        return
    scan.identify(f"{name}\0{status.st_size}\0{status.st_mtime_ns}")
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
                    members.append((PurePosixPath(member.name).as_posix(), member.offset_data, member.size))
            _check_end(tar)
    except (tarfile.TarError, OSError, ValueError, RecursionError) as error:
        scan.left_out.append((name, f"a truncated or damaged tar, read up to the damage: {error}"))
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


def _sample(name: str) -> str:
    """A member's WebDataset key: its path up to the file name's first dot."""
    folder, slash, file = PurePosixPath(name).as_posix().rpartition("/")
    return folder + slash + file.split(".", 1)[0]


def _label(tar: tarfile.TarFile, member: tarfile.TarInfo) -> str:
    file = tar.extractfile(member)
    return file.read(256).decode("utf-8", "replace").strip() if file else ""


def _add_members(
    path: Path, name: str, members: list[tuple[str, int, int]], labels: dict[str, str], scan: Scan
) -> None:
    """Images become items; what lies beside an image under the same WebDataset key is its sidecar."""
    refusals = [refusal(member, length) for member, _, length in members]
    images = {_sample(member) for (member, _, _), reason in zip(members, refusals, strict=True) if not reason}
    for (member, offset, length), reason in zip(members, refusals, strict=True):
        sample = _sample(member)
        if not reason and labels and PurePosixPath(member).name.count(".") > 1:
            reason = "a further file of its sample"
        if not reason:
            label = labels.get(sample, "") if labels else None
            scan.found.append(Found(member, str(path), offset, length, label))
        elif sample not in images or PurePosixPath(member).suffix.lower() in SUFFIXES:
            scan.left_out.append((f"{name}: {member}", reason))
