"""Peers that keep a record per image and crop: a file per image, a log with an index, LMDB.

None of them checks what it reads, or knows whether it is complete.
"""

import os
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.store.labels import CROPS, Labels
from benchmarks.store.peers.peer import Arrays, Peer

CHECKS = "none"


def record_type(labels: Labels) -> np.dtype:
    """One crop's labels as a packed record."""
    fields: list[tuple] = [("box", "<u2", (4,)), ("flip", "u1")]
    for name, (ids, logp) in labels.heads.items():
        fields += [(f"{name}_ids", ids.dtype, ids.shape[2:]), (f"{name}_logp", logp.dtype, logp.shape[2:])]
    return np.dtype(fields)


def records_of(labels: Labels, images: int) -> np.ndarray:
    """(M, images) records."""
    records = np.empty((CROPS, images), record_type(labels))
    records["box"], records["flip"] = labels.boxes[:, :images], labels.flips[:, :images]
    for name, (ids, logp) in labels.heads.items():
        records[f"{name}_ids"], records[f"{name}_logp"] = ids[:, :images], logp[:, :images]
    return records


def fields_of(records: np.ndarray) -> Arrays:
    """An array of its own for each field."""
    assert records.dtype.names is not None
    return [np.ascontiguousarray(records[name]) for name in records.dtype.names]


def file_bytes(folder: Path) -> int:
    """What the folder's files hold."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def npz(folder: Path, labels: Labels, images: int) -> Peer:
    """A compressed .npz per image with all its crops."""
    folder.mkdir()
    records = records_of(labels, images)
    names = records.dtype.names
    assert names is not None
    for image in range(images):
        arrays: Any = {name: records[name][:, image] for name in names}
        np.savez_compressed(folder / f"{image}.npz", **arrays)

    def batch(crop: int, rows: np.ndarray) -> Arrays:
        found = []
        for image in rows:
            with np.load(folder / f"{image}.npz") as held:
                found.append([held[name][crop] for name in names])
        return [np.stack(column) for column in zip(*found, strict=True)]

    # What a file takes on disk is whole blocks.
    size = sum(path.stat().st_blocks * 512 for path in folder.iterdir())
    return Peer(
        images=images, slab=lambda crop: batch(crop, np.arange(images)), batch=batch, bytes=size, checks="crc32 of zip"
    )


def log(folder: Path, labels: Labels, images: int) -> Peer:
    """A binary log per crop number with an index of offsets by image, as TinyViT keeps one per epoch."""
    folder.mkdir()
    records = records_of(labels, images)
    dtype, size = records.dtype, records.dtype.itemsize
    order = np.random.default_rng(0).permutation(images)  # logged in the order of a shuffled epoch
    places = np.empty(images, np.int64)
    places[order] = np.arange(images)
    for crop in range(CROPS):
        (folder / f"{crop}.bin").write_bytes(records[crop, order].tobytes())
        (folder / f"{crop}.keys").write_bytes((places * size).tobytes())
    files = [os.open(folder / f"{crop}.bin", os.O_RDONLY) for crop in range(CROPS)]

    def slab(crop: int) -> Arrays:
        offsets = np.fromfile(folder / f"{crop}.keys", np.int64)
        return fields_of(np.fromfile(folder / f"{crop}.bin", dtype)[offsets // size])

    def batch(crop: int, rows: np.ndarray) -> Arrays:
        parts = [os.pread(files[crop], size, place) for place in (places[rows] * size).tolist()]
        return fields_of(np.frombuffer(b"".join(parts), dtype))

    return Peer(images=images, slab=slab, batch=batch, bytes=file_bytes(folder), checks=CHECKS)


def lmdb(folder: Path, labels: Labels, images: int) -> Peer:
    """A record per image and crop in LMDB."""
    import lmdb as library

    records = records_of(labels, images)
    dtype = records.dtype
    environment = library.open(str(folder), map_size=2**36)
    with environment.begin(write=True) as transaction:
        for crop in range(CROPS):
            for image in range(images):
                transaction.put(_key(crop, image), records[crop, image].tobytes(), append=True)

    def slab(crop: int) -> Arrays:
        with environment.begin(buffers=True) as transaction:
            cursor = transaction.cursor()
            cursor.set_range(_key(crop, 0))
            values = islice(cursor.iternext(keys=False, values=True), images)
            return fields_of(np.frombuffer(b"".join(values), dtype))

    def batch(crop: int, rows: np.ndarray) -> Arrays:
        with environment.begin(buffers=True) as transaction:
            parts = [transaction.get(_key(crop, image), b"") for image in rows.tolist()]
            return fields_of(np.frombuffer(b"".join(parts), dtype))

    size = (folder / "data.mdb").stat().st_size
    return Peer(images=images, slab=slab, batch=batch, bytes=size, checks=CHECKS)


def _key(crop: int, image: int) -> bytes:
    return crop.to_bytes(4, "big") + image.to_bytes(8, "big")
