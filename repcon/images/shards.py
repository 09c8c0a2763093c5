"""Write the shards of a pack, one WebDataset tar at a time, each with a record of its content."""

import json
import tarfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from repcon.images.encode import Encoded
from repcon.images.format import COLUMNS, KEY_TEXT, Columns, dump_index, load_index, shard_name
from repcon.images.sources import SourceItem
from repcon.runtime.atomic_files import AtomicFile, write_atomic


@dataclass(slots=True, kw_only=True)
class ShardRecord:
    """Record of a finished shard: its index rows, and the images that were left out of it."""

    bytes: int
    next: int
    """Number of the first image of the source after this shard."""
    left_out: list[tuple[str, str]] = field(default_factory=list)
    changes: Counter[str] = field(default_factory=Counter)
    """Number of re-encoded images by reason."""
    columns: Columns = field(default_factory=dict)

    def save(self, folder: Path, number: int) -> None:
        """Writes `NUMBER.npz`, then `NUMBER.json`, which marks the shard as finished."""
        write_atomic(folder / f"{number:05d}.npz", dump_index(self.columns))
        record = {"bytes": self.bytes, "next": self.next, "left_out": self.left_out, "changes": self.changes}
        write_atomic(folder / f"{number:05d}.json", json.dumps(record).encode())

    @classmethod
    def load(cls, folder: Path, number: int) -> "ShardRecord":
        """Reads what `save` wrote. Raises FileNotFoundError where the shard is not finished."""
        record = json.loads((folder / f"{number:05d}.json").read_text(encoding="utf-8"))
        columns = load_index((folder / f"{number:05d}.npz").read_bytes(), str(folder))
        left_out = [(name, reason) for name, reason in record["left_out"]]
        changes = Counter(record["changes"])
        size, start = record["bytes"], record["next"]
        return cls(bytes=size, next=start, left_out=left_out, changes=changes, columns=columns)


class ShardWriter:
    """Writes one shard; the file gets its name once it is complete and on disk."""

    def __init__(self, out: Path, number: int, start: int) -> None:
        self.number, self.bytes = number, 0
        self.record = ShardRecord(bytes=0, next=start)
        self._file = AtomicFile(out / shard_name(number))
        self._rows: list[tuple[int, int, int, int, bytes, int]] = []
        self._keys: list[bytes] = []

    def __len__(self) -> int:
        return len(self._keys)

    def add(self, item: SourceItem, image: Encoded) -> None:
        """Appends KEY.jpg, and KEY.cls where the image has a label."""
        offset = self._member(f"{item.key}.jpg", image.data)
        self._rows.append((offset, len(image.data), image.width, image.height, image.digest, item.label))
        self._keys.append(item.key.encode())
        if item.label >= 0:
            self._member(f"{item.key}.cls", str(item.label).encode())
        if image.change:
            self.record.changes[image.change] += 1

    def _member(self, name: str, data: bytes) -> int:
        """Appends a member; gives the offset of its data in the tar."""
        header = member_header(name, len(data))
        self._file.file.write(header)
        self._file.file.write(data)
        self._file.file.write(bytes(-len(data) % tarfile.BLOCKSIZE))
        offset = self.bytes + len(header)
        self.bytes = offset + len(data) + -len(data) % tarfile.BLOCKSIZE
        return offset

    def close(self) -> ShardRecord:
        """Ends the tar and commits it to disk; gives its record."""
        self._file.file.write(bytes(2 * tarfile.BLOCKSIZE))
        self.bytes += 2 * tarfile.BLOCKSIZE
        self._file.commit()
        self.record.bytes, self.record.columns = self.bytes, self._columns()
        return self.record

    def discard(self) -> None:
        """Deletes what was written; no effect after `close`."""
        self._file.abort()

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
    """A tar member's GNU header, in which all but name and size is fixed, so that equal input gives equal bytes."""
    info = tarfile.TarInfo(name)
    info.size = size
    return info.tobuf(tarfile.GNU_FORMAT, "utf-8", "strict")


def join_columns(records: list[ShardRecord]) -> Columns:
    """Concatenates the shards' index columns."""
    columns = {name: np.concatenate([record.columns[name] for record in records]) for name in (*COLUMNS, KEY_TEXT)}
    start = row = 0
    for record in records:  # each shard's key ends count from its own first key
        rows = len(record.columns["key_end"])
        columns["key_end"][row : row + rows] += start
        row, start = row + rows, start + len(record.columns[KEY_TEXT])
    return columns
