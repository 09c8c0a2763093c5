"""Students of another size than their teachers, by the defaults of `repcon train`.

    python -m benchmarks.experiments.consolidation.other_sizes --data FOLDER            half an hour on two cores
    python -m benchmarks.experiments.consolidation.other_sizes --data FOLDER --short    two minutes: that it runs

A small student of a large generalist and its task teacher, and a large student of the small ones. No weights can be
averaged: a student starts from its own generalist's, and its heads are learnt on frozen features first. On a domain and
seed that the benchmark does not report. FOLDER is as for the benchmark.

<row>_probe, _shot_5         accuracy in % on the downstream half, with the 95 % interval over images
<row>_probe_gain             points over the generalist of the row's own size, paired by test image; also _shot_5_gain
"""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks.experiments.consolidation import summary
from benchmarks.experiments.consolidation.protocol import SHORT, TEACHER_HALF, USUAL
from benchmarks.experiments.consolidation.steps import Step
from benchmarks.experiments.consolidation.study import Study
from benchmarks.harness import script
from benchmarks.harness.tables import Grid
from repcon.config import TrainConfig
from repcon.runtime.memory import keep_freed_memory
from repcon.runtime.system import environment

SIZES = {"small": "package:efficientnet_lite0", "large": "package:efficientnet_lite2"}
ROWS = {
    "small": "EfficientNet-Lite0, the generalist",
    "small_teacher": "its task teacher",
    "small_student": "Lite0 student of the Lite2 teachers",
    "large": "EfficientNet-Lite2, the generalist",
    "large_teacher": "its task teacher",
    "large_student": "Lite2 student of the Lite0 teachers",
}
"""Every row of the table and what it is called."""


class OtherSizes(Study):
    """Teachers of both sizes, and students of each size that learn from the other's."""

    def figures(self) -> dict[str, Any]:
        """Everything that the head of this file names."""
        self.prepare()
        (domain,), (seed,) = self.protocol.domains, self.protocol.seeds
        studies = {
            size: Study(self.source, self.work, replace(self.protocol, model=model), self.jobs)
            for size, model in SIZES.items()
        }
        teachers = {size: one.teacher(domain, seed, f"-{size}", TEACHER_HALF) for size, one in studies.items()}
        self.do(list(teachers.values()))
        stores = {size: one.labels({"task": teachers[size].out}, f"labels-{size}") for size, one in studies.items()}
        for step in stores.values():
            self.do([step])
        students = {
            size: self._student(size, Path(stores[other].settings.out))
            for size, other in zip(SIZES, reversed(SIZES), strict=True)
        }
        self.do(list(students.values()))
        backbones = SIZES | {f"{size}_teacher": str(step.out) for size, step in teachers.items()}
        backbones |= {f"{size}_student": str(step.out) for size, step in students.items()}
        figures: dict[str, Any] = {}
        for size in SIZES:
            rows = {name: model for name, model in backbones.items() if name.startswith(size)}
            step = self.measure(seed, domain, rows, baseline=size)
            out = step.out.with_name(f"{step.out.name}-{size}")
            (results,) = self.do([Step(settings=replace(step.settings, out=str(out)), out=out)])
            figures |= summary.paired([results], rows, baseline=size)
        return figures

    def _student(self, size: str, store: Path) -> Step:
        out = self.work / "students" / f"{self.protocol.seeds[0]}-{size}"
        settings = TrainConfig(
            pack=str(self.work / "packs" / "proxy"), store=str(store), out=str(out), backbone=SIZES[size],
            epochs=self.protocol.epochs, seed=self.protocol.seeds[0], **self.shared(),
        )  # fmt: skip
        return Step(settings=settings, out=out)


def grid(figures: dict[str, Any]) -> Grid:
    """The table."""
    return Grid(
        title="Students of another size: % and points over the generalist of their own size",
        titles=("", "linear probe", "gain", "5-shot", "gain"),
        rows=[(title, *summary.paired_cells(figures, name)) for name, title in ROWS.items()],
    )


def main() -> None:
    parser = script.parser("Students of another size than their teachers.", data="folder with the five tars")
    parser.add_argument("--work", default="bench-run/other-sizes", help="folder for packs, labels, models; resumed")
    parser.add_argument("--domain", default="birds", help="instead of birds")
    parser.add_argument("--jobs", type=int, default=1, help="commands side by side")
    parser.add_argument("--short", action="store_true", help="two minutes, to see that it runs")
    arguments = parser.parse_args()
    photographs = script.photographs(arguments)
    keep_freed_memory()
    protocol = (SHORT if arguments.short else USUAL).changed(domains=(arguments.domain,), seeds=(9,))
    figures = OtherSizes(photographs, Path(arguments.work) / protocol.name, protocol, arguments.jobs).figures()
    figures |= {"protocol": asdict(protocol), "environment": environment() | {"device": "cpu"}}
    script.finish("consolidation-other-sizes", figures, [grid(figures)], arguments)


if __name__ == "__main__":
    script.run(main)
