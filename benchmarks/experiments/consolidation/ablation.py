"""What each setting of the consolidation benchmark does: one change at a time, on a domain and seeds that it does not
report.

    python -m benchmarks.experiments.consolidation.ablation --data FOLDER          half an hour on two cores
    python -m benchmarks.experiments.consolidation.ablation --data FOLDER --short  two minutes: that it runs, no result

The student of task teacher and generalist is trained again with each of `variants.VARIANTS`, and every
student is measured on the downstream half. FOLDER holds the five tars of tools/photos.py (or set REPCON_DATA).

<variant>_probe, _shot_5   accuracy in %, mean over seeds
<variant>_probe_gain       points over the usual settings, paired by test image; <variant>_shot_5_gain likewise
What another seed of the student's training would change is not in these intervals.
"""

import re
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.experiments.consolidation import data, summary
from benchmarks.experiments.consolidation.protocol import GENERALIST, SHORT, TEACHER_HALF, USUAL, Protocol, recipe
from benchmarks.experiments.consolidation.steps import Step
from benchmarks.experiments.consolidation.study import Study
from benchmarks.experiments.consolidation.variants import VARIANTS, Variant, changed
from benchmarks.harness import script
from repcon.config import PackConfig, TrainConfig
from repcon.runtime.console import console
from repcon.runtime.errors import UserError
from repcon.runtime.system import cores, environment

DOMAIN, SEEDS, EPOCHS = "aerial", (9,), 6
"""Neither domain nor seed is among what the consolidation benchmark reports by default; one epoch more than there. Of a
domain that it reports, other halves of the classes are seen under this seed."""


class Ablation(Study):
    """Students of one domain that differ from the usual one in one setting each."""

    def compare(self, variants: Mapping[str, Variant]) -> dict[int, dict[str, Any]]:
        """{seed: evaluate's results over generalist, teacher and every variant's student}."""
        self.prepare()
        seeds, plain = self.protocol.seeds, Variant()
        for seed in seeds:
            self.do([self._teacher(seed, variant) for variant in (plain, *variants.values())])
            for variant in variants.values():
                self.do([self._labels(seed, variant)])
        self.do([self._student(seed, name, variant) for seed in seeds for name, variant in variants.items()])
        steps = []
        for seed in seeds:
            backbones = {"generalist": self.generalist, "teacher": str(self._teacher(seed, plain).out)}
            backbones |= {name: str(self._student(seed, name, variant).out) for name, variant in variants.items()}
            steps.append(self.measure(seed, self.protocol.domains[0], backbones, baseline="usual"))
        return dict(zip(seeds, self.do(steps), strict=True))

    def _teacher(self, seed: int, variant: Variant) -> Step:
        step = self.teacher(self.protocol.domains[0], seed, _suffix(variant.teach), TEACHER_HALF)
        return replace(step, settings=changed(step.settings, variant.teach))

    def _labels(self, seed: int, variant: Variant) -> Step:
        pack = self._proxy(seed, variant)
        changes = f"{_suffix(variant.label)}{_suffix(variant.teach)}{'-larger' if variant.generalist else ''}"
        name = f"labels-{seed}{changes}{pack.removeprefix('proxy')}"
        step = self.labels({"task": self._teacher(seed, variant).out}, name, pack)
        teachers = tuple(
            replace(teacher, model=variant.generalist or teacher.model) if teacher.name == GENERALIST else teacher
            for teacher in step.settings.teachers
        )
        return replace(step, settings=changed(replace(step.settings, teachers=teachers), variant.label))

    def _proxy(self, seed: int, variant: Variant) -> str:
        """The name of the pack that the variant's student learns from."""
        if variant.domain_images:
            return self.with_domains(seed)
        return self._all_images() if variant.all_images else "proxy"

    def _all_images(self) -> str:
        """The proxy without the protocol's limit on its number of images, as a pack; its name."""
        out, folder = self.work / "packs" / "proxy-all", self.work / "clean-all"
        if not (folder / "proxy.tar").exists():
            data.clean(self.source, folder)
        self.do([Step(settings=PackConfig(source=str(folder / "proxy.tar"), out=str(out)), out=out)])
        return out.name

    def _student(self, seed: int, name: str, variant: Variant) -> Step:
        labels = self._labels(seed, variant).settings
        out = self.work / "students" / f"{seed}-{name}"
        settings = recipe(TrainConfig, "consolidate", pack=labels.pack, store=labels.out, out=str(out))
        settings = replace(settings, backbone=self.generalist, epochs=self.protocol.epochs, seed=seed, **self.shared())
        settings = changed(settings, variant.train)
        heads = tuple(replace(head, **variant.heads.get(head.name, {})) for head in settings.heads)
        return Step(settings=replace(settings, heads=tuple(head for head in heads if head.weight)), out=out)


def _suffix(changes: Mapping[str, Any]) -> str:
    """The changes as part of a file name."""
    return re.sub(r"[^\w.]+", "-", "".join(f"-{name}-{value}" for name, value in changes.items())).rstrip("-")


def summarise(cells: dict[int, dict[str, Any]], variants: dict[str, Variant], protocol: Protocol) -> dict[str, Any]:
    """One flat object: accuracies in per cent and paired gains over the usual settings in points, means over seeds."""
    figures = summary.paired(cells.values(), ("generalist", "teacher", *variants), baseline="usual")
    return figures | {"protocol": asdict(protocol)}


def markdown(figures: dict[str, Any], variants: dict[str, Variant]) -> str:
    """The table: accuracy and paired gain over the usual settings."""
    titles = "| | linear probe | gain | 5-shot | gain |\n|---|---|---|---|---|\n"
    return titles + "".join(f"| {' | '.join(row)} |\n" for row in _rows(figures, variants))


def show(figures: dict[str, Any], variants: dict[str, Variant]) -> None:
    """The table in the terminal."""
    protocol = figures["protocol"]
    table = Table(title=f"{protocol['domains'][0]}, seeds {protocol['seeds']}: one change at a time, % and points")
    for column in ("", "probe", "gain", "5-shot", "gain"):
        table.add_column(column, justify="right" if column else "left")
    for row in _rows(figures, variants):
        table.add_row(*row)
    console.print(table)


def _rows(figures: dict[str, Any], variants: dict[str, Variant]) -> list[list[str]]:
    names = ("generalist", "teacher", *variants)
    return [[name.replace("_", " "), *summary.paired_cells(figures, name)] for name in names]


def main() -> None:
    parser = script.parser("What each setting of the consolidation benchmark does.", data="folder with the five tars")
    parser.add_argument("--work", default="bench-run/ablation", help="folder for packs, labels, models; resumed")
    parser.add_argument("--domain", default=DOMAIN, help=f"instead of {DOMAIN}")
    parser.add_argument("--seeds", default=",".join(map(str, SEEDS)), help="for example 9,10")
    parser.add_argument("--variants", help=f"some of {', '.join(VARIANTS)}")
    parser.add_argument("--jobs", type=int, default=cores(), help="commands side by side")
    parser.add_argument("--short", action="store_true", help="two minutes, to see that it runs")
    arguments = parser.parse_args()
    photographs = script.photographs(arguments)
    names = arguments.variants.split(",") if arguments.variants else list(VARIANTS)
    names = names[:2] if arguments.short else names
    protocol = SHORT if arguments.short else USUAL.changed(epochs=EPOCHS)
    protocol = protocol.changed(
        domains=(arguments.domain,), seeds=tuple(int(seed) for seed in arguments.seeds.split(","))
    )
    started = time.time()
    study = Ablation(photographs, Path(arguments.work) / protocol.name, protocol, arguments.jobs)
    if unknown := set(names) - set(VARIANTS):
        raise UserError(f"variants: {', '.join(sorted(unknown))} unknown; there are {', '.join(VARIANTS)}")
    variants = {name: VARIANTS[name] for name in dict.fromkeys(["usual", *names])}
    figures = summarise(study.compare(variants), variants, protocol)
    figures |= study.facts() | {"wall_seconds": round(time.time() - started), "environment": environment()}
    show(figures, variants)
    script.keep("consolidation-ablation", figures, markdown(figures, variants), arguments)


if __name__ == "__main__":
    script.run(main)
