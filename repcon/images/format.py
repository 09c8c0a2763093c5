"""The pack format: its manifest and index, written, and read safely from untrusted packs.

shard-00000.tar ...   WebDataset: KEY.jpg, and KEY.cls (the label's number) where labelled
index.npz             one array per column below, uncompressed
left_out.jsonl        {"name", "reason"} for each file that was not packed
pack.json             written last: a folder without it is unfinished
"""

import hashlib
import io
import json
import math
import re
import struct
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np

from repcon.images.jpeg import MAX_PIXELS
from repcon.runtime.errors import UserError
from repcon.runtime.memory import memory_total

FORMAT = 1
MANIFEST = "pack.json"
INDEX = "index.npz"
LEFT_OUT = "left_out.jsonl"
BETON = "images.beton"
"""FFCV's file next to the pack's index; `repcon pack --ffcv` writes it."""
MAX_JPEG_BYTES = 1 << 30
MAX_MANIFEST_BYTES = 1 << 26
MAX_SHARD_BYTES = 1 << 50

COLUMNS: Mapping[str, tuple[str, tuple[int, ...]]] = {
    "shard": ("<i4", ()),
    "offset": ("<i8", ()),
    "length": ("<i4", ()),
    "size": ("<i4", (2,)),
    "hash": ("|u1", (16,)),
    "label": ("<i4", ()),
    "key_end": ("<i8", ()),
}
"""Columns per image: dtype and the shape after the first axis. A further column, `key_text`, holds all keys' UTF-8."""
KEY_TEXT = "key_text"
_MAX_KEY_BYTES = 1 << 16
_HEADER = re.compile(
    rb"\{'descr': '([^']{1,40})', 'fortran_order': (True|False), 'shape': \((-?\d{1,40}(?:, ?-?\d{1,40})*)?,?\), \} *\n"
)
"""A column's header as numpy writes it. numpy's own reader evaluates it and raises many kinds of errors."""

Columns = dict[str, np.ndarray]


def shard_name(shard: int) -> str:
    return f"shard-{shard:05d}.tar"


def fingerprint(hashes: np.ndarray, sizes: np.ndarray) -> str:
    """SHA-256 in hex over the ordered (N, 16) content hashes and (N, 2) sizes: the pack's identity."""
    digest = hashlib.sha256(b"repcon pack 1\0")
    digest.update(np.ascontiguousarray(hashes, "|u1").data)
    digest.update(np.ascontiguousarray(sizes, "<i4").data)
    return digest.hexdigest()


def dump_index(columns: Columns) -> bytes:
    """The index file as bytes, the same for the same columns."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name in (*COLUMNS, KEY_TEXT):
            array = io.BytesIO()
            np.lib.format.write_array(array, columns[name], version=(1, 0), allow_pickle=False)
            archive.writestr(zipfile.ZipInfo(f"{name}.npy"), array.getbuffer())  # ZipInfo's date is fixed
    return buffer.getvalue()


def load_index(data: bytes, origin: str) -> Columns:
    """Reads an index; allocates no more than `data` takes, whatever its headers claim. Raises UserError."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            columns = {name: _column(archive, name) for name in (*COLUMNS, KEY_TEXT)}
    except (KeyError, ValueError, zipfile.BadZipFile, RuntimeError, EOFError, OSError) as error:
        raise damaged(origin, f"{INDEX}: {error}") from error
    except (struct.error, IndexError, OverflowError, TypeError, AttributeError) as error:  # zipfile's, on odd entries
        raise damaged(origin, f"{INDEX}: no zip file that can be read ({error})") from error
    count = len(columns["shard"])
    for name, (_, tail) in COLUMNS.items():
        if columns[name].shape != (count, *tail):
            raise damaged(origin, f"{INDEX}: column {name} has the shape {columns[name].shape}")
    return columns


def _column(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    entry = archive.getinfo(f"{name}.npy")
    if entry.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"column {name} is compressed")
    data = archive.read(entry)
    if data[:8] != b"\x93NUMPY\x01\x00":
        raise ValueError(f"column {name} has an unknown header")
    start = 10 + int.from_bytes(data[8:10], "little")
    header = _HEADER.fullmatch(data[10:start])
    if header is None:
        raise ValueError(f"column {name} has a header that numpy does not write")
    descr, fortran = header[1].decode("ascii", "replace"), header[2] == b"True"
    shape = tuple(int(side) for side in (header[3] or b"").split(b",") if side)
    dtype = np.dtype("|u1" if name == KEY_TEXT else COLUMNS[name][0])
    size = math.prod(shape) * dtype.itemsize
    if descr != dtype.str or fortran or min(shape, default=-1) < 0 or size != len(data) - start:
        raise ValueError(f"column {name} claims {shape} of {descr}, which is not what it holds")
    return np.frombuffer(data, dtype, offset=start).reshape(shape)


def max_index_bytes(manifest: "Manifest") -> int:
    """An upper bound of the index file's size, from the number of images and the machine's memory."""
    each = _MAX_KEY_BYTES + sum(np.dtype(kind).itemsize * math.prod(tail) for kind, tail in COLUMNS.values())
    return min(_MAX_KEY_BYTES + each * max(0, manifest.images), memory_total() // 2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """`pack.json`."""

    images: int
    classes: tuple[str, ...]
    shard_bytes: tuple[int, ...]
    index_sha256: str
    fingerprint: str
    settings: dict[str, Any]
    """The source's identity, max_side, jpeg_quality, shard_megabytes."""
    summary: dict[str, Any]
    """Numbers of re-encoded and left-out images by reason."""

    def dump(self) -> str:
        fields = {name: getattr(self, name) for name in self.__slots__}
        return json.dumps({"kind": "repcon pack", "format": FORMAT, **fields}, indent=1, ensure_ascii=False) + "\n"


def load_manifest(data: bytes, origin: str) -> Manifest:
    """Raises UserError naming the field that is missing, of another type, or of another format version."""
    if len(data) > MAX_MANIFEST_BYTES:
        raise damaged(origin, f"{MANIFEST}: more than {MAX_MANIFEST_BYTES} bytes are too many for a manifest")
    try:
        values = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise damaged(origin, f"{MANIFEST}: {error}") from error
    if not isinstance(values, dict) or values.get("kind") != "repcon pack":
        raise UserError(f"{origin}: its {MANIFEST} is not that of a pack; make one with `repcon pack`")
    if values.get("format") != FORMAT:
        raise UserError(f"{origin}: a pack of format {values.get('format')}, this version reads {FORMAT}; pack again")
    manifest = Manifest(
        images=_field(values, "images", int, origin),
        classes=tuple(_field(values, "classes", list, origin, str)),
        shard_bytes=tuple(_field(values, "shard_bytes", list, origin, int)),
        index_sha256=_field(values, "index_sha256", str, origin),
        fingerprint=_field(values, "fingerprint", str, origin),
        settings=_field(values, "settings", dict, origin),
        summary=_field(values, "summary", dict, origin),
    )
    _check_classes(manifest.classes, origin)
    return manifest


def _check_classes(classes: tuple[str, ...], origin: str) -> None:
    """Raises UserError for duplicate class names, or names that are not valid Unicode."""
    if len(set(classes)) != len(classes):
        raise damaged(origin, f"{MANIFEST}: classes names one twice")
    try:
        "".join(classes).encode()
    except UnicodeEncodeError as error:
        raise damaged(origin, f"{MANIFEST}: classes holds a name that is no Unicode text") from error


def _field(values: dict[str, Any], name: str, kind: type, origin: str, inner: type = object) -> Any:
    value = values.get(name)
    if type(value) is not kind or (isinstance(value, list) and not all(isinstance(entry, inner) for entry in value)):
        raise damaged(origin, f"{MANIFEST}: {name} is missing or of another type")
    return value


def validate(columns: Columns, manifest: Manifest, origin: str) -> None:
    """Checks the bounds of every column of the index. Raises UserError naming the column."""
    if not all(0 <= size <= MAX_SHARD_BYTES for size in manifest.shard_bytes):
        raise damaged(origin, f"{MANIFEST}: shard_bytes out of bounds")
    shards = np.array(manifest.shard_bytes, np.float64)
    shard, end = columns["shard"], columns["key_end"]
    width, height = columns["size"].astype(np.int64).T
    valid = (shard >= 0) & (shard < len(shards))
    available = np.where(valid, shards[np.where(valid, shard, 0)], 0) if len(shards) else np.zeros(len(shard))
    problems = {
        "images": len(shard) != manifest.images,
        "shard": not valid.all(),
        "offset": bool((columns["offset"] < 0).any() or (columns["offset"] > available - columns["length"]).any()),
        "length": bool((columns["length"] < 1).any() or (columns["length"] > MAX_JPEG_BYTES).any()),
        "size": bool((width < 1).any() or (height < 1).any() or (np.maximum(width, height) > 65_535).any()),
        "size's pixels": bool((width * height > MAX_PIXELS).any()),
        "label": bool((columns["label"] < -1).any() or (columns["label"] >= len(manifest.classes)).any()),
        "key_end": bool(
            (np.diff(end, prepend=0) < 0).any() or (end < 0).any() or end.max(initial=0) > len(columns[KEY_TEXT])
        ),
    }
    invalid = [name for name, found in problems.items() if found]
    if invalid:
        raise damaged(origin, f"{INDEX}: {', '.join(invalid)} out of bounds")
    if fingerprint(columns["hash"], columns["size"]) != manifest.fingerprint:
        raise damaged(origin, f"{INDEX} is not the one that the fingerprint in {MANIFEST} was made of")


def damaged(origin: str, what: str) -> UserError:
    return UserError(f"{origin}: the pack is damaged ({what}); copy it again or pack the images again")


class Keys(Sequence[str]):
    """The images' keys, decoded on access from one array of UTF-8 bytes."""

    def __init__(self, columns: Columns) -> None:
        self._text, self._ends = columns[KEY_TEXT], columns["key_end"]

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, image: int) -> str: ...
    @overload
    def __getitem__(self, image: slice) -> list[str]: ...
    def __getitem__(self, image: int | slice) -> str | list[str]:
        if isinstance(image, slice):
            return [self[number] for number in range(*image.indices(len(self)))]
        number = range(len(self))[image]
        start = int(self._ends[number - 1]) if number else 0
        return self._text[start : int(self._ends[number])].tobytes().decode("utf-8", "replace")
