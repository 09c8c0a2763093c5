"""How precompute grows: over processes, and in memory and cost over images; the light teacher, in further processes."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.records import in_new_process, peak_memory_bytes, put
from benchmarks.precompute.contenders import CROP, MODELS, Job, Packs, load, ours
from repcon.config import Precision, PrecomputeConfig, TeacherConfig
from repcon.images.pack import ImagePack
from repcon.precompute import engine, launch_local
from repcon.precompute.batching import find_batch_size
from repcon.precompute.progress import Event
from repcon.runtime.memory import keep_freed_memory

CROPS, REPEATS = 4, 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """How much is run."""

    size: int
    images: int
    """N."""
    processes_images: int
    """Images that one or two processes label."""
    precision: Precision = "fp32"


def scaling(setting: Setting, device: torch.device, packs: Packs, folder: Path, figures: dict[str, Any]) -> None:
    """Crops per second of one and of two processes, from when a third of the work is done until nine tenths are."""
    slots = launch_local.worker_slots(2, torch.cuda.device_count() if device.type == "cuda" else 0)
    pack, _ = packs.of(setting.processes_images)
    for count in (1, 2):
        config = PrecomputeConfig(
            pack=pack.url,
            out=str(folder / f"processes-{count}.zarr"),
            teachers=(
                TeacherConfig(name="light", model=MODELS["light"], size=setting.size, precision=setting.precision),
            ),
            crops=2 * CROPS,
            crop=CROP,
            rows_per_shard=max(1, setting.processes_images // 24),
        )
        seen: list[tuple[float, int]] = [(time.perf_counter(), 0)]

        def take(event: Event, seen: list[tuple[float, int]] = seen) -> None:
            seen.append((time.perf_counter(), seen[-1][1] + event.crops))

        launch_local.run(engine.run_worker, (config,), slots[:count], take)
        total = seen[-1][1]
        within = [place for place in seen if total / 3 <= place[1] <= 0.9 * total]
        (start, before), (stop, after) = within[0], within[-1]
        figures[f"processes_{count}_crops_per_second"] = (after - before) / (stop - start)
    ratio = figures["processes_2_crops_per_second"] / figures["processes_1_crops_per_second"]
    figures["processes_2_over_1"] = ratio


def growth(setting: Setting, device: torch.device, packs: Packs, folder: Path, figures: dict[str, Any]) -> None:
    """Peak memory and cost per crop at N, 4 N and 16 N images, in one new process, the smallest first."""
    places = [packs.of(setting.images * times)[0].url for times in (1, 4, 16)]
    memory, rounds = in_new_process(_grow, setting, device.type, places, folder)
    for place, name in enumerate(("n", "4n", "16n")):
        figures[f"memory_bytes_{name}"] = memory[place]
        put(figures, f"seconds_per_crop_{name}", [costs[place] for costs in rounds])
    figures["memory_growth"] = memory[-1] / memory[0]
    put(figures, "cost_growth", [costs[-1] / costs[0] for costs in rounds])


def _grow(setting: Setting, kind: str, places: list[str], folder: Path) -> tuple[list[int], list[list[float]]]:
    """Peak memory after each of the packs, and in each round the seconds per crop of all of them."""
    keep_freed_memory()
    device = torch.device(kind)
    teachers = load({"light": setting.size}, setting.precision, device)
    batch_size = find_batch_size(teachers, device)
    jobs = [
        Job(
            teachers=teachers,
            pack=ImagePack.open(place),
            pictures=Path(),
            crops=CROPS,
            batch_size=batch_size,
            device=device,
            folder=folder,
        )
        for place in places
    ]
    ours(jobs[0], setting.images)  # Libraries and caches warm up.
    memory = []
    for job in jobs:  # The smallest first: a peak stays.
        ours(job, setting.images)
        memory.append(torch.cuda.max_memory_allocated() if kind == "cuda" else peak_memory_bytes())
    rounds = [[ours(job, setting.images).seconds / job.total for job in jobs] for _ in range(REPEATS)]
    return memory, rounds
