"""The part of a store that zarr-python writes: array metadata and the bytes of a shard.

Shards are encoded in memory and put in place by `store_files`, because zarr-python does not fsync; the markers'
hashes then cost no second reading. Same input, same bytes.
"""

import json
from collections.abc import Iterator
from typing import Any

import numcodecs.blosc
import numpy as np
import zarr
from zarr.codecs import BloscCodec, Crc32cCodec
from zarr.core.buffer import Buffer, default_buffer_prototype
from zarr.storage import MemoryStore

from repcon.store_layout import Layout, layouts_of
from repcon.store_manifest import Manifest

# Chunks are encoded and decoded in parallel by threads of their own; blosc's shared pool would serialise them.
numcodecs.blosc.use_threads = False

_COMPRESSORS = {
    "zstd": BloscCodec(cname="zstd", clevel=3, shuffle="shuffle"),
    "lz4": BloscCodec(cname="lz4", clevel=5, shuffle="bitshuffle"),
}


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
    width = (layout.width,) if layout.width else ()
    zarr.create_array(
        MemoryStore(held),
        shape=(manifest.crops, manifest.images, *width),
        chunks=(1, manifest.rows_per_shard, *width),
        shards=(manifest.crops_per_shard, manifest.rows_per_shard, *width),
        dtype=layout.dtype,
        fill_value=layout.fill,
        filters=None,
        compressors=[_COMPRESSORS[manifest.codec], Crc32cCodec()],
        dimension_names=("crop", "image", "slot")[: 2 + len(width)],
    )
    return held["zarr.json"].to_bytes()


def encode_shard(manifest: Manifest, layout: Layout, name: str, crop: int, row: int, block: np.ndarray) -> bytes:
    """The bytes of the file `name`, the shard whose first element is (crop, row); `block` fills it whole.

    `block` is (d, r) or (d, r, width), in the layout's type.
    """
    held: dict[str, Buffer] = {
        "zarr.json": default_buffer_prototype().buffer.from_bytes(array_metadata(manifest, layout))
    }
    # Chunks that are all poison are written too: a chunk that is absent is damage.
    settings: dict[str, Any] = {"write_empty_chunks": True}
    array = zarr.open_array(MemoryStore(held), mode="r+", config=settings)
    array[crop : crop + block.shape[0], row : row + block.shape[1]] = block
    return held[name.removeprefix(f"{layout.path}/")].to_bytes()
