"""Loaders against those of other projects, on the same images and boxes. Five minutes on two cores.

    python -m benchmarks.loaders.peers [--data FOLDER] [--images N] [--rounds N] [--json FILE] [--record]

1x160_NAME_over_decode    images per second over libjpeg-turbo's alone, as in `benchmarks.loaders`, on as many threads;
4x160_NAME_over_decode    1 and 4 crops of 160 pixels from 400 x 300; beside them NAME_images_per_second
                          NAME: torch, dali, ffcv (repcon's), dataloader_pil, ffcv_stock, and the peers torchvision,
                          litdata, streaming, webdataset, spdl (see contenders.py)
torch_over_NAME_4x160     repcon's `torch` over the peer, of the same round; also _1x160
NAME_first_batch_seconds  with 4 crops; from the import of its libraries, its data written before
NAME_peak_memory_bytes    of its process, libraries, mapped files and workers included
NAME_pixel_difference     a peer's mean absolute difference, of 255, to the reference loader, over 192 images
NAME_resumes              a text: what a new process yields that goes on after half of a shuffled epoch
NAME_missing              a text: why a peer takes no part

The peers are the extra `peers` and need not all be there. Pictures as in `benchmarks.loaders`.
"""

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import records, script
from benchmarks.harness.records import put
from benchmarks.harness.tables import Grid
from benchmarks.harness.targets import met, targets
from benchmarks.loaders.contenders import FLOOR, OURS, Case, write_stock
from benchmarks.loaders.peers import checks, contenders
from benchmarks.loaders.race import Race
from benchmarks.loaders.sample_images import generated, mosaics, pack, photographs
from repcon.images.pack import ImagePack
from repcon.runtime.console import console, progress
from repcon.runtime.system import cores, environment

SIZE, SIDE, CROPS = (400, 300), 160, (1, 4)
IMAGES, ROUNDS, CHECKED_IMAGES = 512, 3, 192
REFERENCE = "torch"
"""Ratios are of this one."""


def main() -> None:
    parser = script.parser("Loaders against those of other projects.", data="folder of tars of photographs")
    parser.add_argument("--images", type=int, default=IMAGES)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(arguments.images, arguments.rounds, arguments.data, Path(folder))
    facts = environment()
    figures |= {"environment": facts, "targets": targets("loaders_peers", facts["device"])}
    script.finish("loaders-peers", figures, grids(figures), arguments)


def measure(images: int, rounds: int, data: str, folder: Path) -> dict[str, Any]:
    """All figures."""
    threads = cores()
    figures: dict[str, Any] = {"pictures": "photographs" if data else "generated", "threads": threads}
    missing = contenders.missing()
    figures |= {f"{name}_missing": error for name, error in missing.items()}
    present = [name for name in contenders.PEERS if name not in missing]
    figures["peers_decode_with"] = contenders.decoder_name()
    taken = photographs(Path(data), images) if data else []
    packs = {}
    console.quiet = True
    for count in {images, min(images, CHECKED_IMAGES)}:
        made = mosaics(taken, count, SIZE) if taken else generated(count, SIZE)
        packs[count] = str(pack(made, folder / f"pack-{count}"))
    console.quiet = False
    write_stock(Path(packs[images]), threads)
    figures["images"] = images
    figures["bytes_per_image"] = float(ImagePack.open(packs[images]).lengths.mean())
    with progress() as bar:
        task = bar.add_task("loaders", total=2 + len(present) + len(CROPS), unit="parts", note="writing")
        for name in present:
            for packed in packs.values():
                contenders.write(name, packed, threads)
        few = Case(pack=packs[min(packs)], crops=max(CROPS), side=SIDE)
        for name in present:
            bar.update(task, advance=1, note=f"{name}: pixels, resuming")
            figures[f"{name}_pixel_difference"] = checks.pixel_difference(name, few, threads)
            figures[f"{name}_resumes"] = checks.resumes(name, few, threads)
        figures[f"{REFERENCE}_resumes"] = checks.resumes(REFERENCE, few, threads)
        for note in race(packs[images], rounds, present, figures):
            bar.update(task, advance=1, note=note)
    return figures


def race(packed: str, rounds: int, present: list[str], figures: dict[str, Any]) -> Iterator[str]:
    """Adds rates, ratios, first batches and memory; says what comes next."""
    others = {name: contenders.PEERS[name].open for name in present}
    with closing(Race(figures["threads"], figures, others)) as running:
        for crops in CROPS:
            yield f"{crops} crops"
            case = Case(pack=packed, crops=crops, side=SIDE)
            opened = running.run(case, rounds, kinds=running.kinds, name=f"{crops}x{SIDE}_{{}}")
            for name in running.kinds:
                if name not in OURS:
                    ratios = running.seconds[name], running.seconds[REFERENCE]
                    put(figures, f"{REFERENCE}_over_{name}_{crops}x{SIDE}", np.divide(*ratios))
        running.first_batches(case, opened, openings=1)
    yield "done"


TITLES = (
    "loader", "4 crops, crops/s", "over bare decode", "torch over it", "1 crop, images/s", "over bare decode",
    "torch over it", "first batch s", "peak MB", "pixels off, of 255", "resumes in an epoch with",
)  # fmt: skip


def grids(figures: Mapping[str, Any]) -> list[Grid]:
    """One table, a line for each loader, and a line for each that is missing."""
    names = [FLOOR, *OURS, "dataloader_pil", "ffcv_stock", *contenders.PEERS]
    title = (
        f"1 and 4 crops of 160 pixels from 400 x 300 ({figures['pictures']}, "
        f"{figures['bytes_per_image'] / 1000:.0f} kB), {figures['threads']} threads; "
        f"torchvision, litdata, streaming and webdataset decode with {figures['peers_decode_with']}"
    )
    return [Grid(title=title, titles=TITLES, rows=[row for name in names if (row := _row(figures, name))])]


def _row(figures: Mapping[str, Any], name: str) -> list[str]:
    """Empty where nothing is known of the loader."""
    if f"{name}_missing" in figures:
        return [name, f"missing: {figures[f'{name}_missing']}", *[""] * (len(TITLES) - 2)]
    if f"{max(CROPS)}x{SIDE}_{name}_images_per_second" not in figures:
        return []
    cells = [name]
    for crops in reversed(CROPS):
        rate = figures[f"{crops}x{SIDE}_{name}_images_per_second"]
        cells.append(f"{crops * rate:,.0f}" if name != FLOOR else f"{rate:,.0f} images/s")
        cells.append("1" if name == FLOOR else _cell(figures, f"{crops}x{SIDE}_{name}_over_decode"))
        cells.append(_cell(figures, f"{REFERENCE}_over_{name}_{crops}x{SIDE}"))
    cells.append(records.cells(figures, f"{name}_first_batch_seconds")[0])
    cells.append(f"{figures[f'{name}_peak_memory_bytes'] / 1e6:,.0f}")
    return [*cells, _cell(figures, f"{name}_pixel_difference"), figures.get(f"{name}_resumes", "")]


def _cell(figures: Mapping[str, Any], name: str) -> str:
    """Value and spread, and whether its target is missed."""
    value, spread, _ = records.cells(figures, name)
    target = figures["targets"].get(name)
    verdict = " MISSED" if target and value and not met(target, figures[name]) else ""
    return f"{value}{f' ({spread})' if spread else ''}{verdict}"
