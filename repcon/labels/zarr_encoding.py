"""The part of a store that zarr-python writes: array metadata and the bytes of a shard.

Shards are encoded in memory and put in place by `runtime.filesystem`, because zarr-python does not fsync; the markers'
hashes then cost no second reading. Same input, same bytes.
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

# Chunks are encoded and decoded in parallel by threads of their own; blosc's shared pool would serialise them.
numcodecs.blosc.use_threads = False

# Bytes that blosc compresses as one: with zstd, larger blocks are smaller and faster (113 B per crop at 256 KiB, 116
# at 128); with lz4, 128 KiB decode a tenth faster than 256 KiB or 64.
BLOCK_BYTES = {"zstd": 2**18, "lz4": 2**17}
# Of zstd, level 2 compresses 2.5 times as fast as level 3, at 1 % more bytes.
LEVELS = {"zstd": 2, "lz4": 5}


def metadata_of(manifest: Manifest) -> Iterator[tuple[str, bytes]]:
    """Name and content of every `zarr.json`, groups included."""
    groups = {"", "crops", "heads", *(f"heads/{teacher.name}" for teacher in manifest.teachers)}
    for group in sorted(groups):
        yield f"{group}/zarr.json".lstrip("/"), _GROUP
    for layout in layouts_of(manifest):
        yield f"{layout.path}/zarr.json", array_metadata(manifest, layout)


_GROUP = (json.dumps({"attributes": {}, "zarr_format": 3, "node_type": "group"}, indent=2) + "\n").encode()


def array_metadata(manifest: Manifest, layout: Layout) -> bytes:
    """The array's `zarr.json`: chunks of one crop, shards of several, every chunk present and with its crc32c."""
    held: dict[str, Buffer] = {}
    _create(manifest, layout, held)
    return held["zarr.json"].to_bytes()


def encode_shard(manifest: Manifest, layout: Layout, name: str, crop: int, row: int, block: np.ndarray) -> bytes:
    """The bytes of the file `name`, the shard whose first element is (crop, row); `block` fills it whole.

    `block` has the shape that the layout gives for its crops and images.
    """
    held: dict[str, Buffer] = {}
    array = _create(manifest, layout, held)
    images = block.shape[2 if layout.slots_first else 1]
    place = (slice(None), slice(row, row + images)) if layout.slots_first else (slice(row, row + images),)
    array[(slice(crop, crop + len(block)), *place)] = block
    return held[name.removeprefix(f"{layout.path}/")].to_bytes()


def compressed_bytes(codec: Codec, layout: Layout, chunk: np.ndarray) -> int:
    """What one chunk's array takes in a store, without its share of the shard's index."""
    shuffle = {"shuffle": numcodecs.blosc.SHUFFLE, "bitshuffle": numcodecs.blosc.BITSHUFFLE}[layout.shuffle]
    data = np.ascontiguousarray(chunk, layout.dtype)
    return len(numcodecs.blosc.compress(data, codec.encode(), LEVELS[codec], shuffle, BLOCK_BYTES[codec])) + 4


def _create(manifest: Manifest, layout: Layout, held: dict[str, Buffer]) -> zarr.Array:
    """The array, empty, with its files in `held`."""
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
        # Chunks that are all poison are written too: a chunk that is absent is damage.
        config={"write_empty_chunks": True},
    )
