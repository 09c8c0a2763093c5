"""Starts and training settings of the consolidation student, some sixty of them, tried in memory.

    python -m benchmarks.experiments.consolidation.candidates --data FOLDER            minutes, on a GPU with 16 cores
    python -m benchmarks.experiments.consolidation.candidates --data FOLDER --short    that it runs, no result

Blocks 0 to 10 of the network are frozen and the same in generalist, teachers and students, so what they give for every
crop is computed once; a training then takes a second. Measured where nothing is reported: the halves of birds and
groceries under seed 9, of aerial images under seeds 9 and 10. One row per candidate: margins over the better of teacher
and generalist in points, per student of one task and of two.
"""

import json
import multiprocessing
import queue
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.experiments.consolidation import in_memory as memory
from benchmarks.experiments.consolidation.in_memory import Recipe, Setup
from benchmarks.experiments.consolidation.protocol import USUAL
from benchmarks.experiments.consolidation.study import Study
from benchmarks.harness import script
from benchmarks.harness.records import markdown
from repcon.runtime.console import console
from repcon.runtime.system import cores, environment

CELLS = (("birds", 9), ("grocery", 9), ("aerial", 9), ("aerial", 10))
PAIRS = (("birds-9", "grocery-9"), ("birds-9", "aerial-9"), ("grocery-9", "aerial-10"))
"""Tasks of the students of two."""
METRICS = ("probe", "shot_1", "shot_5", "shot_10", "knn_1", "knn_5")

BASE = Recipe(lr=3e-4, generalist_weight=0.3)
FAST = Recipe(lr=6e-4, generalist_weight=0.1)
CANDIDATES: dict[str, Recipe] = {
    "generalist's weights, task head random": replace(FAST, start="generalist", warm_heads=False),
    "generalist's weights, head learnt first": replace(FAST, start="generalist", warm_heads=False, head_steps=400),
    "mean, no training": replace(BASE, epochs=0),
    "mean with norms repaired, no training": replace(BASE, norms="repaired", epochs=0),
    "mean with norms from the proxy, no training": replace(BASE, norms="proxy", epochs=0),
    "mean": BASE,
    "mean, lr 6e-4, generalist 0.1": FAST,
    "mean, lr 6e-4, generalist 0.3": replace(FAST, generalist_weight=0.3),
    "mean, lr 2e-4, generalist 0.5": replace(BASE, lr=2e-4, generalist_weight=0.5),
    "mean, lr 1e-4": replace(BASE, lr=1e-4),
    "mean, lr 1e-3": replace(BASE, lr=1e-3),
    "mean, generalist 1": replace(BASE, generalist_weight=1.0),
    "mean, generalist 0.05": replace(BASE, generalist_weight=0.05),
    "heads balanced by the single models' KL": replace(BASE, balanced=True),
    "a third of the teacher": replace(BASE, teacher_share=0.35),
    "two thirds of the teacher": replace(BASE, teacher_share=0.65),
    "temperature 1": replace(BASE, temperatures=(1.0, 1.0)),
    "temperature 4": replace(BASE, temperatures=(4.0, 4.0)),
    "temperature 2, tasks 1": replace(BASE, temperatures=(2.0, 1.0)),
    "chosen: temperature 2, tasks 1; lr 6e-4, generalist 0.1": replace(FAST, temperatures=(2.0, 1.0)),
    "temperature 1, tasks 2": replace(BASE, temperatures=(1.0, 2.0)),
    "crops weighted by the teacher's confidence": replace(BASE, confidence="each"),
    "crops shared out by confidence": replace(BASE, confidence="shared"),
    "mixup of stored crops": replace(BASE, mixup=0.3),
    "moving average of weights": replace(BASE, ema=0.99),
    "mean of student and start": replace(FAST, back_to_start=0.5),
    "mean of four students": replace(FAST, students=4),
    "backbone waits an epoch for the heads": replace(BASE, heads_first=1),
    "heads at three times the rate": replace(BASE, head_rate=3.0),
    "weight decay 0.1": replace(BASE, weight_decay=0.1),
    "batches of 32": replace(BASE, batch_size=32),
    "norms repaired": replace(FAST, norms="repaired"),
    "10 epochs of 10 crops": replace(BASE, epochs=10, crops=10),
    "20 epochs of 20 crops": replace(BASE, epochs=20, crops=20),
    "100 epochs of 20 crops": replace(BASE, epochs=100, crops=20),
    "two tasks: mean of their own consolidated students": replace(BASE, start="students", generalist_weight=0.1),
}
"""Most change one thing of the candidate `mean`."""


@dataclass(frozen=True, slots=True)
class Job:
    """One training: a candidate for some tasks."""

    name: str
    recipe: Recipe
    tasks: tuple[str, ...]


@dataclass(slots=True)
class Runner:
    """What every process needs to know."""

    setup: Path
    out: Path
    ends: float
    lock: Any = field(default_factory=lambda: multiprocessing.get_context("spawn").Lock())

    def work(self, jobs: Any) -> None:
        """Takes jobs until none are left or the time is up; appends a line per student and domain."""
        torch.set_num_threads(1)
        setup: Setup = torch.load(self.setup, map_location=memory.device(), weights_only=False)
        while time.time() < self.ends:
            try:
                job = jobs.get(timeout=1)
            except queue.Empty:
                return
            rows = [row | {"candidate": job.name} for row in memory.student(setup, job.recipe, job.tasks)]
            with self.lock, self.out.open("a") as lines:
                lines.writelines(json.dumps(row) + "\n" for row in rows)


def jobs(candidates: Mapping[str, Recipe]) -> list[Job]:
    """Each candidate for every single task, and for every pair of tasks."""
    tasks = [*((f"{domain}-{seed}",) for domain, seed in CELLS), *PAIRS]
    return [
        Job(name, recipe, each)
        for name, recipe in candidates.items()
        for each in tasks
        if len(each) > 1 or recipe.start != "students"
    ]


def run(setup: Path, out: Path, todo: list[Job], processes: int, seconds: float) -> None:
    """Does the jobs side by side."""
    context = multiprocessing.get_context("spawn")
    waiting = context.Queue()
    for job in todo:
        waiting.put(job)
    runner = Runner(setup, out, time.time() + seconds)
    workers = [context.Process(target=runner.work, args=(waiting,)) for _ in range(processes)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """{candidate: {"one_task" or "two_tasks": {metric: mean margin in points, "runs": how many}}}."""
    figures: dict[str, Any] = {}
    for row in rows:
        kind = "one_task" if len(row["tasks"]) == 1 else "two_tasks"
        figures.setdefault(row["candidate"], {}).setdefault(kind, []).append(row["margins"])
    return {name: {kind: _means(margins) for kind, margins in kinds.items()} for name, kinds in figures.items()}


def _means(margins: list[dict[str, float]]) -> dict[str, float]:
    named = {metric: [each[metric] for each in margins if metric in each] for metric in METRICS}
    return {metric: float(np.mean(values)) for metric, values in named.items() if values} | {"runs": len(margins)}


def table(figures: Mapping[str, Any]) -> str:
    """The margins as Markdown: probe, 5-shot and 10-shot of both kinds of students."""
    shown = [(kind, metric) for kind in ("one_task", "two_tasks") for metric in ("probe", "shot_5", "shot_10")]
    titles = [
        "",
        *(
            f"{kind.replace('_', ' ')}: {metric.replace('shot_5', '5-shot').replace('shot_10', '10-shot')}"
            for kind, metric in shown
        ),
    ]
    lines = [
        [name, *(f"{kinds[kind][metric]:+.1f}" if kind in kinds else "" for kind, metric in shown)]
        for name, kinds in figures.items()
    ]
    return markdown(titles, lines)


def main() -> None:
    parser = script.parser("Starts and settings of the consolidation student.", data="folder with the five tars")
    parser.add_argument(
        "--work", default="bench-run/candidates", help="folder for packs, teachers and results; resumed"
    )
    parser.add_argument("--jobs", type=int, default=cores(), help="trainings side by side")
    parser.add_argument("--seconds", type=float, default=3600, help="no training begins later")
    parser.add_argument("--short", action="store_true", help="few images, one epoch: that it runs")
    arguments = parser.parse_args()
    work = Path(arguments.work)
    study = Study(
        script.photographs(arguments), work, USUAL.changed(domains=("birds", "grocery", "aerial")), arguments.jobs
    )
    study.prepare()
    teachers = {f"{domain}-{seed}": study.teachers(seed)[f"{domain}-{seed}"] for domain, seed in CELLS}
    study.do(list(teachers.values()))
    setup = memory.prepare(
        study, {name: step.out for name, step in teachers.items()}, images=100 if arguments.short else 0
    )
    path, out = work / "setup.pt", work / "rows.jsonl"
    torch.save(setup, path)
    out.unlink(missing_ok=True)
    todo = jobs(CANDIDATES)
    if arguments.short:
        todo = [replace_epochs(job) for job in todo[:3]]
    run(path, out, todo, arguments.jobs, arguments.seconds)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    figures = {"candidates": summarise(rows), "environment": environment()}
    console.print(table(figures["candidates"]))
    script.keep("consolidation-candidates", figures, table(figures["candidates"]), arguments, files=[out])


def replace_epochs(job: Job) -> Job:
    """The same job in one epoch of one crop."""
    return Job(job.name, replace(job.recipe, epochs=min(1, job.recipe.epochs), crops=1), job.tasks)


if __name__ == "__main__":
    script.run(main)
