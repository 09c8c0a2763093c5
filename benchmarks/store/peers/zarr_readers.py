"""repcon's label store as other Zarr libraries read it: the same files, the same checksums.

Needs numpy and the library, nothing else. After reading, the arrays are checked for fill values as repcon does.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.store.peers.peer import Arrays, Peer, require_written

CHECKS = "crc32c of chunk and index, fill values"


def zarr_python(store: Path, classes: dict[str, int]) -> Peer:
    """zarr-python as it is installed."""
    return _zarr(store, classes)


def zarrs(store: Path, classes: dict[str, int]) -> Peer:
    """zarr-python with the codec pipeline of the Rust library zarrs."""
    import zarr

    import_module("zarrs")  # registers the pipeline
    with zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"}):
        return _zarr(store, classes)


def _zarr(store: Path, classes: dict[str, int]) -> Peer:
    """An array keeps the codec pipeline that was configured when it was opened."""
    import zarr

    arrays: list[Any] = [zarr.open_array(str(store / path), mode="r") for path in _paths(classes)]
    pool = ThreadPoolExecutor(_cores())

    def slab(crop: int) -> Arrays:
        return require_written(list(pool.map(lambda array: array[crop], arrays)), list(classes.values()))

    def batch(crop: int, rows: np.ndarray) -> Arrays:
        found = pool.map(lambda array: array.oindex[crop, rows], arrays)
        return require_written(list(found), list(classes.values()))

    return _peer(store, arrays[1].shape[1], slab, batch)


def tensorstore(store: Path, classes: dict[str, int]) -> Peer:
    """Google's tensorstore, all arrays asked for at once."""
    import tensorstore as library  # pyright: ignore[reportMissingImports]

    def opened(path: str) -> Any:
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(store / path)}}
        return library.open(spec, open=True, read=True, context=context, recheck_cached_data=False).result()

    # Without a cache: every slab is read once.
    context = library.Context({"cache_pool": {"total_bytes_limit": 0}, "data_copy_concurrency": {"limit": _cores()}})
    arrays = [opened(path) for path in _paths(classes)]

    def read(place: Any) -> Arrays:
        asked = [array[place].read(order="C") for array in arrays]
        return require_written([future.result() for future in asked], list(classes.values()))

    return _peer(store, arrays[1].shape[1], read, lambda crop, rows: read((crop, rows)))


LIBRARIES: dict[str, Callable[[Path, dict[str, int]], Peer]] = {
    "zarr": zarr_python,
    "zarrs": zarrs,
    "tensorstore": tensorstore,
}


def _paths(classes: dict[str, int]) -> Sequence[str]:
    return ["crops/box", "crops/flip", *(f"heads/{head}/{kind}" for head in classes for kind in ("ids", "logp"))]


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _peer(store: Path, images: int, slab: Callable[[int], Arrays], batch: Callable[[int, np.ndarray], Arrays]) -> Peer:
    size = sum(path.stat().st_size for path in store.rglob("*") if path.is_file())
    return Peer(images=images, slab=slab, batch=batch, bytes=size, checks=CHECKS)
