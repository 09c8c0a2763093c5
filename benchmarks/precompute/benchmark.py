"""Precomputing labels against its limit, the teachers' own forward passes. Seven minutes on two cores.

    python -m benchmarks.precompute [--data FOLDER] [--long] [--json FILE] [--record]

over_teachers_light, _heavy, _two   crops per second of the whole path (pack, decode, cut, teachers, top-k, store) over
                  those of the teachers alone on normalised tensors in memory; same process, batch and precision; light:
                  EfficientNet-Lite0, heavy: ResNet-50 with random weights (timing does not know the difference), two:
                  both in one pass, each with its own input size. 4 crops per image; _1 and _16 where the name says so
over_limit_light, ...   on a CPU: the teachers' time alone and the loader's alone, each on all cores, over our time.
                  Both take the same cores, so that their sum is the limit of any path that decodes and answers
waited_share_*    of our path's time, the part in which the teachers had no pixels or no room for their answers
compiled_over_teachers_light, _heavy   the teachers alone compiled (`compile = true`) over themselves as they are, after
                  compiling; left out where there is no C++ compiler
fkd_over_ours     time of the light teacher's job done as FKD does it over our time: DataLoader, PIL, torchvision, a
                  file per image (see contenders.py); _1 and _16 as above
processes_2_over_1   crops per second of two processes over one, each with half of the cores (on GPUs: one each, where
                  there are two)
memory_growth     peak memory of a process that labels 16 N images over that at N images
cost_growth       seconds per crop likewise, in turns; seconds_per_crop_*, memory_bytes_*: at N, 4 N and 16 N

Pictures are generated JPEGs of 400 x 300 pixels (sample_images.py); with --data, or REPCON_DATA, mosaics of
photographs from a folder of tars. Contenders take turns, ratios are taken within a round. Where there is a GPU,
everything runs on it.
"""

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import script
from benchmarks.harness.records import put
from benchmarks.loaders.sample_images import DIFFERENT, generated, mosaics, photographs
from benchmarks.precompute import growth as precompute_growth
from benchmarks.precompute.contenders import Job, Packs, Took, alone, decode, fkd, load, ours
from repcon.config import Precision
from repcon.models.teacher import Teacher
from repcon.precompute.batching import find_batch_size
from repcon.runtime.console import console, progress
from repcon.runtime.memory import keep_freed_memory

PICTURE = (400, 300)
CROPS, OTHER_CROPS = 4, (1, 16)
ENSEMBLES = {"light": ("light",), "heavy": ("heavy",), "two": ("light", "heavy")}


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """How much is run."""

    light_size: int
    heavy_size: int
    seconds: float
    """For which the teachers alone are to be busy in one run."""
    rounds: int
    growth: precompute_growth.Setting
    precision: Precision = "fp32"
    swept: tuple[str, ...] = ("light",)
    """Ensembles that also run with 1 and 16 crops per image."""
    peers: bool = True
    """Whether FKD and compiled teachers take part."""


SHORT = Setting(
    light_size=128, heavy_size=128, seconds=8.0, rounds=3,
    growth=precompute_growth.Setting(size=64, images=64, processes_images=192),
)  # fmt: skip
LONG = Setting(
    light_size=128, heavy_size=224, seconds=15.0, rounds=7, swept=("light", "heavy"),
    growth=precompute_growth.Setting(size=64, images=256, processes_images=1024),
)  # fmt: skip
GPU = Setting(
    light_size=224, heavy_size=224, seconds=2.0, rounds=3, precision="bf16", swept=("heavy",), peers=False,
    growth=precompute_growth.Setting(size=224, images=512, processes_images=16_384, precision="bf16"),
)  # fmt: skip
GPU_LONG = replace(GPU, seconds=5.0, swept=("light", "heavy"), peers=True)


def main() -> None:
    parser = script.parser(
        "Precomputing labels against the teachers alone, and against FKD.", data="folder of tars of photographs"
    )
    parser.add_argument("--long", action="store_true", help="larger jobs and more rounds")
    arguments = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    settings = (GPU, GPU_LONG) if on_gpu else (SHORT, LONG)
    setting = settings[arguments.long]
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(setting, torch.device("cuda" if on_gpu else "cpu"), arguments.data, Path(folder))
    pictures = "mosaics of photographs" if arguments.data else "generated"
    figures |= {"pictures": pictures, "heavy_weights": "random"}
    title = f"Precompute; the heavy teacher's weights are random; pictures: {pictures}"
    script.finish_figures("precompute", figures, title, arguments)


def measure(setting: Setting, device: torch.device, data: str, folder: Path) -> dict[str, Any]:
    """All figures."""
    if data:
        packs = Packs(mosaics(photographs(Path(data), 1000), DIFFERENT, PICTURE), folder)
    else:
        packs = Packs(generated(DIFFERENT, PICTURE), folder)
    figures: dict[str, Any] = {"light_size": setting.light_size, "heavy_size": setting.heavy_size}
    with progress() as bars:
        task = bars.add_task("precompute", total=len(ENSEMBLES) * (setting.rounds + 1) + 2, unit="rounds", note="")
        race = Race(setting, device, packs, folder, lambda note: bars.update(task, advance=1, note=note))
        for name in ENSEMBLES:
            race.run(name, figures)
        race.step("processes")
        if torch.cuda.device_count() != 1:
            precompute_growth.scaling(setting.growth, device, packs, folder, figures)
        race.step("growth")
        precompute_growth.growth(setting.growth, device, packs, folder, figures)
    return figures


@dataclass(frozen=True, slots=True)
class Race:
    """A ensemble of teachers at a time: all contenders in turns, round by round."""

    setting: Setting
    device: torch.device
    packs: Packs
    folder: Path
    step: Callable[[str], None]

    def run(self, name: str, figures: dict[str, Any]) -> None:
        """Adds the figures of the ensemble `name`. Its jobs have the same number of crops, so that seconds compare."""
        every = {"light": self.setting.light_size, "heavy": self.setting.heavy_size}
        sizes = {member: every[member] for member in ENSEMBLES[name]}
        teachers = load(sizes, self.setting.precision, self.device)
        batch_size = find_batch_size(teachers, self.device)
        self.step(name)
        warm = self._job(teachers, batch_size, CROPS, max(DIFFERENT, batch_size) // CROPS)
        ours(warm)
        alone(warm)
        rate = warm.total / alone(warm).seconds
        crops = batch_size * max(4, round(self.setting.seconds * rate / batch_size))
        depths = (CROPS, *(OTHER_CROPS if name in self.setting.swept else ()))
        jobs = {depth: self._job(teachers, batch_size, depth, crops // depth) for depth in depths}
        contenders: dict[str, tuple[Callable[[Job], Took], Job]] = {"alone": (alone, jobs[CROPS])}
        contenders |= {f"ours_{depth}": (ours, job) for depth, job in jobs.items()}
        if self.device.type == "cpu":
            contenders |= {f"decode_{depth}": (decode, job) for depth, job in jobs.items()}
        if self.setting.peers and len(teachers) == 1 and shutil.which("g++"):
            compiled = load(sizes, self.setting.precision, self.device, compile=True)
            contenders["compiled"] = (alone, replace(jobs[CROPS], teachers=compiled))
            alone(contenders["compiled"][1])
        if self.setting.peers and name == "light":
            contenders |= {f"fkd_{depth}": (fkd, job) for depth, job in jobs.items()}
        rounds = []
        for number in range(self.setting.rounds):
            rounds.append({label: contender(job) for label, (contender, job) in contenders.items()})
            self.step(f"{name}, round {number + 1}")
        figures |= {f"batch_size_{name}": batch_size, f"crops_{name}": crops}
        _ratios(name, rounds, figures)
        share, rate = (figures[f"{what}_{name}"] for what in ("over_teachers", "crops_per_second"))
        console.print(f"{name}: {share:.3f} of the teachers alone, {rate:,.0f} crops/s", highlight=False)

    def _job(self, teachers: tuple[Teacher, ...], batch_size: int, crops: int, images: int) -> Job:
        pack, pictures = self.packs.of(images)
        return Job(
            teachers=teachers,
            pack=pack,
            pictures=pictures,
            crops=crops,
            batch_size=batch_size,
            device=self.device,
            folder=self.folder,
        )


def _ratios(name: str, rounds: list[dict[str, Took]], figures: dict[str, Any]) -> None:
    for label in rounds[0]:
        who, _, crops = label.partition("_")
        tail = "" if crops == str(CROPS) else f"_{crops}"
        if who == "ours":
            put(figures, f"over_teachers_{name}{tail}", [r["alone"].seconds / r[label].seconds for r in rounds])
            events = [r[label].event for r in rounds]
            put(figures, f"waited_share_{name}{tail}", [event.waited_seconds / event.seconds for event in events])
            put(figures, f"crops_per_second_{name}{tail}", [r[label].event.crops / r[label].seconds for r in rounds])
        elif who == "decode":
            limits = [r["alone"].seconds + r[label].seconds for r in rounds]
            put(
                figures, f"over_limit_{name}{tail}",
                [limit / r[f"ours_{crops}"].seconds for limit, r in zip(limits, rounds, strict=True)],
            )  # fmt: skip
        elif who == "compiled":
            put(figures, f"compiled_over_teachers_{name}", [r["alone"].seconds / r[label].seconds for r in rounds])
        elif who == "fkd":
            put(figures, f"fkd_over_ours{tail}", [r[label].seconds / r[f"ours_{crops}"].seconds for r in rounds])
