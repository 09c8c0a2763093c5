"""The label store against raw files. Under two minutes on two cores; its peers: `benchmarks.store.peers`.

    python -m benchmarks.store [--long] [--json FILE] [--record]

Realistic labels of three heads (1,000, 196 and 45 classes, k = 16), 8 crops per image, boxes and flips included.
bytes_per_crop_zstd, _lz4, _gaps   the whole store over its crops; _gaps is zstd with eight-bit values
gaps_mean_kl, gaps_worst_kl        nat that the eight-bit values lose, the worst head's mean and the worst row of all
slab_over_memmap_zstd, _lz4, _gaps rate of decoding one crop of all images (checksums checked) over copying the same
                                   rows from a memory-mapped raw file; both into fresh memory, both in the page cache
batch_over_gather                  a random batch of 256 from a decoded slab over the same gather from the memory map
epoch_over_gather                  all rows in random batches, slabs decoded meanwhile, over the same from the map
windows_over_gather                the same where memory holds one shard of rows at a time, and the next one
write_over_raw_zstd, ...           rate of writing a store (checks, compression, fsync, markers) over one raw file

Rates are medians over rounds in which all contenders take turns; quantiles are over those.
`--long` takes four times the rows and then kills and damages stores: see faults.py.
"""

import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import script
from benchmarks.harness.records import put
from benchmarks.store.faults import faults
from benchmarks.store.labels import CROPS, Labels, make_labels, spec_of
from repcon.labels.store import CropLabels, LabelStore
from repcon.labels.truncation import bucket_kl
from repcon.runtime.console import progress
from repcon.runtime.prefetch import map_ahead

BATCH, ROWS_PER_SHARD = 256, 16_384
STORES = {"zstd": ("zstd", "float16"), "lz4": ("lz4", "float16"), "gaps": ("zstd", "quantized8")}

Rates = dict[str, list[float]]


def main() -> None:
    parser = script.parser("The label store against raw files.")
    parser.add_argument("--long", action="store_true", help="four times the rows, and 100 kills and damages")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(Path(folder), images=131_072 if arguments.long else 32_768, rounds=6)
        if arguments.long:
            figures |= faults(Path(folder), kills=100, damages=400)
    script.finish_figures("store", figures, "Label store", arguments, device="cpu")  # whatever else the machine has


def measure(folder: Path, images: int, rounds: int) -> dict[str, Any]:
    """All figures but those of faults."""
    figures: dict[str, Any] = {"images": images, "crops": CROPS}
    with progress() as bar:
        task = bar.add_task("store", total=4, unit="steps", note="labels")
        labels = make_labels(images)
        figures["raw_bytes_per_crop"] = labels.raw_bytes_per_crop
        bar.update(task, advance=1, note="writing")
        stores = write(folder, labels, rounds, figures)
        bar.update(task, advance=1, note="slabs")
        raw = RawFile(folder / "raw", labels)
        read_slabs(stores, raw, rounds, figures)
        bar.update(task, advance=1, note="batches")
        read_batches(stores["zstd"], raw, rounds, figures)
        lost(stores["gaps"], labels, figures)
        bar.advance(task)
    return figures


class RawFile:
    """The labels in one uncompressed file, crop by crop, array by array: what a memory map reads fastest."""

    def __init__(self, path: Path, labels: Labels) -> None:
        self._path = path
        arrays = [labels.boxes, labels.flips, *(array for pair in labels.heads.values() for array in pair)]
        self._shapes = [(array.shape[1:], array.dtype) for array in arrays]
        self.data = b"".join(array[crop].tobytes() for crop in range(CROPS) for array in arrays)

    def write(self) -> None:
        with self._path.open("wb") as file:
            file.write(self.data)
            os.fsync(file.fileno())

    def arrays(self, crop: int) -> list[np.ndarray]:
        """Views of the mapped file, mapped anew."""
        mapped = np.asarray(np.memmap(self._path, np.uint8, mode="r"))
        start, found = crop * (len(self.data) // CROPS), []
        for shape, dtype in self._shapes:
            size = int(np.prod(shape)) * dtype.itemsize
            found.append(mapped[start : start + size].view(dtype).reshape(shape))
            start += size
        return found


def arrays_of(crop_labels: CropLabels) -> list[np.ndarray]:
    """A slab's arrays in the raw file's order."""
    return [crop_labels.boxes, crop_labels.flips, *(array for pair in crop_labels.labels.values() for array in pair)]


def write(folder: Path, labels: Labels, rounds: int, figures: dict[str, Any]) -> dict[str, LabelStore]:
    """The stores, and how fast they were written."""
    raw, stores, times = RawFile(folder / "raw", labels), {}, {name: [] for name in ("raw", *STORES)}
    for number in range(rounds):
        times["raw"].append(_seconds(raw.write))
        for name, (codec, values) in STORES.items():
            spec = spec_of(labels, codec, values, ROWS_PER_SHARD)
            stores[name] = store = LabelStore.create(str(folder / f"{name}-{number}"), spec)
            times[name].append(_seconds(lambda store=store: fill(store, labels)))
    for name, store in stores.items():
        put(figures, f"write_over_raw_{name}", np.divide(times["raw"], times[name]))
        files = [path for path in Path(store.url).rglob("*") if path.is_file()]
        figures[f"bytes_per_crop_{name}"] = sum(path.stat().st_size for path in files) / (labels.images * CROPS)
        figures[f"write_crops_per_second_{name}"] = labels.images * CROPS / float(np.median(times[name]))
    return stores


def fill(store: LabelStore, labels: Labels) -> None:
    """Writes all units of an empty store."""
    for unit in store.units():
        crops, rows = slice(unit.crops.start, unit.crops.stop), slice(unit.rows.start, unit.rows.stop)
        held = {name: (ids[crops, rows], logp[crops, rows]) for name, (ids, logp) in labels.heads.items()}
        store.writer.write(unit, labels.boxes[crops, rows], labels.flips[crops, rows], held)


def read_slabs(stores: Mapping[str, LabelStore], raw: RawFile, rounds: int, figures: dict[str, Any]) -> None:
    """One crop of all images into fresh memory, from each store and from the map, in turns."""
    times: Rates = {name: [] for name in ("raw", *stores)}
    for number in range(rounds * CROPS):
        crop = number % CROPS
        times["raw"].append(_seconds(lambda crop=crop: [array.copy() for array in raw.arrays(crop)]))
        for name, store in stores.items():
            times[name].append(_seconds(lambda store=store, crop=crop: store.reader.crop_labels(crop)))
    warm = slice(CROPS, None)  # the first round opens files and reads markers
    for name in stores:
        put(figures, f"slab_over_memmap_{name}", np.divide(times["raw"][warm], times[name][warm]))
        rate = len(raw.data) / CROPS / float(np.median(times[name][warm]))
        figures[f"slab_bytes_per_second_{name}"] = rate
    figures["memmap_bytes_per_second"] = len(raw.data) / CROPS / float(np.median(times["raw"][warm]))


def read_batches(store: LabelStore, raw: RawFile, rounds: int, figures: dict[str, Any]) -> None:
    """Random batches of a resident slab, and whole shuffled epochs in which the next slab is decoded meanwhile."""
    generator = np.random.default_rng(0)
    crop_labels, mapped = arrays_of(store.reader.crop_labels(0)), raw.arrays(0)
    ratios = []
    for _ in range(200 * rounds):
        rows = generator.integers(0, store.images, BATCH)
        ratios.append(
            _seconds(lambda rows=rows: _gather(mapped, rows)) / _seconds(lambda rows=rows: _gather(crop_labels, rows))
        )
    put(figures, "batch_over_gather", ratios)
    orders = [generator.permutation(store.images) for _ in range(CROPS)]
    inside = generator.permutation(ROWS_PER_SHARD)
    held = 2 * ROWS_PER_SHARD * store.reader.crop_labels_bytes() // store.images
    epochs, windows = [], []
    for number in range(rounds):
        theirs = _seconds(lambda: [_epoch(raw.arrays(crop), order) for crop, order in enumerate(orders)])
        ours = _seconds(
            lambda: [_epoch(arrays_of(s), orders[s.crops[0]]) for s in store.reader.iter_crop_labels(range(CROPS))]
        )
        epochs.append(theirs / ours)
        parts = (_windows(store, crop, number, held) for crop in range(CROPS))
        ours = _seconds(lambda parts=parts: [_epoch(arrays_of(window), inside) for crop in parts for window in crop])
        windows.append(theirs / ours)
    put(figures, "epoch_over_gather", epochs)
    put(figures, "windows_over_gather", windows)


def _windows(store: LabelStore, crop: int, seed: int, memory_bytes: int) -> Iterator[CropLabels]:
    """A crop in windows that fit the memory, the next one decoded while the last is in use."""
    plan = store.reader.window_plan([crop], seed=seed, memory_bytes=memory_bytes)
    return map_ahead(lambda rows: store.reader.window([crop], rows), plan)


def _epoch(arrays: list[np.ndarray], order: np.ndarray) -> None:
    for start in range(0, len(order), BATCH):
        _gather(arrays, order[start : start + BATCH])


def _gather(arrays: list[np.ndarray], rows: np.ndarray) -> list[np.ndarray]:
    return [array[rows] for array in arrays]


def lost(store: LabelStore, labels: Labels, figures: dict[str, Any]) -> None:
    """What the eight-bit values lose, against the labels that they were made from."""
    means, worst = [], 0.0
    for name, (_, logp) in store.reader.crop_labels(0).labels.items():
        nat = bucket_kl(labels.heads[name][1][0], logp, store.heads[name].k, 0, 1.0)
        means.append(float(nat.mean()))
        worst = max(worst, float(nat.max()))
    figures |= {"gaps_mean_kl": max(means), "gaps_worst_kl": worst}


def _seconds(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start
