"""Packs behind URLs in large pieces: the same bytes in few requests, bounded memory, and failures that may pass."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from object_servers import upload
from precompute_case import pack_path

from repcon.images import pack as pack_module
from repcon.images.pack import BlockCache, ImagePack, ReadAheadPack

__all__ = ["pack_path"]


class Counted:
    """One shard of numbered bytes; `fail` names requests that the network loses."""

    def __init__(self, length: int) -> None:
        self.data = (np.arange(length) % 251).astype(np.uint8).tobytes()
        self.asked: list[int] = []
        self.fail: set[int] = set()
        self._lock = threading.Lock()

    def read_range(self, name: str, start: int, length: int) -> bytes:
        with self._lock:
            self.asked.append(start)
        if start in self.fail:
            raise OSError("the network is gone")
        return self.data[start : start + length]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(pack_module, "BLOCK_BYTES", 1000)


def test_parts_are_what_they_would_be_and_each_block_is_asked_for_once():
    files = Counted(25_300)
    blocks = BlockCache(files, [25_300])
    parts = [blocks.read_range("shard-00000.tar", start, 70) for start in range(0, 25_300, 70)]
    assert b"".join(parts) == files.data
    assert sorted(files.asked) == [1000 * number for number in range(26)]
    assert blocks.read_range("shard-00000.tar", 25_290, 50) == files.data[25_290:]
    assert blocks.read_range("shard-00000.tar", 7_900, 2_500) == files.data[7_900:10_400]


def test_few_blocks_are_held():
    blocks = BlockCache(Counted(100_000), [100_000])
    for start in range(0, 100_000, 500):
        blocks.read_range("shard-00000.tar", start, 100)
    assert len(blocks._blocks) <= pack_module.CACHED_BLOCKS


def test_threads_that_want_the_same_block_wait_for_one_request():
    files = Counted(3_000)
    blocks = BlockCache(files, [3_000])
    with ThreadPoolExecutor(16) as pool:
        parts = list(pool.map(lambda start: blocks.read_range("shard-00000.tar", start, 10), range(0, 3_000, 10)))
    assert b"".join(parts) == files.data and sorted(files.asked) == [0, 1000, 2000]


def test_a_failed_request_is_told_and_tried_again():
    files = Counted(5_000)
    files.fail = {0, 2000}
    blocks = BlockCache(files, [5_000])
    with pytest.raises(OSError, match="network"):
        blocks.read_range("shard-00000.tar", 10, 10)
    files.fail = set()
    assert blocks.read_range("shard-00000.tar", 10, 10) == files.data[10:20]
    assert blocks.read_range("shard-00000.tar", 2500, 10) == files.data[2500:2510]


def test_a_pack_behind_a_url_reads_the_same_images(pack_path):
    upload(pack_path, "memory://nearby")
    near, plain = ReadAheadPack.open("memory://nearby"), ImagePack.open(pack_path)
    assert near.fingerprint == plain.fingerprint
    assert all(near.read(row) == plain.read(row) for row in range(len(plain)))
