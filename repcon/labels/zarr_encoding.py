"""Array metadata and shards as zarr-python encodes them.

Shards are encoded in memory and written by `runtime.filesystem`, because zarr-python does not fsync; their hashes for
the completion records are computed on the way. Same input, same bytes.
"""

import json
from collections.abc import Iterator

import numcodecs.blosc
import numpy as np
import zarr
from zarr.codecs import BloscCodec, Crc32cCodec
from zarr.core.buffer import Buffer
from zarr.storage import MemoryStore

from repcon.config import Codec
from repcon.labels.layout import Layout, layouts_of
from repcon.labels.manifest import Manifest

# Chunks are encoded and decoded by several threads at once, which blosc's shared pool would serialise.
numcodecs.blosc.use_threads = False

# Bytes that blosc compresses as one: with zstd, larger blocks are smaller and faster (113 B per crop at 256 KiB, 116
# at 128); with lz4, 128 KiB decode a tenth faster than 256 KiB or 64.
BLOCK_BYTES = {"zstd": 2**18, "lz4": 2**17}
# Of zstd, level 2 compresses 2.5 times as fast as level 3, at 1 % more bytes.
LEVELS = {"zstd": 2, "lz4": 5}


def metadata_of(manifest: Manifest) -> Iterator[tuple[str, bytes]]:
    """Name and content of every `zarr.json`, groups included."""
    group = (json.dumps({"attributes": {}, "zarr_format": 3, "node_type": "group"}, indent=2) + "\n").encode()
    for name in sorted({"", "crops", "heads", *(f"heads/{teacher.name}" for teacher in manifest.teachers)}):
        yield f"{name}/zarr.json".lstrip("/"), group
    for layout in layouts_of(manifest):
        held: dict[str, Buffer] = {}
        _create(manifest, layout, held)
        yield f"{layout.path}/zarr.json", held["zarr.json"].to_bytes()


def encode_shard(manifest: Manifest, layout: Layout, name: str, crop: int, row: int, block: np.ndarray) -> bytes:
    """The bytes of the file `name`, the shard whose first element is (crop, row).

    `block` has all its elements, in the shape that the layout gives for its crops and images.
    """
    held: dict[str, Buffer] = {}
    array = _create(manifest, layout, held)
    images = block.shape[2 if layout.slots_first else 1]
    place = (slice(None), slice(row, row + images)) if layout.slots_first else (slice(row, row + images),)
    array[(slice(crop, crop + len(block)), *place)] = block
    return held[name.removeprefix(f"{layout.path}/")].to_bytes()


def compressed_bytes(codec: Codec, layout: Layout, chunk: np.ndarray) -> int:
    """Compressed size of a chunk, without its share of the shard's index."""
    shuffle = {"shuffle": numcodecs.blosc.SHUFFLE, "bitshuffle": numcodecs.blosc.BITSHUFFLE}[layout.shuffle]
    data = np.ascontiguousarray(chunk, layout.dtype)
    return len(numcodecs.blosc.compress(data, codec.encode(), LEVELS[codec], shuffle, BLOCK_BYTES[codec])) + 4


def _create(manifest: Manifest, layout: Layout, held: dict[str, Buffer]) -> zarr.Array:
    """An empty array whose files are in `held`: chunks of one crop, shards of several, each chunk with its crc32c."""
    codec, rows = manifest.codec, manifest.rows_per_shard
    blosc = BloscCodec(cname=codec, clevel=LEVELS[codec], shuffle=layout.shuffle, blocksize=BLOCK_BYTES[codec])
    names = ("crop", "slot", "image") if layout.slots_first else ("crop", "image", "slot")
    shape = layout.shape(manifest.crops, manifest.images)
    return zarr.create_array(
        MemoryStore(held),
        shape=shape,
        chunks=layout.shape(1, rows),
        shards=layout.shape(manifest.crops_per_shard, rows),
        dtype=layout.dtype,
        fill_value=layout.fill,
        filters=None,
        compressors=[blosc, Crc32cCodec()],
        dimension_names=names[: len(shape)],
        # Chunks of fill values only are written too: an absent chunk is damage.
        config={"write_empty_chunks": True},
    )
