"""All that take part: repcon's reader, other libraries on its store, and peers with files of their own."""

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from benchmarks.store.benchmark import arrays_of, fill
from benchmarks.store.labels import CROPS, HEADS, Labels, spec_of
from benchmarks.store.peers.peer import Arrays, Peer
from benchmarks.store.peers.records import file_bytes, lmdb, log, npz
from benchmarks.store.peers.separate_process import SeparateProcess, checksum
from benchmarks.store.peers.tables import ROWS, hdf5, lance, parquet, parquet_groups
from benchmarks.store.peers.zarr_readers import LIBRARIES
from repcon.labels.store import LabelStore
from repcon.runtime.errors import UserError, first_line

CODECS = ("zstd", "lz4")
WITH_ANOTHER_ZARR = ("zarr", "zarrs")
"""The libraries that are a matter of zarr-python's version."""
OWN_FILES: Mapping[str, tuple[Callable[[Path, Labels, int], Peer], str]] = {
    "npz": (npz, "numpy"),
    "log": (log, "numpy"),
    "lmdb": (lmdb, "lmdb"),
    "parquet": (parquet, "pyarrow"),
    "parquet_groups": (parquet_groups, "pyarrow"),
    "lance": (lance, "pylance"),
    "hdf5": (hdf5, "h5py"),
}
"""What writes a peer's files, and the package that its version is of."""


class Timed(Protocol):
    """What is timed of a `Peer`, in this process or in one of its own."""

    @property
    def images(self) -> int: ...

    @property
    def bytes(self) -> int: ...

    @property
    def checks(self) -> str: ...

    def slab_seconds(self, crop: int) -> float: ...

    def batch_seconds(self, crop: int, rows: np.ndarray) -> float: ...

    def epoch_seconds(self, orders: Sequence[np.ndarray]) -> float: ...


def ours_of(name: str) -> str:
    """The contender that another is compared with: repcon's reader of the same codec."""
    return "ours_lz4" if name.endswith("_lz4") else "ours_zstd"


def open_all(
    folder: Path, labels: Labels, images_as_files: int, newest_zarr: str, figures: dict[str, Any], stack: ExitStack
) -> dict[str, Timed]:
    """Every contender that there is, by name. Adds versions, checks and sizes, and the errors of the others.

    Raises UserError where one reads other labels than were written. Processes are ended by the stack.
    """
    found: dict[str, Timed] = {}
    for codec in CODECS:
        store = LabelStore.create(str(folder / codec), spec_of(labels, codec, "float16", ROWS))
        fill(store, labels)
        found[f"ours_{codec}"] = _ours(store)
        found |= _zarr_libraries(codec, Path(store.url), newest_zarr, labels, figures, stack)
    for name, (write, package) in OWN_FILES.items():
        try:
            peer = write(folder / name, labels, images_as_files if name == "npz" else labels.images)
        except ImportError as error:
            figures[f"{name}_error"] = first_line(error)
            continue
        _require(name, checksum(peer.slab(0)), labels, peer.images)
        found[name], figures[f"{name}_version"] = peer, version(package)
    for name, peer in found.items():
        figures |= {f"{name}_checks": peer.checks, f"{name}_bytes_per_crop": peer.bytes / (peer.images * CROPS)}
    return found


def _ours(store: LabelStore) -> Peer:
    def batch(crop: int, rows: np.ndarray) -> Arrays:
        rising, places = np.unique(rows, return_inverse=True)
        return [array[places] for array in arrays_of(store.reader.window([crop], rising))]

    return Peer(
        images=store.images,
        slab=lambda crop: arrays_of(store.reader.crop_labels(crop)),
        batch=batch,
        bytes=file_bytes(Path(store.url)),
        checks="crc32c of chunk and index, completion records, fill values",
    )


def _zarr_libraries(
    codec: str, store: Path, newest_zarr: str, labels: Labels, figures: dict[str, Any], stack: ExitStack
) -> dict[str, SeparateProcess]:
    """The libraries that read repcon's store, each in a process of its own."""
    classes = {head: count for head, (count, _) in HEADS.items()}
    wanted = [(f"{library}_{codec}", sys.executable, library) for library in LIBRARIES]
    wanted += [(f"{library}_newest_{codec}", newest_zarr, library) for library in WITH_ANOTHER_ZARR]
    found = {}
    for name, python, library in wanted:
        if not python:
            figures[f"{name}_error"] = "no other Python was named (--newest-zarr)"
            continue
        try:
            process = SeparateProcess(python, library, store, classes)
        except ImportError as error:
            figures[f"{name}_error"] = first_line(error)
            continue
        stack.callback(process.close)
        _require(name, process.first_slab, labels, process.images)
        found[name], figures[f"{name}_version"] = process, process.version
    return found


def _require(name: str, first_slab: int, labels: Labels, images: int) -> None:
    written = [labels.boxes, labels.flips, *(array for pair in labels.heads.values() for array in pair)]
    if first_slab != checksum([array[0, :images] for array in written]):
        raise UserError(f"{name} reads other labels than were written")
