"""File names: image suffixes, hidden and system files, and conversion to text.

Names are bytes, held as UTF-8 with surrogate escapes: two are equal if their bytes are, whatever the locale.
"""

import os
from pathlib import PurePosixPath

JPEG_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif")
OTHER_SUFFIXES = (".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".jp2", ".avif")
SUFFIXES = frozenset(JPEG_SUFFIXES + OTHER_SUFFIXES)
ARCHIVE_SUFFIXES = (".tar", ".tgz", ".gz", ".xz", ".bz2", ".zst", ".zip", ".7z", ".rar")
LABEL_SUFFIX = ".cls"
MAX_FILE_BYTES = 1 << 30
HIDDEN = "a hidden file"
ARCHIVE = "an archive that is not looked into: unpack what holds it"
_SYSTEM = frozenset(
    (
        "__MACOSX|@eaDir|#recycle|#snapshot|@Recycle|@Recently-Snapshot|@SharedBin|@tmp|~snapshot|$RECYCLE.BIN|RECYCLER|"
        "RECYCLED|System Volume Information|lost+found|LOST.DIR|Network Trash Folder|Temporary Items|Thumbs.db|"
        "ehthumbs.db|desktop.ini"
    )
    .lower()
    .split("|")
)
"""Folders and files that a NAS or an operating system makes for itself: thumbnails, recycle bins, snapshots."""


def is_hidden(name: str) -> bool:
    """Whether a file or a folder above it is hidden, or one that an operating system makes for itself."""
    return any(part.startswith(".") or part.lower() in _SYSTEM for part in PurePosixPath(name).parts)


def rejection_reason(name: str, length: int) -> str:
    """Why a file of this name and length is not taken as an image; empty where it may be one."""
    path = PurePosixPath(name)
    if is_hidden(name):
        return HIDDEN
    if path.suffix.lower() in ARCHIVE_SUFFIXES:
        return ARCHIVE
    if path.suffix.lower() not in SUFFIXES:
        return f"not an image's file name ({path.suffix or 'no suffix'})"
    if length > MAX_FILE_BYTES:
        return f"too large a file: {length} bytes, of which at most {MAX_FILE_BYTES} are read"
    return "" if length else "an empty file"


def utf8_name(path: str) -> str:
    """A path of the operating system as UTF-8 with surrogate escapes, whatever the locale's encoding."""
    return os.fsencode(path).decode("utf-8", "surrogateescape")


def display_name(name: str) -> str:
    """A name as valid Unicode text: bytes that are not UTF-8 become `\\xe9`."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
