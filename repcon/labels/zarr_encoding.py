"""Array metadata and shards as zarr-python encodes them.

Shards are encoded in memory and written by `runtime.filesystem`, because zarr-python does not fsync; their hashes for
the completion records are computed on the way. Same input, same bytes.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numcodecs.blosc
import numpy as np
import zarr
from zarr.codecs import BloscCodec, Crc32cCodec
from zarr.core.buffer import Buffer
from zarr.core.metadata.v3 import ArrayV3Metadata
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

METADATA_NAMES = ("zarr.json", ".zarray", ".zgroup", ".zattrs", ".zmetadata")
"""Files by which a reader of zarr 3 or 2 knows an array or a group."""


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


_CODECS = {"sharding_indexed", "bytes", "blosc", "crc32c"}
"""The codecs of a store's arrays; the order in `bytes` is compared too."""
_NO_OPS = {"attributes": {}, "storage_transformers": [], "consolidated_metadata": None}
"""Fields that some versions of zarr write and others leave out."""


def metadata_problems(manifest: Manifest, read: Callable[[str], bytes]) -> Iterator[str]:
    """Every `zarr.json` that plain zarr would read differently than the manifest says.

    `read` gives a file's bytes by its name, and raises OSError.
    """
    wanted = dict(metadata_of(manifest))
    for name in sorted(manifest.metadata.keys() - wanted.keys()):
        yield f"{name}: the manifest lists it, and has no such array or group"
    for name in sorted(wanted.keys() - manifest.metadata.keys()):
        yield f"{name}: the manifest lists no hash for it"
    for name, content in wanted.items():
        try:
            held = _parse_strict_json(read(name))
        except (OSError, ValueError, RecursionError) as error:
            yield f"{name}: cannot be read by every zarr ({getattr(error, 'strerror', None) or f'not JSON: {error}'})"
            continue
        if not _is_equivalent(held, json.loads(content)):
            fields = _differing_fields(held, content)
            yield f"{name}: plain zarr would read it otherwise than the manifest says ({fields})"


def _parse_strict_json(data: bytes) -> Any:
    """Parses JSON that every parser reads alike. Raises ValueError for a byte order mark, repeated keys, NaN."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(found := dict(pairs)) < len(pairs):
            raise ValueError("a key is there twice")
        return found

    def no_constant(name: str) -> None:
        raise ValueError(f"{name} is no number of JSON's")

    return json.loads(data.decode("utf-8"), object_pairs_hook=once, parse_constant=no_constant)


def _is_equivalent(held: Any, wanted: Mapping[str, Any]) -> bool:
    if not isinstance(held, Mapping):
        return False
    reduced = [
        {key: value for key, value in each.items() if _NO_OPS.get(key, value) != value or key not in _NO_OPS}
        for each in (held, wanted)
    ]
    if _same(*reduced):
        return True
    if held.get("node_type") != "array" or wanted["node_type"] != "array" or not _codecs_of(held) <= _CODECS:
        return False
    try:  # as another version of zarr prints it
        return _same(*(ArrayV3Metadata.from_dict(dict(each)).to_dict() for each in reduced))
    except Exception:  # zarr raises many things for what is no metadata
        return False


def _same(one: Any, other: Any) -> bool:
    """Whether both are equal and of the same types; in Python 1, 1.0 and True are equal."""
    return json.dumps(one, sort_keys=True, default=str) == json.dumps(other, sort_keys=True, default=str)


def _codecs_of(value: Any) -> set[str]:
    """The names of all codecs in an array's metadata, nested ones too."""
    found: set[str] = set()
    for key, held in value.items() if isinstance(value, Mapping) else ():
        if key in ("codecs", "index_codecs") and isinstance(held, list):
            for codec in held:
                found.add(str(codec.get("name")) if isinstance(codec, Mapping) else str(codec))
                found |= _codecs_of(codec.get("configuration")) if isinstance(codec, Mapping) else set()
    return found


def _differing_fields(held: Any, content: bytes) -> str:
    """The fields that differ."""
    wanted = json.loads(content)
    if not isinstance(held, Mapping):
        return "it is no object"
    return (
        ", ".join(ascii(key)[1:-1][:80] for key in sorted({*held, *wanted}) if held.get(key) != wanted.get(key))
        or "types"
    )


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
    """An empty array whose files are in `held`."""
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
