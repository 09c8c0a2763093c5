"""Read a pack behind a URL in large blocks ahead of use, for images that are read in the pack's order.

One request per image would cost an object store's price and latency about a hundred times as often.
"""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from repcon.images.format import Columns, Manifest, shard_name
from repcon.images.pack import ImagePack
from repcon.runtime.filesystem import RangeReader

BLOCK_BYTES = 8 << 20
PREFETCHED_BLOCKS, CACHED_BLOCKS = 2, 12
"""Blocks that are fetched in advance, and blocks that are kept: memory stays below 100 MB."""


class ReadAheadPack(ImagePack):
    """A pack that fetches the blocks after the one in use. Useless for random access."""

    def __init__(self, url: str, files: RangeReader, manifest: Manifest, columns: Columns, check: bool) -> None:
        super().__init__(url, BlockCache(files, manifest.shard_bytes), manifest, columns, check)


class BlockCache:
    """A cache of blocks of shards; threads that need the same block share one request.

    shard_bytes: the length of each shard.
    """

    def __init__(self, files: RangeReader, shard_bytes: Sequence[int]) -> None:
        self._files = files
        self._lengths = {shard_name(number): size for number, size in enumerate(shard_bytes)}
        self._blocks: OrderedDict[tuple[str, int], Future[bytes]] = OrderedDict()
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(PREFETCHED_BLOCKS + 1, thread_name_prefix="repcon-blocks")

    def read_range(self, name: str, start: int, length: int) -> bytes:
        """As `RangeReader.read_range`. A block whose request failed is requested again at the next call."""
        first, last = start // BLOCK_BYTES, (start + max(length, 1) - 1) // BLOCK_BYTES
        with self._lock:
            blocks = [self._block(name, number) for number in range(first, last + 1)]
            for number in range(last + 1, last + 1 + PREFETCHED_BLOCKS):
                if number * BLOCK_BYTES < self._lengths[name]:
                    self._block(name, number)
            while len(self._blocks) > CACHED_BLOCKS:
                self._blocks.popitem(last=False)
        start -= first * BLOCK_BYTES
        if len(blocks) == 1:
            return blocks[0].result()[start : start + length]
        return b"".join(block.result() for block in blocks)[start : start + length]

    def _block(self, name: str, number: int) -> "Future[bytes]":
        """The block's future; a block whose request failed is requested again."""
        key = name, number
        block = self._blocks.get(key)
        if block is None or (block.done() and block.exception() is not None):
            block = self._blocks[key] = self._pool.submit(
                self._files.read_range, name, number * BLOCK_BYTES, BLOCK_BYTES
            )
        self._blocks.move_to_end(key)
        return block
