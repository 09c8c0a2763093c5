"""A store of many rows, simulated: what grows with it and what does not.

    python -m benchmarks.scale [--long] [--json FILE] [--record]

One synthetic teacher (1,000 classes, k = 4), 8 crops per image, standard shards of 16,384 images. Labels are made
cheaply and written by the store itself: checks, compression, fsync, markers. ROWS (crops of all images) is 2e5 and 1e6,
with --long 2e5, 2e6 and 2e7.

write_rows_per_second_ROWS, bytes_per_row_ROWS
open_seconds_ROWS             opening: manifest, metadata
scan_seconds_ROWS             what a resumed precompute looks at: every unit's marker and the lengths of its shards
inspect_seconds_ROWS          all figures of `repcon inspect`
first_slab_seconds_ROWS       from opening to the first 256 random rows when a whole crop is decoded: grows with images
first_window_seconds_ROWS     the same through windows of a memory budget of 1 MB (a shard in use, one being decoded);
                              grows with the crop's units, whose markers are read before
*_bytes_ROWS                  the memory that it took at most, beyond what the process held before
X_growth                      X at the largest ROWS over X at the smallest, of what is to stay flat
X_per_unit                    slope over many tiny units (64 rows of 8 crops; written without fsync, which would only
                              wait): seconds of scan, inspect and poll (asking again for what is left), and memory

A unit is 8 crops x 16,384 images, so what grows with units grows 131,072 times slower than rows. docs/scale.md builds
on these constants.
"""

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import script
from benchmarks.harness.records import in_new_process, peak_memory_bytes
from benchmarks.scale.simulation import CROPS, Simulation
from repcon.labels.store import LabelStore
from repcon.runtime.console import progress

BATCH, WINDOW_BYTES, UNIT_ROWS, REPEATS = 256, 1_000_000, 64, 7
FLAT = ("open_seconds", "first_window_bytes", "bytes_per_row")


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """How much is written."""

    rows: tuple[int, ...]
    units: tuple[int, int]
    """Of the two stores of tiny units."""


SHORT = Setting(rows=(200_000, 1_000_000), units=(50, 250))
LONG = Setting(rows=(200_000, 2_000_000, 20_000_000), units=(1000, 5000))


def main() -> None:
    parser = script.parser("What grows with a store, and what does not.")
    parser.add_argument("--long", action="store_true", help="up to 2e7 rows, about half a gigabyte on disk")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(LONG if arguments.long else SHORT, Path(folder))
    script.finish_figures("scale", figures, "Scale", arguments)


def measure(setting: Setting, folder: Path) -> dict[str, Any]:
    """All figures."""
    figures: dict[str, Any] = {}
    simulation = Simulation()
    with progress() as bars:
        task = bars.add_task("scale", total=sum(setting.rows) + sum(setting.units), unit="rows", note="")
        names = [f"{rows:.0e}".replace("e+0", "e") for rows in setting.rows]
        for name, rows in zip(names, setting.rows, strict=True):
            bars.update(task, note=f"{name} rows")
            url, images = str(folder / f"rows-{name}"), rows // CROPS
            started = time.perf_counter()
            size = simulation.write(url, images, advance=lambda count: bars.advance(task, count))
            figures[f"write_rows_per_second_{name}"] = rows / (time.perf_counter() - started)
            figures[f"bytes_per_row_{name}"] = size / rows
            figures |= {f"{key}_{name}": value for key, value in in_new_process(_read, url).items()}
        for key in FLAT:
            figures[f"{key}_growth"] = figures[f"{key}_{names[-1]}"] / figures[f"{key}_{names[0]}"]
        bars.update(task, note="tiny units")
        figures |= per_unit(simulation, setting.units, folder, lambda count: bars.advance(task, count))
    return figures


def per_unit(
    simulation: Simulation, counts: tuple[int, int], folder: Path, advance: Callable[[int], None]
) -> dict[str, float]:
    """Slopes between two stores of so many tiny units."""
    found = []
    for count in counts:
        url = str(folder / f"units-{count}")
        simulation.write(url, count * UNIT_ROWS, rows_per_shard=UNIT_ROWS, durable=False)
        advance(count)
        found.append(in_new_process(_units, url))
    few, many = found
    return {f"{key}_per_unit": (many[key] - few[key]) / (counts[1] - counts[0]) for key in few}


class _Stopwatch:
    """Seconds and memory of one action after the other."""

    def __init__(self) -> None:
        self.found: dict[str, float] = {}

    def time(self, name: str, action: Callable[[], Any], repeats: int = 1) -> Any:
        """Does it, and adds `NAME_seconds` (the median) and `NAME_bytes`, the memory at its height over that before."""
        Path("/proc/self/clear_refs").write_text("5")  # The height starts again from what is held now.
        before, result, seconds = peak_memory_bytes(), None, []
        for _ in range(repeats):
            started = time.perf_counter()
            result = action()
            seconds.append(time.perf_counter() - started)
        self.found |= {f"{name}_seconds": float(np.median(seconds)), f"{name}_bytes": peak_memory_bytes() - before}
        return result


def _read(url: str) -> dict[str, float]:
    from repcon.labels.statistics import figures

    watch = _Stopwatch()
    store = watch.time("open", lambda: LabelStore.open(url), REPEATS)
    watch.time("scan", store.completion.unfinished)
    generator = np.random.default_rng(0)

    def first_window() -> None:
        fresh = LabelStore.open(url)
        rows = next(fresh.reader.window_plan([0], seed=0, memory_bytes=WINDOW_BYTES))
        _gather(fresh.reader.window([0], rows).labels["synthetic"], generator, len(rows))

    def first_slab() -> None:
        crop_labels = LabelStore.open(url).reader.crop_labels(0)
        _gather(crop_labels.labels["synthetic"], generator, len(crop_labels.flips))

    watch.time("first_window", first_window, REPEATS)
    watch.time("first_slab", first_slab, 3)
    watch.time("inspect", lambda: figures(store))
    return watch.found


def _gather(pair: tuple[np.ndarray, np.ndarray], generator: np.random.Generator, count: int) -> list[np.ndarray]:
    rows = generator.integers(0, count, BATCH)
    return [array[rows] for array in pair]


def _units(url: str) -> dict[str, float]:
    from repcon.labels.statistics import figures

    watch = _Stopwatch()
    store = LabelStore.open(url)
    watch.time("scan", store.completion.unfinished)
    watch.time("poll", lambda: [unit for unit in store.units() if not store.completion.is_done(unit)])
    watch.time("inspect", lambda: figures(store))
    return watch.found
