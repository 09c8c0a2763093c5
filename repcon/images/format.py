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
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, overload

import numpy as np

from repcon.config import parse
from repcon.images.jpeg import MAX_PIXELS
from repcon.runtime.errors import UserError, first_line
from repcon.runtime.memory import memory_total

FORMAT = 1
_HEAD = {"kind": "repcon pack", "format": FORMAT}
"""The first fields of a manifest."""
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
_MAX_HEADER_BYTES = 1 << 9
"""Of a column; of a longer one Python's parser may say that memory is short."""

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
    """Reads an index as read-only columns; allocates no more than `data` takes, whatever its headers claim.

    Raises UserError, and MemoryError where memory is short.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            columns = {name: _column(archive, name) for name in (*COLUMNS, KEY_TEXT)}
    except MemoryError:
        raise
    except Exception as error:  # zipfile and numpy raise many kinds on damaged files
        raise damaged(origin, f"{INDEX}: {first_line(error)}") from error
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
    file = io.BytesIO(data)
    np.lib.format.read_magic(file)
    shape, fortran, found = np.lib.format.read_array_header_1_0(file, _MAX_HEADER_BYTES)
    dtype, start = np.dtype("|u1" if name == KEY_TEXT else COLUMNS[name][0]), file.tell()
    size = math.prod(shape) * dtype.itemsize
    if found != dtype or fortran or min(shape, default=-1) < 0 or size != len(data) - start:
        raise ValueError(f"column {name} claims {shape} of {found}, which is not what it holds")
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
    summary: dict[str, dict[str, int]]
    """Numbers of re-encoded and left-out images by reason."""

    def dump(self) -> str:
        return json.dumps(_HEAD | asdict(self), indent=1, ensure_ascii=False) + "\n"


def load_manifest(data: bytes, origin: str) -> Manifest:
    """Raises UserError naming the fields that are missing, unknown or of another type, and for another version."""
    if len(data) > MAX_MANIFEST_BYTES:
        raise damaged(origin, f"{MANIFEST}: more than {MAX_MANIFEST_BYTES} bytes are too many for a manifest")
    try:
        values = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise damaged(origin, f"{MANIFEST}: {error}") from error
    if not isinstance(values, dict) or values.get("kind") != _HEAD["kind"]:
        raise UserError(f"{origin}: its {MANIFEST} is not that of a pack; make one with `repcon pack`")
    if values.get("format") != FORMAT:
        raise UserError(f"{origin}: a pack of format {values.get('format')}, this version reads {FORMAT}; pack again")
    try:
        manifest = parse(Manifest, {name: value for name, value in values.items() if name not in _HEAD}, MANIFEST)
    except UserError as error:
        raise damaged(origin, str(error)) from error
    if len(set(manifest.classes)) != len(manifest.classes):
        raise damaged(origin, f"{MANIFEST}: classes names one twice")
    try:
        "".join(manifest.classes).encode()
    except UnicodeEncodeError as error:
        raise damaged(origin, f"{MANIFEST}: classes holds a name that is no Unicode text") from error
    return manifest


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
