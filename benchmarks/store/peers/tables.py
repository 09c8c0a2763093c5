"""Peers that keep columns or arrays in files of their own formats: Parquet, Lance, HDF5.

A file or data set per crop number where the format knows tables; where it compresses, zstd, as repcon does.
"""

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.store.labels import CROPS, Labels
from benchmarks.store.peers.peer import Arrays, Peer
from benchmarks.store.peers.records import CHECKS, file_bytes

ROWS = 16_384
"""Rows of a chunk or a row group, as in repcon's store."""
ROWS_OF_SMALL_GROUPS = 1024


def parquet(folder: Path, labels: Labels, images: int) -> Peer:
    """Columns of fixed lists, groups of 16,384 rows, no checksums: pyarrow's usual form."""
    return _parquet(folder, labels, images, ROWS, checked=False)


def parquet_groups(folder: Path, labels: Labels, images: int) -> Peer:
    """Groups of 1,024 rows, of which a batch reads those that it needs, and a checksum of every page."""
    return _parquet(folder, labels, images, ROWS_OF_SMALL_GROUPS, checked=True)


def _parquet(folder: Path, labels: Labels, images: int, rows: int, *, checked: bool) -> Peer:
    import pyarrow.parquet as library

    folder.mkdir()
    for crop in range(CROPS):
        library.write_table(
            _table(labels, crop, images), folder / f"{crop}.parquet",
            compression="zstd", row_group_size=rows, use_dictionary=False, write_page_checksum=checked,
        )  # fmt: skip

    def file(crop: int) -> Any:
        return library.ParquetFile(folder / f"{crop}.parquet", page_checksum_verification=checked, pre_buffer=True)

    def batch(crop: int, wanted: np.ndarray) -> Arrays:
        groups, inside = np.unique(wanted // rows, return_inverse=True)
        with file(crop) as opened:
            return [array[inside * rows + wanted % rows] for array in _arrays(opened.read_row_groups(groups.tolist()))]

    def slab(crop: int) -> Arrays:
        with file(crop) as opened:
            return _arrays(opened.read())

    checks = "crc32 of pages" if checked else CHECKS
    return Peer(images=images, slab=slab, batch=batch, bytes=file_bytes(folder), checks=checks)


def lance(folder: Path, labels: Labels, images: int) -> Peer:
    """A Lance data set per crop number, zstd where its encodings take it."""
    import lance as library  # pyright: ignore[reportMissingImports]

    sets: list[Any] = []
    for crop in range(CROPS):
        table = _table(labels, crop, images)
        fields = [field.with_metadata({"lance-encoding:compression": "zstd"}) for field in table.schema]
        schema = table.schema
        for number, field in enumerate(fields):
            schema = schema.set(number, field)
        sets.append(library.write_dataset(table.cast(schema), str(folder / f"{crop}.lance")))
    return Peer(
        images=images,
        slab=lambda crop: _arrays(sets[crop].to_table()),
        batch=lambda crop, rows: _arrays(sets[crop].take(rows.tolist())),
        bytes=file_bytes(folder),
        checks=CHECKS,
    )


def _table(labels: Labels, crop: int, images: int) -> Any:
    """An Arrow table of one crop: fixed lists, and one column of plain values."""
    import pyarrow as arrow

    columns = {}
    for name, array in _named(labels).items():
        values = np.ascontiguousarray(array[crop, :images])
        flat = arrow.array(values.reshape(-1))
        columns[name] = flat if values.ndim == 1 else arrow.FixedSizeListArray.from_arrays(flat, values.shape[1])
    return arrow.table(columns)


def _arrays(table: Any) -> Arrays:
    """The table's columns as arrays."""
    found = []
    for column in table.itercolumns():
        held = column.combine_chunks()
        values = held.flatten() if hasattr(held, "flatten") and hasattr(held.type, "list_size") else held
        found.append(values.to_numpy(zero_copy_only=False).reshape(len(held), -1).squeeze(1 if values is held else ()))
    return found


def hdf5(folder: Path, labels: Labels, images: int) -> Peer:
    """A data set per array in one file, chunks of a crop's 16,384 rows, blosc with zstd, Fletcher's checksum."""
    import h5py  # pyright: ignore[reportMissingImports]
    import hdf5plugin  # pyright: ignore[reportMissingImports]

    folder.mkdir()
    path = folder / "labels.h5"
    with h5py.File(path, "w") as file:
        for name, array in _named(labels).items():
            chunk = (1, min(ROWS, images), *array.shape[2:])
            codec = hdf5plugin.Blosc(cname="zstd", clevel=2, shuffle=hdf5plugin.Blosc.SHUFFLE)
            file.create_dataset(name, data=array[:, :images], chunks=chunk, fletcher32=True, **codec)
    held = h5py.File(path, "r")
    arrays: list[Any] = [held[name] for name in _named(labels)]

    def batch(crop: int, rows: np.ndarray) -> Arrays:
        rising, places = np.unique(rows, return_inverse=True)  # HDF5 takes them in no other order
        return [array[crop, rising][places] for array in arrays]

    return Peer(
        images=images, slab=lambda crop: [array[crop] for array in arrays], batch=batch,
        bytes=file_bytes(folder), checks="fletcher32 of chunks",
    )  # fmt: skip


def _named(labels: Labels) -> dict[str, np.ndarray]:
    """(M, N, ...) arrays in the order of `Arrays`."""
    named = {"box": labels.boxes, "flip": labels.flips}
    for head, (ids, logp) in labels.heads.items():
        named |= {f"{head}_ids": ids, f"{head}_logp": logp}
    return named
