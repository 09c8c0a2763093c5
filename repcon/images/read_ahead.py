"""A pack behind a URL, read in large pieces: a unit's images lie one behind the other, and are asked for in order.

One request per image would cost a store of objects its price and its latency some hundred times as often.
"""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from repcon.images.files import Files
from repcon.images.format import Columns, Manifest, shard_name
from repcon.images.pack import ImagePack

BLOCK_BYTES = 8 << 20
AHEAD_BLOCKS, HELD_BLOCKS = 2, 12
"""Blocks that are fetched before they are asked for, and blocks that are kept: memory stays below 100 MB."""


class ReadAheadPack(ImagePack):
    """A pack whose next images are on their way before they are asked for. Rows at random would waste all that."""

    def __init__(self, url: str, files: Files, manifest: Manifest, columns: Columns, check: bool) -> None:
        super().__init__(url, BlockCache(files, manifest.shard_bytes), manifest, columns, check)


class BlockCache:
    """Shards of known lengths, read block by block; threads that want the same block wait for one request."""

    def __init__(self, files: Files, shard_bytes: Sequence[int]) -> None:
        self._files = files
        self._lengths = {shard_name(number): size for number, size in enumerate(shard_bytes)}
        self._held: OrderedDict[tuple[str, int], Future[bytes]] = OrderedDict()
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(AHEAD_BLOCKS + 1, thread_name_prefix="repcon-blocks")

    def whole(self, name: str, most: int) -> bytes:
        """See `images.files.Files`."""
        return self._files.whole(name, most)

    def part(self, name: str, offset: int, length: int) -> bytes:
        """See `images.files.Files`. Raises OSError where a block cannot be read; it is tried again when asked again."""
        first, last = offset // BLOCK_BYTES, (offset + max(length, 1) - 1) // BLOCK_BYTES
        with self._lock:
            wanted = [self._block(name, number) for number in range(first, last + 1)]
            for number in range(last + 1, last + 1 + AHEAD_BLOCKS):
                if number * BLOCK_BYTES < self._lengths[name]:
                    self._block(name, number)
            while len(self._held) > HELD_BLOCKS:
                self._held.popitem(last=False)
        start = offset - first * BLOCK_BYTES
        if len(wanted) == 1:
            return wanted[0].result()[start : start + length]
        return b"".join(block.result() for block in wanted)[start : start + length]

    def _block(self, name: str, number: int) -> "Future[bytes]":
        """The block, or its future; one whose request failed is asked for anew."""
        place = name, number
        held = self._held.get(place)
        if held is None or (held.done() and held.exception() is not None):
            held = self._held[place] = self._pool.submit(self._files.part, name, number * BLOCK_BYTES, BLOCK_BYTES)
        self._held.move_to_end(place)
        return held
