"""How others keep soft labels, and how other libraries read repcon's store. Four minutes on two cores.

    python -m benchmarks.store.peers [--newest-zarr PYTHON] [--short] [--json FILE] [--record]

Labels as in `benchmarks.store`. `pip install .[peers]`; a peer that is missing is named with its error. NAME_zstd and
NAME_lz4 read repcon's own store, in a process each: zarr (zarr-python), zarrs, tensorstore, and with --newest-zarr the
zarr and zarrs of another Python. The others keep files of their own: see `records.py` and `tables.py`.

NAME_slab_over_ours     time to read one crop of all images into memory, over repcon's reader of the same codec
NAME_slab_over_memmap   rate of the same, over copying the rows from a memory-mapped raw file
NAME_epoch_over_ours    time of shuffled epochs over repcon's: random batches of a slab while the next one is read
NAME_epoch_over_gather  rate of the same, over gathering the batches from the memory map
NAME_batch_over_ours    time to read 256 random rows from the files, over repcon's: what a training should not do
NAME_batch_over_gather  rate of the same, over a gather from the memory map
NAME_bytes_per_crop     all files, over their crops
LAYOUT_HEAD_kK_bytes    bytes per crop of one head at equal k: see `layouts.py`

`..._over_ours` above 1: repcon's reader is faster. Contenders take turns; figures are medians over these.
"""

import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness import script
from benchmarks.harness.records import cells, number
from benchmarks.harness.tables import Grid
from benchmarks.store.benchmark import RawFile
from benchmarks.store.labels import CROPS, HEADS, make_labels
from benchmarks.store.peers.contenders import open_all, ours_of
from benchmarks.store.peers.layouts import KS, measure_layouts
from benchmarks.store.peers.race import Race
from repcon.runtime.console import console, progress
from repcon.runtime.system import environment

NEAR = 1.3
"""A library that takes at most so many times as long would be used in place of repcon's own decoding."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """How much is written and read."""

    images: int
    images_as_files: int
    """Images of the peer that has a file for each."""
    layout_images: int
    layout_files: int
    turns: int
    most_seconds: float


FULL = Setting(images=32_768, images_as_files=512, layout_images=16_384, layout_files=512, turns=48, most_seconds=1.5)
SHORT = Setting(images=512, images_as_files=16, layout_images=256, layout_files=8, turns=3, most_seconds=0.1)


def main() -> None:
    parser = script.parser("How others keep soft labels, and how other libraries read repcon's store.")
    parser.add_argument("--newest-zarr", metavar="PYTHON", default="", help="another Python, whose zarr takes part too")
    parser.add_argument("--short", action="store_true", help="few rows, to see that it runs")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(SHORT if arguments.short else FULL, arguments.newest_zarr, Path(folder))
    figures["environment"] = environment() | {"device": "cpu"}
    script.finish("store-peers", figures, grids(figures), arguments)
    near = [name for name in opened(figures) if figures.get(f"{name}_slab_over_ours", NEAR + 1) <= NEAR]
    console.print(
        f"slabs within {NEAR} times the time of repcon's reader: {', '.join(near) or 'none'}", highlight=False
    )


def measure(setting: Setting, newest_zarr: str, folder: Path) -> dict[str, Any]:
    """All figures."""
    figures: dict[str, Any] = {"images": setting.images, "crops": CROPS}
    with progress() as bar, ExitStack() as stack:
        task = bar.add_task("store peers", total=5, unit="parts", note="writing")
        labels = make_labels(setting.images)
        contenders = open_all(folder, labels, setting.images_as_files, newest_zarr, figures, stack)
        raw = RawFile(folder / "raw", labels)
        raw.write()
        race = Race(contenders, raw, setting.turns, setting.most_seconds, figures)
        for note, part in (("slabs", race.slabs), ("batches", race.batches), ("epochs", race.epochs)):
            bar.update(task, advance=1, note=note)
            part()
        bar.update(task, advance=1, note="layouts")
        measure_layouts(folder / "layouts", setting.layout_images, setting.layout_files, figures)
        bar.advance(task)
    return figures


def opened(figures: Mapping[str, Any]) -> list[str]:
    """The contenders that took part."""
    return [name.removesuffix("_checks") for name in figures if name.endswith("_checks")]


def grids(figures: Mapping[str, Any]) -> list[Grid]:
    """The tables: the race, those that could not take part, and the layouts."""
    return [_race(figures), _absent(figures), _layouts(figures)]


RATES = ("slab_over_memmap", "batch_over_gather", "bytes_per_crop")


def _race(figures: Mapping[str, Any]) -> Grid:
    titles = ("peer", "slab, x ours", "20 to 80 %", "epoch, x ours", "batch, x ours")
    titles += ("slab / memory map", "batch / gather", "bytes/crop", "checks", "version")
    rows = []
    for name in opened(figures):
        slab = cells(figures, f"{name}_slab_over_ours") if name != ours_of(name) else ("1", "", "")
        others = [_one(figures, f"{name}_{part}_over_ours") or "1" for part in ("epoch", "batch")]
        rates = [
            _one(figures, f"{name}_{rate}") for rate in ("slab_over_memmap", "batch_over_gather", "bytes_per_crop")
        ]
        facts = [figures[f"{name}_checks"], figures.get(f"{name}_version", "")]
        rows.append((name, *slab[:2], *others, *rates, *facts))
    return Grid(title="Reading labels; time over repcon's reader of the same codec", titles=titles, rows=rows)


def _absent(figures: Mapping[str, Any]) -> Grid:
    rows = [(name.removesuffix("_error"), error) for name, error in figures.items() if name.endswith("_error")]
    return Grid(title="Not raced", titles=("peer", "error"), rows=rows or [("none", "")])


LAYOUTS = ("repcon_zstd", "repcon_gaps", "fkd", "fkd_disk", "tinyvit", "mldr", "mldr_disk", "npz", "npz_disk")


def _layouts(figures: Mapping[str, Any]) -> Grid:
    rows = []
    for head, (classes, _) in HEADS.items():
        for k in KS:
            sizes = (f"{name.removesuffix('_disk')}_{head}_k{k}{'_disk' * name.endswith('_disk')}" for name in LAYOUTS)
            rows.append((f"{classes:,}", str(k), *(_one(figures, f"{size}_bytes") for size in sizes)))
    titles = ("classes", "k", *(name.replace("_", " ") for name in LAYOUTS))
    title = f"Bytes per crop of one head; repcon keeps the crop once for all, in {number(figures['repcon_crop_bytes'])}"
    return Grid(title=title, titles=titles, rows=rows)


def _one(figures: Mapping[str, Any], name: str) -> str:
    return cells(figures, name)[0]
