"""Whether the margins grow with training: the study's `--long` form cut to some minutes of one GPU.

    python -m benchmarks.experiments.consolidation.growth --data FOLDER --json FILE            six minutes on a GPU
    python -m benchmarks.experiments.consolidation.growth --data FOLDER --dry     a minute: that it runs, no result

The same teachers and labels for students of 1, 5 and 20 times the crops of the form for a CPU; the whole network is
trained, as in `--long`. What the last length may be is settled by the time that the first two took. After each length
its figures are printed, and FILE holds all so far.

lengths.N             the benchmark's figures of students that saw N times the crops
growth_N_finding_2    points of `finding_2` at N times the crops - those at the first length, paired by seed and domain;
                      likewise of every other margin, `growth_N_finding_3_shot_5` and so on
"""

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.experiments.consolidation import summary
from benchmarks.experiments.consolidation.protocol import LONG, Protocol
from benchmarks.experiments.consolidation.study import Study
from benchmarks.harness import script
from benchmarks.harness.records import markdown
from repcon.runtime.console import console
from repcon.runtime.run_dir import write_json
from repcon.runtime.system import environment

LENGTHS = (1, 5, 20)
EPOCHS = 5
"""At the length of 1: 12,250 crops of 2,450 images per student, as in the form for a CPU.

An estimate, not a measurement, of what fits into six minutes of an H200 with 16 cores:

- EfficientNet-Lite0 at 160 pixels has 0.2 GMAC and 3.4 million activations. Forward and backward of a crop are
  1.2 GFLOP, 2 us at 790 TFLOP/s, and move about 40 bytes per activation, 140 MB, 32 us at 4.3 TB/s: 30,000 crops/s.
- A step of 64 crops is 2 ms of that, and some 1,200 launches of 7 us, 8 ms: so four processes share the GPU.
- All lengths together are 26 x 12,250 crops of six students: 65 s, or 130 s if half of the rate is lost.
- Decoding: two cores give 3,000 crops/s of larger photographs, 16 cores 24,000.
- Packs 10 s, teachers 25 s, labels (250,000 forward passes) 20 s; per length 20 s to start processes, 25 s of probes.

Together 4.5 to 5.5 minutes.
"""
SIX_MINUTES = replace(
    LONG, name="six-minutes", domains=("birds", "grocery"), seeds=(0, 1), proxy_images=2500, size=160, crops=20,
    epochs=EPOCHS, batch_size=64, loader="torch",
    methods=("generalist", "teacher", "average", "task_generalist", "average_of_students", "tasks_generalist",
             "ceiling"),
)  # fmt: skip
DRY = replace(
    SIX_MINUTES, name="dry", domains=("aerial",), seeds=(9,), proxy_images=64, size=32, crops=2, epochs=1,
    teacher_epochs=1, fewshot_trials=2, methods=("generalist", "teacher", "average", "task_generalist"),
    device="auto",
)  # fmt: skip
LATER = ("generalist", "teacher", "task_generalist", "tasks_generalist", "ceiling")
"""The methods after the first length: the means that students start from are the same."""
JOBS = 4
"""On a GPU: students of two seeds and two domains."""
SHOWN = {"finding_2": "student", "finding_3": "ONE student"}


class Length(Study):
    """The study with students of another length beside those of the work folder; teachers and labels are shared."""

    @property
    def _form(self) -> str:
        return f"{super()._form}-epochs-{self.protocol.epochs}"


class Growth:
    """Adds the figures of one length after another."""

    def __init__(self, source: Path, work: Path, protocol: Protocol, jobs: int, seconds: float) -> None:
        """seconds: in which all is to end."""
        self._source, self._work, self._protocol, self._jobs = source, work, protocol, jobs
        self._started, self._seconds = time.monotonic(), seconds
        self.took: dict[int, float] = {}
        """Seconds of each length."""
        self.figures: dict[str, Any] = {"lengths": {}, "environment": environment()}

    def run(self, times: int) -> None:
        """Students of `times` the crops."""
        methods = [method for method in self._protocol.methods if not self.took or method in LATER]
        protocol = replace(self._protocol, epochs=times * self._protocol.epochs, methods=tuple(methods))
        study = Length(self._source, self._work / protocol.name, protocol, self._jobs)
        study.label()  # What all lengths share is no part of the first one's time.
        started = time.monotonic()
        results = summary.summarise(study.run(), protocol, study.facts())
        self.took[times] = time.monotonic() - started
        first = next(iter(self.figures["lengths"].values()), results)
        self.figures["lengths"][str(times)] = results
        if first is not results:
            self._add_growth(times, results["margins_of_runs"], first["margins_of_runs"])
        self.figures["wall_seconds"] = round(time.monotonic() - self._started)

    def last(self, longest: int) -> int:
        """The length up to `longest` that still fits, by what the two lengths before took; 0 if it is none of them."""
        (short, seconds), (long, more) = self.took.items()
        each = max((more - seconds) / (long - short), 1e-9)
        left = self._seconds - (time.monotonic() - self._started)
        fitting = min(longest, long + int((left - more) / each))
        return fitting if fitting > long else 0

    def _add_growth(self, times: int, margins: Mapping[str, Any], first: Mapping[str, Any]) -> None:
        for name in margins.keys() & first.keys():
            apart = [margin - first[name][run] for run, margin in margins[name].items()]
            summary.put_margin(self.figures, f"growth_{times}_{name}", apart)


def table(figures: Mapping[str, Any]) -> str:
    """The margins by length, and how much they grew, as Markdown."""
    named = [(summary.margin_name(name, metric), f"{title}, {summary.METRICS[metric]}")
             for name, title in SHOWN.items() for metric in summary.PAIRED]  # fmt: skip
    rows = [
        [f"{times} x the crops", *(summary.cell(results, name, signed=True) for name, _ in named)]
        for times, results in figures["lengths"].items()
    ]
    rows += [
        [f"{times} x less 1 x", *(summary.cell(figures, f"growth_{times}_{name}", signed=True) for name, _ in named)]
        for times in list(figures["lengths"])[1:]
    ]
    return markdown(["points", *(title for _, title in named)], rows)


def main() -> None:
    parser = script.parser("Whether the margins grow with training.", data="folder with the five tars")
    parser.add_argument("--work", default="bench-run/growth", help="folder for packs, labels, models; resumed")
    parser.add_argument("--minutes", type=float, default=6.0, help="in which all is to end")
    parser.add_argument("--dry", action="store_true", help="a tiny form, to see that it runs")
    arguments = parser.parse_args()
    jobs = JOBS if torch.cuda.is_available() else 1
    protocol = DRY if arguments.dry else SIX_MINUTES
    growth = Growth(script.photographs(arguments), Path(arguments.work), protocol, jobs, 60 * arguments.minutes)
    *before, longest = LENGTHS
    for times in before:
        add(growth, times, arguments.json)
    if last := growth.last(longest):
        add(growth, last, arguments.json)
    script.keep("consolidation-growth", growth.figures, table(growth.figures), arguments)


def add(growth: Growth, times: int, file: str | None) -> None:
    """Run a length, print the table, and write what is known so far."""
    growth.run(times)
    console.print(table(growth.figures), markup=False, highlight=False, soft_wrap=True)
    console.print(f"{growth.figures['wall_seconds']} s so far", highlight=False)
    if file:
        write_json(Path(file), growth.figures)


if __name__ == "__main__":
    script.run(main)
