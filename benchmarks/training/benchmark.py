"""Training from stored labels against what it replaces. Two minutes on two cores, four on a GPU; `--long` for steadier
figures on cores.

    python -m benchmarks.training [--long] [--device cuda] [--loader KIND] [--num-workers N] [--json FILE] [--record]

step_over_synthetic    rate of the trainer's steps over the same steps on one batch that lies in memory (1: never waits)
epoch_over_plain_1, 4  time per crop over plain supervised training (timm's loader, hard labels), same backbone, with
                       1 and 4 crops per decoded image; a small backbone, so that decoding is a real share of the work
ideal_over_ours        time of the student alone (same crops, cross-entropy) over ours: what labels and KL cost
online_over_ours       time with the teacher in every step, timm.task's distillation, over ours; one teacher
online_two_over_ours   the same in plain torch with two teachers of different classes, over ours with two heads
torchdistill_over_ours the same as online_over_ours through torchdistill, where it is installed
bf16_over_fp32         time in bf16 over the same in float32, on a CPU that has instructions for it; all else here is in
                       float32 on CPUs and in bf16 on GPUs
torch_over_synthetic   on a GPU: step_over_synthetic where the CPU decodes (loader `torch`) instead of the GPU
data_share             of the trainer's time, the part spent waiting for data
*_memory_bytes         the largest memory while each ran: of the GPU, or resident in a process of its own (plain without
                       its loader's processes); more of them with --long

Every round runs all contenders once, one after the other; figures are medians over rounds of the ratio within a
round. Freed memory is kept, as `repcon train` keeps it, for all of them.
The pictures are generated JPEGs of 500 x 375 pixels and about 100 kB, the stored labels random.
"""

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch

from benchmarks.harness import script
from benchmarks.harness.records import in_new_process, peak_memory_bytes, put
from benchmarks.training.contenders import Contender, heavy_contenders, light_contenders
from benchmarks.training.data import Setting, make_data, open_data
from repcon.config import LoaderKind
from repcon.runtime.console import console, progress
from repcon.runtime.memory import keep_freed_memory

SHORT = Setting(heavy_images=64, light_images=192, batch_size=16, rounds=3)
LONG = Setting(heavy_images=256, light_images=960, batch_size=32, rounds=7)
GPU = Setting(
    heavy_images=7680,
    light_images=4096,
    batch_size=256,
    rounds=3,
    heavy_epochs=3,
    heavy="resnet50",
    size=224,
    precision="bf16",
)
ALONE, ALONE_LONG = ("ours", "online", "plain"), ("ours", "ideal", "online", "online_two", "plain", "ours_4")
"""Whose memory is measured on a CPU."""


def main() -> None:
    parser = script.parser("Training from stored labels against what it replaces.")
    parser.add_argument("--long", action="store_true", help="more images and rounds")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--loader", default="auto", choices=get_args(LoaderKind), help="what feeds ours")
    parser.add_argument("--num-workers", type=int, default=0, help="its threads; 0: as it chooses")
    arguments = parser.parse_args()
    setting = GPU if arguments.device == "cuda" else LONG if arguments.long else SHORT
    setting = replace(setting, loader=arguments.loader, num_workers=arguments.num_workers)
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(setting, arguments.device, Path(folder), ALONE_LONG if arguments.long else ALONE)
    figures["loader"] = f"{setting.loader}, {setting.num_workers or 'its own number of'} threads"
    facts = {} if arguments.device == "cuda" else {"device": "cpu"}
    script.finish_figures("training", figures, "Training", arguments, **facts)


def measure(setting: Setting, device: str, folder: Path, alone: Sequence[str]) -> dict[str, Any]:
    """Seconds per crop of every contender in every round, and the memory of some, as the figures named above."""
    data = make_data(folder, setting)
    heavy = timed(heavy_contenders(data, setting, device), setting.rounds, device)
    light = timed(light_contenders(data, setting, device), setting.rounds, device)

    ratios = {
        "step_over_synthetic": (heavy, "synthetic", "ours"),
        "ideal_over_ours": (heavy, "ideal", "ours"),
        "online_over_ours": (heavy, "online", "ours_one"),
        "online_two_over_ours": (heavy, "online_two", "ours"),
        "torchdistill_over_ours": (heavy, "torchdistill", "ours_one"),
        "epoch_over_plain_1": (light, "ours_1", "plain"),
        "epoch_over_plain_4": (light, "ours_4", "plain"),
    }
    figures: dict[str, Any] = {}
    for name, (part, above, below) in ratios.items():
        if above in part.seconds:
            put(figures, name, np.divide(part.seconds[above], part.seconds[below]))
        else:
            console.print(f"{above} is not installed and takes no part: pip install {above}", highlight=False)
    if "ours_torch" in heavy.seconds:
        put(figures, "torch_over_synthetic", np.divide(heavy.seconds["synthetic"], heavy.seconds["ours_torch"]))
    if "ours_bf16" in heavy.seconds:
        put(figures, "bf16_over_fp32", np.divide(heavy.seconds["ours_bf16"], heavy.seconds["ours"]))
    put(figures, "data_share", heavy.data_shares["ours"])
    put(figures, "images_per_second", 1 / np.array(heavy.seconds["ours"]))
    peaks = heavy.memory | light.memory
    if device == "cpu":
        peaks = {name: in_new_process(peak_alone, name, folder, setting) for name in alone}
    return figures | {f"{name}_memory_bytes": peak for name, peak in peaks.items()}


class Measured:
    """Per contender: seconds per crop and share of waiting per round, and the largest memory."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}
        self.data_shares: dict[str, list[float]] = {}
        self.memory: dict[str, int] = {}


def timed(contenders: Mapping[str, Contender], rounds: int, device: str) -> Measured:
    """Each round runs every contender's epoch once; the first round only warms up."""
    result = Measured()
    with progress() as bars:
        task = bars.add_task("rounds", total=(rounds + 1) * len(contenders), unit="epochs", note="")
        for number in range(rounds + 1):
            for name, contender in contenders.items():
                bars.update(task, note=name)
                seconds, crops = _epoch(contender.epoch, device)
                bars.advance(task)
                if number:
                    result.seconds.setdefault(name, []).append(seconds / crops)
                    result.data_shares.setdefault(name, []).append(contender.data_seconds() / seconds)
                    if device == "cuda":
                        result.memory[name] = max(torch.cuda.max_memory_allocated(), result.memory.get(name, 0))
                else:
                    contender.data_seconds()
    for contender in contenders.values():
        contender.close()
    # At once: a run on a borrowed machine may be cut off before the table.
    for name, seconds in result.seconds.items():
        rates = ", ".join(f"{1 / second:,.0f}" for second in seconds)
        console.print(f"{name}: {rates} crops per second", highlight=False)
    return result


def _epoch(epoch: Callable[[], int], device: str) -> tuple[float, int]:
    """(seconds, crops) of one epoch."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    crops = epoch()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started, crops


def peak_alone(name: str, folder: Path, setting: Setting) -> int:
    """Bytes of this process's largest resident memory once one contender has run an epoch."""
    keep_freed_memory()
    data = open_data(folder)
    contenders = light_contenders if name in ("plain", "ours_4") else heavy_contenders
    chosen = contenders(data, setting, "cpu", only=name)[name]
    chosen.epoch()
    chosen.close()
    return peak_memory_bytes()
