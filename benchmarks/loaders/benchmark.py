"""Loaders against bare JPEG decoding, and against how others cut crops; and whether they cut the teacher's crop.

    python -m benchmarks.loaders [--data FOLDER] [--long] [--json FILE] [--record]

NAME_over_decode      images per second over libjpeg-turbo's alone (simplejpeg, on bytes in memory, into a buffer that
                      is used again) on the same images and as many threads; 4 crops of 160 pixels from 400 x 300
                      NAME: torch, dali, ffcv, and the peers dataloader_pil, ffcv_stock (see contenders.py)
NAME_decode_only_over_decode  the same without a crop: reading, decoding and handing over nothing; also bare_odd, the
                      floor's own loop into a buffer at an odd address, as repcon's loaders have it
NAME_checked_over_unchecked   time of a first epoch with every image compared with its content hash, over one without
NAME_first_batch_seconds      from the import of its libraries; numba's caches are warm, FFCV's compiler keeps none
NAME_peak_memory_bytes        of its process, libraries, mapped files and workers included
NAME_pixel_difference         mean absolute, of 255, to the float32 reference, on crops of the teacher's size
NAME_label_kl, _agreement     from the label that `repcon precompute` stored to the teacher on the crop of the loader

--long: also 1, 4 and 8 crops of 64, 160 and 224 pixels from 400 x 300 and 1280 x 960: 400x300_1x64_NAME_over_decode ...
On a GPU also DALI's mixed decode: dali_mixed_over_decode, ...; whether it keeps a student fed: gpu.py.
Pictures are generated (sample_images.py); with --data, or REPCON_DATA, photographs from a folder of tars: mosaics of
them where a size is given, themselves for the labels. Contenders take turns; each is timed right after the floor.
"""

import tempfile
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness import script
from benchmarks.harness.targets import targets
from benchmarks.loaders.contenders import FLOOR_ODD, OURS, Case, write_stock
from benchmarks.loaders.contract import contract, put_contract
from benchmarks.loaders.grids import grids
from benchmarks.loaders.race import Race
from benchmarks.loaders.sample_images import Size, generated, mosaics, pack, photographs
from repcon.decode.libraries import installed
from repcon.images.pack import ImagePack
from repcon.runtime.console import console, progress
from repcon.runtime.system import cores, environment

SIZES: dict[str, Size] = {"400x300": (400, 300), "1280x960": (1280, 960)}
MAIN, LABELLED = "400x300", "labelled"
CROPS, SIDE = 4, 160
SWEEP = [(size, crops, side) for size in SIZES for crops in (1, 4, 8) for side in (64, 160, 224)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """How much is run."""

    images: dict[str, int]
    """Of each size, and those that are labelled."""
    teacher_side: int
    rounds: int
    openings: int
    """Processes in which the time to the first batch is taken."""
    sweep: tuple[tuple[str, int, int], ...] = ()
    """(size, crops, side) of further rows."""
    sweep_rounds: int = 5


SHORT = Setting(images={MAIN: 768, LABELLED: 384}, teacher_side=128, rounds=5, openings=1)
LONG = Setting(
    images={MAIN: 1024, "1280x960": 160, LABELLED: 2048}, teacher_side=224, rounds=11, openings=5, sweep=tuple(SWEEP)
)


def main() -> None:
    parser = script.parser(
        "Loaders against bare JPEG decoding, and against their peers.", data="folder of tars of photographs"
    )
    parser.add_argument("--long", action="store_true", help="more rounds, and every number and size of crops")
    arguments = parser.parse_args()
    setting = LONG if arguments.long else SHORT
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(setting, arguments.data, Path(folder))
    facts = environment()
    figures |= {"environment": facts, "targets": targets("loaders", facts["device"])}
    found = grids(figures, [(case_name(*row), row[1]) for row in setting.sweep])
    script.finish("loaders", figures, found, arguments)


def measure(setting: Setting, data: str, folder: Path) -> dict[str, Any]:
    """All figures."""
    threads = cores()
    figures: dict[str, Any] = {"pictures": "photographs" if data else "generated", "threads": threads}
    packs = make_packs(setting, data, folder)
    small = ImagePack.open(packs[MAIN])
    figures |= {"images": len(small), "bytes_per_image": float(small.lengths.mean())}
    with progress() as bar:
        task = bar.add_task("loaders", total=4 + len(setting.sweep), unit="parts", note="labels")
        labels(packs[LABELLED], folder / "labels.zarr", setting, figures)
        bar.update(task, advance=1, note="4 crops of 160")
        with closing(Race(threads, figures)) as race:
            for part in parts(race, packs, setting):
                bar.update(task, advance=1, note=part)
    return figures


def parts(race: Race, packs: dict[str, Path], setting: Setting) -> Iterator[str]:
    """Runs one after the other, and says what comes next."""
    case = Case(pack=str(packs[MAIN]), crops=CROPS, side=SIDE)
    opened = race.run(case, setting.rounds, kinds=race.kinds, name="{}")
    race.first_batches(case, opened, setting.openings)
    yield "decoding alone"
    decoding = Case(pack=case.pack, crops=0, side=1)
    race.run(decoding, setting.rounds, kinds=(FLOOR_ODD, *race.ours), name="{}_decode_only")
    yield "content hashes"
    race.checks(case, setting.rounds)
    for size, crops, side in setting.sweep:
        yield f"{crops} crops of {side} from {size}"
        row = Case(pack=str(packs[size]), crops=crops, side=side)
        name = f"{case_name(size, crops, side)}_{{}}"
        race.run(row, setting.sweep_rounds, kinds=race.kinds, name=name)
    yield ""


def case_name(size: str, crops: int, side: int) -> str:
    """A row's name, as its figures begin."""
    return f"{size}_{crops}x{side}"


def make_packs(setting: Setting, data: str, folder: Path) -> dict[str, Path]:
    """A pack per size, and the one whose crops are labelled: photographs as they are, or the generated pictures."""
    console.quiet = True
    found: dict[str, Path] = {}
    taken = photographs(Path(data), setting.images[LABELLED]) if data else []
    for size, pixels in SIZES.items():
        if count := setting.images.get(size, 0):
            pictures = mosaics(taken, count, pixels) if taken else generated(count, pixels)
            found[size] = pack(pictures, folder / size)
            write_stock(found[size], cores())
    count = setting.images[LABELLED]
    found[LABELLED] = pack(taken or generated(count, SIZES[MAIN], seed=1), folder / LABELLED)
    console.quiet = False
    return found


def labels(packed: Path, store: Path, setting: Setting, figures: dict[str, Any]) -> None:
    """Adds how far each loader's crops are from the teacher's."""
    figures |= {"label_images": len(ImagePack.open(packed)), "teacher_side": setting.teacher_side}
    present = [kind for kind in OURS if installed(kind)]
    for kind, found in contract(packed, store, setting.teacher_side, present, "cpu").items():
        put_contract(figures, kind, found)
