"""The shards of a pack that is being written: one WebDataset tar at a time, with its record beside it."""

import contextlib
import json
import os
import tarfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from repcon.images.format import COLUMNS, KEY_TEXT, Columns, dump_index, load_index, shard_name
from repcon.images.jpeg import Encoded
from repcon.images.sources import Item
from repcon.runtime.open_files import open_own, sync_folder

BLOCK = 512
_BLANK = tarfile.TarInfo().tobuf(tarfile.GNU_FORMAT)


@dataclass(slots=True, kw_only=True)
class Part:
    """What a finished shard holds and what was left out on its way."""

    bytes: int
    next: int
    """The number of the source's image that comes after this shard."""
    left_out: list[tuple[str, str]] = field(default_factory=list)
    changes: Counter[str] = field(default_factory=Counter)
    """How many images were re-encoded, by reason."""
    columns: Columns = field(default_factory=dict)

    def save(self, folder: Path, number: int) -> None:
        """Writes `NUMBER.npz`, then `NUMBER.json`, which says that the shard is finished."""
        write_file(folder / f"{number:05d}.npz", dump_index(self.columns))
        record = {"bytes": self.bytes, "next": self.next, "left_out": self.left_out, "changes": self.changes}
        write_file(folder / f"{number:05d}.json", json.dumps(record).encode())

    @classmethod
    def load(cls, folder: Path, number: int) -> "Part":
        """Reads what `save` wrote; FileNotFoundError where the shard is not finished."""
        record = json.loads((folder / f"{number:05d}.json").read_text(encoding="utf-8"))
        columns = load_index((folder / f"{number:05d}.npz").read_bytes(), str(folder))
        left_out = [(name, reason) for name, reason in record["left_out"]]
        changes = Counter(record["changes"])
        size, start = record["bytes"], record["next"]
        return cls(bytes=size, next=start, left_out=left_out, changes=changes, columns=columns)


class Shard:
    """The shard that is being written; it gets its name only when it is complete and on disk."""

    def __init__(self, out: Path, number: int, start: int) -> None:
        self.number, self.bytes = number, 0
        self.part = Part(bytes=0, next=start)
        self._path = out / shard_name(number)
        self._temporary = out / f".{shard_name(number)}.tmp"
        self._file = open_own(self._temporary, "wb")
        self._rows: list[tuple[int, int, int, int, bytes, int]] = []
        self._keys: list[bytes] = []

    def __len__(self) -> int:
        return len(self._keys)

    def add(self, item: Item, image: Encoded) -> None:
        """Appends KEY.jpg, and KEY.cls where the image has a label."""
        offset = self._member(f"{item.key}.jpg", image.data)
        self._rows.append((offset, len(image.data), image.width, image.height, image.digest, item.label))
        self._keys.append(item.key.encode())
        if item.label >= 0:
            self._member(f"{item.key}.cls", str(item.label).encode())
        if image.change:
            self.part.changes[image.change] += 1

    def _member(self, name: str, data: bytes) -> int:
        """Gives the offset of the member's data. All but name and length is fixed, so equal input gives equal bytes."""
        header = member_header(name, len(data))
        self._file.write(header)
        self._file.write(data)
        self._file.write(bytes(-len(data) % BLOCK))
        offset = self.bytes + len(header)
        self.bytes = offset + len(data) + -len(data) % BLOCK
        return offset

    def close(self) -> Part:
        """Ends the tar and puts it on disk under its name; gives its record."""
        self._file.write(bytes(2 * BLOCK))
        self.bytes += 2 * BLOCK
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._temporary, self._path)
        sync_folder(self._path.parent)
        self.part.bytes, self.part.columns = self.bytes, self._columns()
        return self.part

    def discard(self) -> None:
        """Forgets what was written."""
        with contextlib.suppress(OSError):  # a full disk, which is being reported already
            self._file.close()
        self._temporary.unlink(missing_ok=True)

    def _columns(self) -> Columns:
        offsets, lengths, widths, heights, digests, labels = zip(*self._rows, strict=True)
        return {
            "shard": np.full(len(offsets), self.number, "<i4"),
            "offset": np.array(offsets, "<i8"),
            "length": np.array(lengths, "<i4"),
            "size": np.array([widths, heights], "<i4").T.copy(),
            "hash": np.frombuffer(b"".join(digests), "|u1").reshape(-1, 16),
            "label": np.array(labels, "<i4"),
            "key_end": np.cumsum([len(key) for key in self._keys]).astype("<i8"),
            KEY_TEXT: np.frombuffer(b"".join(self._keys), "|u1"),
        }


def member_header(name: str, size: int) -> bytes:
    """A member's GNU header. Short names are filled in here: tarfile's own bytes, in a fraction of its time."""
    encoded = name.encode()
    if len(encoded) > 100 or size >= 8**11:
        info = tarfile.TarInfo(name)
        info.size = size
        return info.tobuf(tarfile.GNU_FORMAT, "utf-8", "strict")
    before, after = encoded.ljust(100, b"\0") + _BLANK[100:124] + b"%011o\0" % size + _BLANK[136:148], _BLANK[156:]
    checksum = sum(before) + sum(after) + 8 * ord(" ")
    return before + b"%06o\0 " % checksum + after


def assemble(parts: list[Part]) -> Columns:
    """The whole pack's index columns, in order."""
    columns = {name: np.concatenate([part.columns[name] for part in parts]) for name in (*COLUMNS, KEY_TEXT)}
    start = row = 0
    for part in parts:  # each part's key ends count from its own first key
        rows = len(part.columns["key_end"])
        columns["key_end"][row : row + rows] += start
        row, start = row + rows, start + len(part.columns[KEY_TEXT])
    return columns


def write_file(path: Path, data: bytes) -> None:
    """Writes a whole file to disk so that a crash leaves the old one or the new one."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open_own(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)
