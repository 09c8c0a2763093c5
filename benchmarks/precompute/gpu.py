"""Precomputing labels on a GPU: every loader, one crop per image and four, beside the teachers alone. Two minutes.

    python -m benchmarks.precompute.gpu [--packs FOLDER [--prepare]] [--budget 150] [--dry] [--json FILE] [--record]

For each ENSEMBLE (teachers that label in one pass), LOADER and number of crops:

ENSEMBLE_LOADER_CROPS_over_teachers   crops per second of the whole path (pack, decode, cut, teachers, top-k, store)
                  over those of the teachers' forward passes alone on tensors in memory, same batch size and precision
ENSEMBLE_LOADER_CROPS_steady_over_teachers   likewise, of the crops between a quarter of the job and all of it, so that
                  opening the loader, its first batch and finishing the store drop out
ENSEMBLE_LOADER_CROPS_crops_per_second, _steady_crops_per_second, _waited_share   as in precompute.py
ENSEMBLE_teachers_crops_per_second, ENSEMBLE_batch_size   of the teachers alone

Everything is in bf16 at 224 pixels. All teachers have random weights: speed does not know the difference. Images are
generated JPEGs of 500 x 375 pixels. Every line is printed as soon as it is known; nothing new is
started once --budget seconds have passed. Packs are made in --packs, or found there; --prepare makes them and ends.
--dry is a tiny form for a CPU, whose figures mean nothing.
"""

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import script
from benchmarks.loaders.sample_images import DIFFERENT, generated
from benchmarks.precompute.contenders import Job, Packs, alone, ours
from repcon.config import LoaderKind, Precision, TeacherConfig
from repcon.models import teacher as teachers
from repcon.models.teacher import Teacher
from repcon.models.timm_import import timm
from repcon.precompute.batching import find_batch_size
from repcon.runtime.console import console
from repcon.runtime.memory import keep_freed_memory

PICTURE = (500, 375)
ENSEMBLES = {
    "resnet50": ("resnet50",),
    "four": ("resnet50", "tf_efficientnet_lite0", "resnet18", "mobilenetv3_large_100"),
    "lite0": ("tf_efficientnet_lite0",),
}
CLASSES = {"resnet50": 1000, "tf_efficientnet_lite0": 1000, "resnet18": 100, "mobilenetv3_large_100": 200}


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """How much is run."""

    images: dict[int, int]
    """Of a job, by crops per image; the smaller job has a quarter."""
    shares: dict[str, int]
    """By ensemble: its jobs have one of so many parts of these images. In order."""
    precision: Precision = "bf16"
    size: int = 224
    loaders: tuple[LoaderKind, ...] = ("dali", "torch")
    batch_size: int = 0
    """0: what precompute finds."""

    def counts(self) -> set[int]:
        """Images of all packs."""
        wholes = [images // part for images in self.images.values() for part in self.shares.values()]
        return {count for whole in wholes for count in (whole, whole // 4)}


FULL = Setting(images={4: 8192, 1: 16384}, shares={"resnet50": 1, "four": 2, "lite0": 1})
DRY = Setting(images={4: 8, 1: 16}, shares={"lite0": 1}, precision="fp32", size=32, loaders=("torch",), batch_size=4)


def _model(architecture: str, size: int) -> tuple[torch.nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    model = timm.create_model(architecture, pretrained=False, num_classes=CLASSES[architecture])
    return model, {"size": size, "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}


resnet50, tf_efficientnet_lite0, resnet18, mobilenetv3_large_100 = (partial(_model, name, 224) for name in CLASSES)
"""Factories that a teacher's `model` can name."""


def load(names: tuple[str, ...], setting: Setting, device: torch.device) -> tuple[Teacher, ...]:
    """The teachers of a ensemble, with the setting's precision and input size."""
    loaded = []
    for name in names:
        config = TeacherConfig(name=name, model=f"benchmarks.precompute.gpu:{name}", precision=setting.precision)
        teacher = teachers.load_teacher(config, device)
        metadata = replace(teacher.metadata, preprocessing={**teacher.metadata.preprocessing, "size": setting.size})
        preprocessing = replace(teacher.preprocessing, size=setting.size)
        loaded.append(replace(teacher, preprocessing=preprocessing, metadata=metadata))
    return tuple(loaded)


def main() -> None:
    parser = script.parser("Precomputing labels on a GPU, by loader and crops per image.")
    parser.add_argument("--packs", default="", help="folder for the packs; default: one that is removed again")
    parser.add_argument("--prepare", action="store_true", help="only make the packs")
    parser.add_argument("--budget", type=float, default=150.0, help="seconds after which nothing new is started")
    parser.add_argument("--dry", action="store_true", help="a tiny form for a CPU")
    arguments = parser.parse_args()
    stop = time.perf_counter() + arguments.budget
    setting = DRY if arguments.dry else FULL
    with tempfile.TemporaryDirectory() as folder:
        place = Path(arguments.packs or folder)
        place.mkdir(parents=True, exist_ok=True)
        packs = Packs(generated(DIFFERENT, PICTURE), place)
        for count in sorted(setting.counts()):
            packs.of(count)
        if arguments.prepare:
            return
        keep_freed_memory()
        figures: dict[str, Any] = {"pictures": "generated", "weights": "random", "precision": setting.precision}
        race = Race(setting, torch.device("cpu" if arguments.dry else "cuda"), packs, Path(folder), stop, figures)
        for name in setting.shares:
            race.run(name)
    script.finish_figures("precompute-gpu", figures, "Precompute, random weights", arguments)


class Race:
    """Adds the figures of one ensemble after another."""

    def __init__(
        self,
        setting: Setting,
        device: torch.device,
        packs: Packs,
        folder: Path,
        stop: float,
        figures: dict[str, Any],
    ) -> None:
        self._setting, self._device, self._packs, self._folder = setting, device, packs, folder
        self._stop, self._figures = stop, figures

    def run(self, name: str) -> None:
        """All loaders and numbers of crops with the ensemble `name`. One that fails is shown and left out."""
        if self._late():
            return
        ensemble = load(ENSEMBLES[name], self._setting, self._device)
        batch_size = self._setting.batch_size or find_batch_size(ensemble, self._device)
        part = self._setting.shares[name]
        depths = {depth: images // part for depth, images in self._setting.images.items()}
        limit = self._job(ensemble, batch_size, 1, depths[1])
        alone(replace(limit, crops=1, pack=self._packs.of(depths[1] // 4)[0]))
        rate = max(limit.total / alone(limit).seconds for _ in range(2))
        self._figures |= {f"{name}_teachers_crops_per_second": round(rate, 1), f"{name}_batch_size": batch_size}
        _say(f"{name}: teachers alone {rate:,.0f} crops/s in batches of {batch_size}")
        for loader in self._setting.loaders:
            for depth, images in depths.items():
                if self._late():
                    return
                small, large = (self._job(ensemble, batch_size, depth, count) for count in (images // 4, images))
                self._guarded(f"{name}_{loader}_{depth}", partial(ours, loader=loader), small, large, rate)

    def _guarded(self, key: str, path: Callable, small: Job, large: Job, rate: float) -> None:
        try:
            self._measure(key, path, small, large, rate)
        except Exception as error:
            _say(f"{key}: failed: {type(error).__name__}: {str(error)[:300]}")
            self._figures[f"{key}_failed"] = str(error)[:300]

    def _measure(self, key: str, path: Callable, small: Job, large: Job, rate: float) -> None:
        path(small)  # opens libraries, compiles kernels
        first, whole = path(small), path(large)
        steady = (large.total - small.total) / max(whole.seconds - first.seconds, 1e-9)
        figures = {
            "over_teachers": large.total / whole.seconds / rate,
            "steady_over_teachers": steady / rate,
            "crops_per_second": large.total / whole.seconds,
            "steady_crops_per_second": steady,
            "waited_share": whole.event.waited_seconds / whole.event.seconds,
        }
        self._figures |= {f"{key}_{what}": round(value, 4) for what, value in figures.items()}
        _say(
            f"{key}: {figures['over_teachers']:.3f} of the teachers alone, "
            f"{figures['steady_over_teachers']:.3f} steady, {figures['crops_per_second']:,.0f} crops/s, "
            f"{steady:,.0f} steady, waited {100 * figures['waited_share']:.1f} %, {whole.seconds:.1f} s"
        )

    def _late(self) -> bool:
        return time.perf_counter() > self._stop

    def _job(self, ensemble: tuple[Teacher, ...], batch_size: int, crops: int, images: int) -> Job:
        pack, pictures = self._packs.of(images)
        return Job(
            teachers=ensemble,
            pack=pack,
            pictures=pictures,
            crops=crops,
            batch_size=batch_size,
            device=self._device,
            folder=self._folder,
        )


def _say(line: str) -> None:
    console.print(line, highlight=False, markup=False, soft_wrap=True)


if __name__ == "__main__":
    script.run(main)
