"""Shards: their headers against tarfile's, their records."""

import tarfile
from pathlib import Path

import numpy as np
import pytest

from repcon.images.jpeg import Encoded, content_hash
from repcon.images.shards import Part, Shard, assemble, member_header
from repcon.images.sources import Item


@pytest.mark.parametrize("size", [0, 1, 511, 512, 123_456, 8**11 - 1, 8**11])
@pytest.mark.parametrize("name", ["a.jpg", "x" * 96 + ".jpg", "x" * 97 + ".jpg", "猫/ü 1.jpg", "ü" * 50, "ü" * 51])
def test_headers_are_those_of_tarfile(name: str, size: int) -> None:
    info = tarfile.TarInfo(name)
    info.size = size
    assert member_header(name, size) == info.tobuf(tarfile.GNU_FORMAT, "utf-8", "strict")


def written(out: Path, number: int, keys: list[str]) -> Part:
    shard = Shard(out, number, 10 * number)
    for key in keys:
        data = key.encode() * 300
        image = Encoded(data, 7, 5, content_hash(data), "PNG" if key == "b" else "")
        shard.add(Item(f"{key}.png", key, "", 0, 0, 3), image)
    shard.part.next += len(keys)
    shard.part.left_out.append(("läst.txt", "text"))
    return shard.close()


def test_records_come_back_and_join(tmp_path: Path) -> None:
    parts = [written(tmp_path, 0, ["a", "b"]), written(tmp_path, 1, ["ccc"])]
    for number, part in enumerate(parts):
        part.save(tmp_path, number)
    back = [Part.load(tmp_path, number) for number in range(2)]
    for part, loaded in zip(parts, back, strict=True):
        assert (loaded.bytes, loaded.next) == (part.bytes, part.next)
        assert (loaded.left_out, loaded.changes) == (part.left_out, part.changes)
    assert back[0].changes == {"PNG": 1} and back[1].next == 11
    columns = assemble(back)
    assert columns["shard"].tolist() == [0, 0, 1] and columns["key_end"].tolist() == [1, 2, 5]
    for row, key in enumerate(["a", "b", "ccc"]):
        shard = (tmp_path / f"shard-{columns['shard'][row]:05d}.tar").read_bytes()
        start = int(columns["offset"][row])
        assert shard[start : start + int(columns["length"][row])] == key.encode() * 300
    assert (columns["size"] == np.array([7, 5])).all() and (columns["label"] == 3).all()
    with pytest.raises(FileNotFoundError):
        Part.load(tmp_path, 2)


def test_a_discarded_shard_leaves_nothing(tmp_path: Path) -> None:
    Shard(tmp_path, 0, 0).discard()
    assert not list(tmp_path.iterdir())
