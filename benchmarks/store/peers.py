"""How others keep soft labels, on the same rows: a file per image, a log with an index, LMDB, Parquet.

Each peer writes all crops of some images and reads random batches of one crop, as its users do. None of them checks
what it reads, or knows whether it is complete.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.store.labels import CROPS, Labels

Read = Callable[[int, np.ndarray], list[tuple[np.ndarray, ...]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """`read(crop, rows)` gives the rows' boxes, flips, ids and log-probabilities."""

    read: Read
    bytes: int


def record_type(labels: Labels) -> np.dtype:
    """One crop's labels as a packed record."""
    fields: list[tuple] = [("box", "<u2", (4,)), ("flip", "u1")]
    for name, (ids, logp) in labels.heads.items():
        fields += [(f"{name}_ids", "<u2", ids.shape[2:]), (f"{name}_logp", "<f2", logp.shape[2:])]
    return np.dtype(fields)


def records_of(labels: Labels, images: int) -> np.ndarray:
    """(M, images) records."""
    records = np.empty((CROPS, images), record_type(labels))
    records["box"], records["flip"] = labels.boxes[:, :images], labels.flips[:, :images]
    for name, (ids, logp) in labels.heads.items():
        records[f"{name}_ids"], records[f"{name}_logp"] = ids[:, :images], logp[:, :images]
    return records


def npz(folder: Path, labels: Labels, images: int) -> Peer:
    """A compressed .npz per image with all its crops, as FKD keeps one file per image."""
    folder.mkdir()
    names = ("box", "flip", *(f"{name}_{kind}" for name in labels.heads for kind in ("ids", "logp")))
    records = records_of(labels, images)
    for image in range(images):
        arrays: Any = {name: records[name][:, image] for name in names}
        np.savez_compressed(folder / f"{image}.npz", **arrays)

    def read(crop: int, rows: np.ndarray) -> list[tuple[np.ndarray, ...]]:
        found = []
        for image in rows:
            with np.load(folder / f"{image}.npz") as held:
                found.append(tuple(held[name][crop] for name in names))
        return found

    # What a file takes on disk is whole blocks.
    return Peer(read=read, bytes=sum(path.stat().st_blocks * 512 for path in folder.iterdir()))


def log(folder: Path, labels: Labels, images: int) -> Peer:
    """A binary log per crop number with an index of offsets by image, as TinyViT keeps one per epoch."""
    folder.mkdir()
    records = records_of(labels, images)
    order = np.random.default_rng(0).permutation(images)  # logged in the order of a shuffled epoch
    offsets = np.empty(images, np.int64)
    offsets[order] = np.arange(images) * records.dtype.itemsize
    for crop in range(CROPS):
        (folder / f"{crop}.bin").write_bytes(records[crop, order].tobytes())
        (folder / f"{crop}.keys").write_bytes(offsets.tobytes())
    files = [os.open(folder / f"{crop}.bin", os.O_RDONLY) for crop in range(CROPS)]
    names, size = records.dtype.names, records.dtype.itemsize
    assert names is not None

    def read(crop: int, rows: np.ndarray) -> list[tuple[np.ndarray, ...]]:
        found = []
        for image in rows:
            row = np.frombuffer(os.pread(files[crop], size, int(offsets[image])), records.dtype)[0]
            found.append(tuple(row[name] for name in names))
        return found

    return Peer(read=read, bytes=sum(path.stat().st_size for path in folder.iterdir()))


def lmdb(folder: Path, labels: Labels, images: int) -> Peer:
    """A record per image and crop in LMDB."""
    import lmdb as library

    records = records_of(labels, images)
    environment = library.open(str(folder), map_size=2**36)
    with environment.begin(write=True) as transaction:
        for crop in range(CROPS):
            for image in range(images):
                transaction.put(_key(crop, image), records[crop, image].tobytes(), append=True)
    names = records.dtype.names
    assert names is not None

    def read(crop: int, rows: np.ndarray) -> list[tuple[np.ndarray, ...]]:
        found = []
        with environment.begin(buffers=True) as transaction:
            for image in rows:
                row = np.frombuffer(transaction.get(_key(crop, int(image)), b""), records.dtype)[0].copy()
                found.append(tuple(row[name] for name in names))
        return found

    return Peer(read=read, bytes=(folder / "data.mdb").stat().st_size)


def _key(crop: int, image: int) -> bytes:
    return crop.to_bytes(4, "big") + image.to_bytes(8, "big")


def parquet(folder: Path, labels: Labels, images: int) -> Peer:
    """A Parquet file per crop number with columns of fixed lists, zstd, groups of 16,384 rows."""
    import pyarrow as arrow
    import pyarrow.dataset as dataset
    import pyarrow.parquet as library

    folder.mkdir()
    records = records_of(labels, images)
    names = records.dtype.names
    assert names is not None
    for crop in range(CROPS):
        columns = {}
        for name in names:
            values = np.ascontiguousarray(records[name][crop])
            flat = arrow.array(values.reshape(-1))
            columns[name] = flat if values.ndim == 1 else arrow.FixedSizeListArray.from_arrays(flat, values.shape[1])
        library.write_table(arrow.table(columns), folder / f"{crop}.parquet", compression="zstd", row_group_size=16_384)
    sets = [dataset.dataset(folder / f"{crop}.parquet") for crop in range(CROPS)]

    def read(crop: int, rows: np.ndarray) -> list[tuple[np.ndarray, ...]]:
        taken = sets[crop].take(arrow.array(rows))
        found = []
        for name in names:
            column = taken[name].combine_chunks()
            values = column.flatten() if records[name].ndim == 3 else column
            found.append(values.to_numpy().reshape(len(rows), -1))
        return [tuple(found)]

    return Peer(read=read, bytes=sum(path.stat().st_size for path in folder.iterdir()))


PEERS: dict[str, Callable[[Path, Labels, int], Peer]] = {"npz": npz, "log": log, "lmdb": lmdb, "parquet": parquet}
