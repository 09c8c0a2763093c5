"""Shards: the bytes of their headers, their records."""

import hashlib
import tarfile
from pathlib import Path

import numpy as np
import pytest

from repcon.images.encode import Encoded
from repcon.images.jpeg import content_hash
from repcon.images.shards import ShardRecord, ShardWriter, join_columns, member_header
from repcon.images.sources import SourceItem


def test_headers_have_the_bytes_of_the_first_packs() -> None:
    digest = hashlib.sha256()
    for size in [0, 1, 511, 512, 123_456, 8**11 - 1, 8**11]:
        for name in ["a.jpg", "x" * 96 + ".jpg", "x" * 97 + ".jpg", "猫/ü 1.jpg", "ü" * 50, "ü" * 51]:
            header = member_header(name, size)
            info = tarfile.TarInfo.frombuf(header[-512:], "utf-8", "strict")
            assert info.size == size and info.isreg()
            digest.update(header)
    assert digest.hexdigest() == "641f15ecb6fb0e35e9140f13d1a13e0c0dead68e8e41578bf9a46cae746f7493"


def written(out: Path, number: int, keys: list[str]) -> ShardRecord:
    shard = ShardWriter(out, number, 10 * number)
    for key in keys:
        data = key.encode() * 300
        image = Encoded(data, 7, 5, content_hash(data), "PNG" if key == "b" else "")
        shard.add(SourceItem(f"{key}.png", key, "", 0, 0, 3), image)
    shard.record.next += len(keys)
    shard.record.left_out.append(("läst.txt", "text"))
    return shard.close()


def test_records_come_back_and_join(tmp_path: Path) -> None:
    parts = [written(tmp_path, 0, ["a", "b"]), written(tmp_path, 1, ["ccc"])]
    for number, part in enumerate(parts):
        part.save(tmp_path, number)
    back = [ShardRecord.load(tmp_path, number) for number in range(2)]
    for part, loaded in zip(parts, back, strict=True):
        assert (loaded.bytes, loaded.next) == (part.bytes, part.next)
        assert (loaded.left_out, loaded.changes) == (part.left_out, part.changes)
    assert back[0].changes == {"PNG": 1} and back[1].next == 11
    columns = join_columns(back)
    assert columns["shard"].tolist() == [0, 0, 1] and columns["key_end"].tolist() == [1, 2, 5]
    for row, key in enumerate(["a", "b", "ccc"]):
        shard = (tmp_path / f"shard-{columns['shard'][row]:05d}.tar").read_bytes()
        start = int(columns["offset"][row])
        assert shard[start : start + int(columns["length"][row])] == key.encode() * 300
    assert (columns["size"] == np.array([7, 5])).all() and (columns["label"] == 3).all()
    with pytest.raises(FileNotFoundError):
        ShardRecord.load(tmp_path, 2)


def test_a_discarded_shard_leaves_nothing(tmp_path: Path) -> None:
    ShardWriter(tmp_path, 0, 0).discard()
    assert not list(tmp_path.iterdir())
