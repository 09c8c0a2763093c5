"""What kept labels allow beyond the paper, on a domain and seed that the benchmark does not report.

    python -m benchmarks.experiments.consolidation.beyond --data FOLDER            twenty minutes on two cores
    python -m benchmarks.experiments.consolidation.beyond --data FOLDER --short    two minutes: that it runs, no result

A teacher that comes later: a student of the generalist's labels alone, and one more after the task teacher was
appended to the same store. Online distillation at equal cost: the student that two teachers in every step give in the
time that labelling and training took, or, as for every further student of the same labels, training alone. FOLDER is
as for the benchmark.

<row>_probe, _shot_5         accuracy in % on the downstream half, with the 95 % interval over images
<row>_probe_gain             points over the generalist, paired by test image; <row>_shot_5_gain likewise
label_, append_, both_seconds   labelling by the generalist, by the task teacher appended to it, by both at once
append_left_bytes            1 where every file of the generalist's labels and of the crops stayed as it was
<row>_seconds, _epochs       training of a student, without labelling
"""

import hashlib
import json
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks.experiments.consolidation import summary
from benchmarks.experiments.consolidation.protocol import GENERALIST, SHORT, TEACHER_HALF, USUAL, recipe
from benchmarks.experiments.consolidation.study import Study
from benchmarks.harness import script
from benchmarks.harness.tables import Grid
from benchmarks.topk_quality import online_student
from repcon.config import TrainConfig
from repcon.runtime.memory import keep_freed_memory
from repcon.runtime.run_dir import write_json
from repcon.runtime.system import environment

ROWS = {
    "generalist": "generalist",
    "teacher": "task teacher",
    "before": "student of the generalist's labels",
    "appended": "student after the task teacher was appended",
    "online_first": "online, the time of labelling and training",
    "online_next": "online, the time of training",
}
"""Every row of the table and what it is called."""


class Beyond(Study):
    """One command at a time, so that seconds can be compared."""

    @property
    def seed(self) -> int:
        return self.protocol.seeds[0]

    def figures(self) -> dict[str, Any]:
        """Everything that the head of this file names."""
        self.prepare()
        (domain,) = self.protocol.domains
        task = self.teacher(domain, self.seed, "", TEACHER_HALF)
        self.do([task])
        store, costs = self._label_twice(task.out)
        appended, appended_seconds = self._student("appended", store)
        before, before_seconds = self._student("before", store, names=(GENERALIST,))
        trial_seconds = self._student("online", store, online=True, epochs=1)[1]
        backbones = {"generalist": self.generalist, "teacher": str(task.out)}
        backbones |= {"before": str(before), "appended": str(appended)}
        costs |= {"before_seconds": before_seconds, "appended_seconds": appended_seconds}
        costs |= {"appended_epochs": self.protocol.epochs, "before_epochs": self.protocol.epochs}
        equal = {"online_first": costs["both_seconds"] + appended_seconds, "online_next": appended_seconds}
        for name, seconds in equal.items():
            epochs = max(1, round(seconds / trial_seconds))
            out, costs[f"{name}_seconds"] = self._student(name, store, online=True, epochs=epochs)
            costs[f"{name}_epochs"] = epochs
            backbones[name] = str(out)
        (results,) = self.do([self.measure(self.seed, domain, backbones, baseline="generalist")])
        return summary.paired([results], ROWS, baseline="generalist") | costs

    def _label_twice(self, task: Path) -> tuple[Path, dict[str, float]]:
        """The store to which the task teacher was appended, and what that cost and left alone."""
        alone, both = self.labels({}, "appended"), self.labels({"task": task}, "appended")
        appended = replace(both, out=both.out.with_name(f"{both.out.name}-after"))
        store, at_once = Path(alone.settings.out), self.labels({"task": task}, "at-once")
        self.do([alone])
        marker = self.work / "before-append.json"
        if not marker.is_file():
            write_json(marker, _contents(store))
        self.do([appended])
        self.do([at_once])
        held, now = json.loads(marker.read_text()), _contents(store)
        seconds = {"label": alone, "append": appended, "both": at_once}
        costs = {f"{name}_seconds": (step.held() or {})["seconds"] for name, step in seconds.items()}
        return store, costs | {"append_left_bytes": float(all(now.get(name) == held[name] for name in held))}

    def _student(
        self, name: str, store: Path, *, names: tuple[str, ...] = (GENERALIST, "task"), online: bool = False,
        epochs: int = 0,
    ) -> tuple[Path, float]:  # fmt: skip
        """A student of those heads and the seconds of its training."""
        out = self.work / "students" / f"{self.seed}-{name}"
        settings = recipe(
            TrainConfig, "consolidate", pack=str(self.work / "packs" / "proxy"), store=str(store), out=str(out)
        )
        heads = tuple(head for head in settings.heads if head.name in names)
        settings = replace(
            settings, backbone=self.generalist, heads=heads, epochs=epochs or self.protocol.epochs, seed=self.seed,
            **self.shared(),
        )  # fmt: skip
        marker = out.with_name(f"{out.name}.seconds.json")
        if not marker.is_file():
            started = time.perf_counter()
            online_student.train(settings, out, online=online)
            write_json(marker, {"seconds": time.perf_counter() - started})
        return out, json.loads(marker.read_text())["seconds"]


def _contents(store: Path) -> dict[str, str]:
    """{file: digest} of the crops' and the generalist's arrays."""
    folders = (store / "crops", store / "heads" / GENERALIST)
    files = [path for folder in folders for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(store)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def grid(figures: dict[str, Any]) -> Grid:
    """The table."""
    rows = []
    for name, title in ROWS.items():
        epochs, seconds = figures.get(f"{name}_epochs"), figures.get(f"{name}_seconds")
        training = f"{epochs} epochs, {seconds:.0f} s" if epochs else ""
        rows.append((title, *summary.paired_cells(figures, name), training))
    return Grid(
        title="Beyond the paper: % and points over the generalist",
        titles=("", "linear probe", "gain", "5-shot", "gain", "training"),
        rows=rows,
    )


def costs(figures: dict[str, Any]) -> Grid:
    """What labelling cost."""
    rows = [
        ("the generalist", f"{figures['label_seconds']:.0f} s"),
        ("the task teacher, appended", f"{figures['append_seconds']:.0f} s"),
        ("both at once", f"{figures['both_seconds']:.0f} s"),
    ]
    return Grid(title="Labelling", titles=("teachers", "time"), rows=rows)


def main() -> None:
    parser = script.parser("What kept labels allow beyond the paper.", data="folder with the five tars")
    parser.add_argument("--work", default="bench-run/beyond", help="folder for packs, labels, models; resumed")
    parser.add_argument("--domain", default="birds", help="instead of birds")
    parser.add_argument("--short", action="store_true", help="two minutes, to see that it runs")
    arguments = parser.parse_args()
    photographs = script.photographs(arguments)
    keep_freed_memory()
    protocol = (SHORT if arguments.short else USUAL).changed(domains=(arguments.domain,), seeds=(9,))
    figures = Beyond(photographs, Path(arguments.work) / protocol.name, protocol).figures()
    figures |= {"protocol": asdict(protocol), "environment": environment() | {"device": "cpu"}}
    script.finish("consolidation-beyond", figures, [grid(figures), costs(figures)], arguments)


if __name__ == "__main__":
    script.run(main)
