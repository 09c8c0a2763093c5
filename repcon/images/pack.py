"""Read a pack: the images of teachers and students, identified by content hashes.

`repcon pack` (`repcon.commands.pack`) writes one; `ImagePack` reads it, from a path or a URL.
Images are identified by their content, not by their position or name.
"""

import hashlib
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

import numpy as np

from repcon.config import ClassSubset
from repcon.images import format as pack_format
from repcon.images.format import INDEX, MANIFEST, MAX_MANIFEST_BYTES, Keys, Manifest, shard_name
from repcon.images.jpeg import InvalidImageError, content_hash, read_header
from repcon.runtime.errors import UserError
from repcon.runtime.filesystem import RangeReader, open_filesystem
from repcon.runtime.local_files import error_reason, is_transient
from repcon.runtime.text import abbreviate

BLOCK_BYTES = 8 << 20
PREFETCHED_BLOCKS, CACHED_BLOCKS = 2, 12
"""Blocks that are fetched in advance, and blocks that are kept: memory stays below 100 MB."""


class ImagePack:
    """A read-only pack. Thread-safe; unpickling opens it again.

    The index is held in memory, about 60 bytes and the key per image; images are not.
    """

    def __init__(
        self, url: str, files: RangeReader, manifest: Manifest, columns: pack_format.Columns, check: bool
    ) -> None:
        self.url = url
        self.check = check
        self.fingerprint = manifest.fingerprint
        """SHA-256 in hex over the ordered content hashes and sizes, by which label stores refer to the pack."""
        self.classes = manifest.classes
        """Class names, () where nothing is labelled."""
        self.keys = Keys(columns)
        self.sizes = columns["size"]
        """(N, 2) int32: width, height."""
        self.hashes = columns["hash"]
        """(N, 16) uint8: content hash of the JPEG's bytes."""
        self.labels = columns["label"]
        """(N,) int32, -1 where unlabelled."""
        self.lengths = columns["length"]
        """(N,) int32: bytes of each JPEG."""
        self._files, self._shard, self._offset = files, columns["shard"], columns["offset"]
        self._unchecked = bytearray(b"\1" * len(self.labels) if check else len(self.labels))

    @classmethod
    def open(cls, url: str | Path, *, check: bool = True) -> "ImagePack":
        """Opens a pack by path or URL.

        With `check`, each image's bytes are compared with their content hash, and its header with the index, at the
        first read. Raises UserError where there is no pack, or its index is damaged or of another version.
        """
        files = open_filesystem(str(url) if "://" in str(url) else os.path.abspath(url), follow_links=True)
        origin = files.root
        try:
            manifest = pack_format.load_manifest(files.read(MANIFEST, 0, MAX_MANIFEST_BYTES + 1), origin)
            size, most = files.size(INDEX), pack_format.max_index_bytes(manifest)
            if size is not None and size > most:
                what = f"{INDEX} has {size:,} bytes, of which at most {most:,} are read"
                raise pack_format.damaged(origin, what)
            index = files.read(INDEX, 0, most)
        except OSError as error:
            if is_transient(error):
                raise UserError(f"{origin}: the pack cannot be read now ({error_reason(error)}); try again") from error
            raise UserError(
                f"{origin}: no finished pack there ({error_reason(error)}); make one with `repcon pack`"
            ) from error
        if hashlib.sha256(index).hexdigest() != manifest.index_sha256:
            raise UserError(f"{origin}: {INDEX} has changed since it was packed; copy the pack again or pack again")
        columns = pack_format.load_index(index, origin)
        pack_format.validate(columns, manifest, origin)
        return cls(origin, files, manifest, columns, check)

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def largest(self) -> int:
        """Number of pixels of the largest image; 1 in an empty pack."""
        return int(self.sizes.astype(np.int64).prod(axis=1).max(initial=1))

    @cached_property
    def widest(self) -> int:
        """Width of the widest image in pixels; 1 in an empty pack."""
        return int(self.sizes[:, 0].max(initial=1))

    def __reduce__(self) -> tuple[Callable[..., "ImagePack"], tuple[str, bool, str]]:
        return _reopen, (self.url, self.check, self.fingerprint)

    def read(self, image: int) -> bytes:
        """The JPEG of row `image`. Raises UserError naming pack, key and shard where it is missing or has changed."""
        name = shard_name(int(self._shard[image]))
        length = int(self.lengths[image])
        try:
            data = self._files.read_range(name, int(self._offset[image]), length)
        except OSError as error:
            if is_transient(error):
                words = f"image {self.keys[image]} in {name} cannot be read now ({error_reason(error)})"
                raise UserError(f"{self.url}: {words}; the pack itself may be whole: try again") from error
            raise self._damage(image, name, f"cannot be read ({error_reason(error)})") from error
        if len(data) != length:
            # A file that ends early is not damage of one image: what skips damaged images must stop here.
            short = OSError("the file ends early")
            raise self._damage(image, name, f"is cut off: {len(data)} of {length} bytes are there") from short
        if self._unchecked[image]:
            self._verify(image, name, data)
            self._unchecked[image] = 0
        return data

    def _verify(self, image: int, shard: str, data: bytes) -> None:
        if content_hash(data) != self.hashes[image].tobytes():
            raise self._damage(image, shard, "has changed since it was packed")
        try:
            header = read_header(data)
        except InvalidImageError as error:
            raise self._damage(image, shard, f"is no JPEG ({error})") from error
        if (header.width, header.height) != tuple(self.sizes[image]):
            raise self._damage(image, shard, f"is {header.width} x {header.height} pixels, not as the index says")

    def _damage(self, image: int, shard: str, what: str) -> UserError:
        remedy = "restore that file, or pack the images again into a new folder"
        return UserError(f"{self.url}: image {self.keys[image]} in {shard} {what}; {remedy}")


class ReadAheadPack(ImagePack):
    """A pack behind a URL that is read in blocks ahead of use, for images that are read in the pack's order.

    One request per image would cost an object store's price and latency about a hundred times as often.
    """

    def __init__(
        self, url: str, files: RangeReader, manifest: Manifest, columns: pack_format.Columns, check: bool
    ) -> None:
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


def _reopen(url: str, check: bool, fingerprint: str) -> ImagePack:
    pack = ImagePack.open(url, check=check)
    if pack.fingerprint != fingerprint:
        raise UserError(f"{url}: the pack was replaced by another while it was in use; start the command again")
    return pack


def count_shared_images(first: np.ndarray, second: np.ndarray) -> int:
    """Number of images that two sets share, by their content hashes, each (n, 16) uint8."""
    return len(set(map(bytes, first)) & set(map(bytes, second)))


def select_classes(pack: ImagePack, subset: ClassSubset) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """Select the images of a subset of the classes, by name or as a seeded slice.

    For a slice, classes with images are ordered by a hash of (seed, name), independent of random generators. Gives
    increasing rows (n,) int64, labels (n,) int64 from 0 to c - 1, and the c names in the pack's order. Raises UserError
    where the pack has no labels, or none of a class that is named, or fewer than two classes are left.
    """
    present = np.unique(pack.labels[pack.labels >= 0])
    if not len(present):
        raise UserError(f"{pack.url}: its images have no labels; pack a folder with a sub-folder per class")
    chosen = _named_classes(pack, subset, present) if subset.names else _class_slice(pack, subset, present)
    if len(chosen) < 2:
        raise UserError(f"{pack.url}: {len(chosen)} of its {len(present)} classes chosen; at least two are needed")
    rows = np.flatnonzero(np.isin(pack.labels, chosen))
    return rows, np.searchsorted(chosen, pack.labels[rows]), tuple(pack.classes[label] for label in chosen)


def _class_slice(pack: ImagePack, subset: ClassSubset, present: np.ndarray) -> np.ndarray:
    """The labels of the seeded slice, rising."""
    if not 0 <= subset.start < subset.stop <= 1:
        raise UserError(f"classes: start = {subset.start}, stop = {subset.stop}: must rise and lie between 0 and 1")
    order = sorted(present, key=lambda label: hashlib.sha256(f"{subset.seed}/{pack.classes[label]}".encode()).digest())
    return np.sort(order[round(subset.start * len(order)) : round(subset.stop * len(order))])


def _named_classes(pack: ImagePack, subset: ClassSubset, present: np.ndarray) -> np.ndarray:
    """The labels of the named classes, rising. What is a class's name counts as that, also where it is a number."""
    if (subset.start, subset.stop) != (0.0, 1.0):
        raise UserError("classes: some are named together with start or stop; name classes, or take a slice of all")
    known = {pack.classes[label]: int(label) for label in present}
    by_number = {str(label): int(label) for label in present}
    labels = [known.get(name, by_number.get(name)) for name in subset.names]
    if unknown := [name for name, label in zip(subset.names, labels, strict=True) if label is None]:
        raise UserError(
            f"classes: {', '.join(unknown)}: no class of {pack.url} with images; it has {abbreviate(list(known))}, "
            f"by number 0 to {len(pack.classes) - 1}"
        )
    if len(set(labels)) < len(labels):
        twice = next(name for name, label in zip(subset.names, labels, strict=True) if labels.count(label) > 1)
        raise UserError(f"classes: {twice} is named twice; name each class once")
    return np.sort(np.array(labels, np.int64))
