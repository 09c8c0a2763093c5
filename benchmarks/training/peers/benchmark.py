"""What others make of the same teachers, images and generalist, beside the minutes. Nine minutes on two cores.

    python -m benchmarks.training.peers --data FOLDER [--lightly-train PYTHON] [--short] [--json FILE] [--record]

FOLDER holds the tars of tools/photos.py. As in the consolidation study a task teacher learns one half of a domain's
classes, students learn from it and the generalist on unlabeled photographs of other things, and everything is measured
by `repcon evaluate` on the other half of the classes. One seed and few images: differences of a point mean nothing.

repcon        labels stored once, then a student by the recipe `consolidate`, from the mean of both models' weights
repcon_start  the same labels, from the generalist's own weights with a new head for the task, as the peers start
timm          timm.task's distillation, a task per teacher, both teachers in every step
torchdistill  torchdistill's, the same
lightly       lightly-train's distillation of the task teacher's features (it takes one teacher), from the generalist;
              --lightly-train names a Python that has lightly-train and timm
generalist, teacher   what the students are to beat

NAME_seconds         of labels and training; NAME_label_seconds: of the labels, which further students share
NAME_probe, _shot_5  accuracy in per cent by linear probe and 5 labels per class, _low and _high over the test images
"""

import argparse
import tarfile
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import nn

from benchmarks.experiments.consolidation.protocol import GENERALIST, Protocol
from benchmarks.experiments.consolidation.steps import Step
from benchmarks.experiments.consolidation.study import Study
from benchmarks.experiments.consolidation.summary import put
from benchmarks.harness import script
from benchmarks.harness.records import number
from benchmarks.harness.tables import Grid
from benchmarks.training.peers.lightly import train_lightly
from benchmarks.training.peers.online import LOSSES, train_online
from repcon.config import TrainConfig
from repcon.models.factory import create_model
from repcon.models.preprocessing import preprocessing_of
from repcon.models.saved_model import save_model
from repcon.runtime.console import console
from repcon.runtime.errors import first_line
from repcon.runtime.system import environment

FULL = Protocol(
    name="peers", domains=("birds",), seeds=(0,), proxy_images=1000, epochs=3, teacher_epochs=4, device="cpu",
    methods=("generalist", "teacher", "task_generalist"),
)  # fmt: skip
SHORT = replace(
    FULL, domains=("aerial",), proxy_images=64, size=64, epochs=1, teacher_epochs=1, crops=1, batch_size=16,
    fewshot_trials=3,
)  # fmt: skip
SHOWN = {"probe": "linear probe", "shot_5": "5-shot", "knn_5": "kNN 5"}


def main() -> None:
    parser = script.parser("What others make of the same teachers and images.", data="folder with the five tars")
    parser.add_argument(
        "--lightly-train", metavar="PYTHON", default="", help="a Python that has lightly-train and timm"
    )
    parser.add_argument("--short", action="store_true", help="a few images, to see that it runs: no result")
    arguments = parser.parse_args()
    data = script.photographs(arguments)
    with tempfile.TemporaryDirectory() as folder:
        run(data, Path(folder), SHORT if arguments.short else FULL, arguments.lightly_train, arguments)


def run(data: Path, work: Path, protocol: Protocol, lightly: str, arguments: argparse.Namespace) -> None:
    """Measure, show and keep."""
    figures = Race(Study(data, work, protocol), lightly).run()
    figures["environment"] = environment() | {"device": "cpu"}
    script.finish("training-peers", figures, grids(figures), arguments)


class Race:
    """One domain's students, one after the other, each in all cores."""

    def __init__(self, study: Study, lightly: str) -> None:
        self._study, self._lightly = study, lightly
        (self._domain,), (self._seed,) = study.protocol.domains, study.protocol.seeds
        self._figures: dict[str, Any] = {}

    def run(self) -> dict[str, Any]:
        """All figures."""
        study = self._study
        study.prepare()
        teachers = study.teachers(self._seed)
        study.do(list(teachers.values()))
        (teacher,) = teachers.values()
        models = {next(iter(teachers)): str(teacher.out), GENERALIST: study.generalist}
        self._labels(teacher.out, next(iter(teachers)))
        backbones = {"generalist": study.generalist, "teacher": str(teacher.out)} | self._ours()
        backbones |= self._peer("timm", lambda: self._online("timm", models))
        backbones |= self._peer("torchdistill", lambda: self._online("torchdistill", models))
        backbones |= self._peer("lightly", lambda: self._lightly_train(teacher.out))
        (results,) = study.do([study.measure(self._seed, self._domain, backbones)])
        for name in backbones:
            for metric in SHOWN:
                if held := results["backbones"][name]["metrics"].get(metric):
                    put(self._figures, f"{name}_{metric}", [held])
        return self._figures

    def _labels(self, teacher: Path, name: str) -> None:
        step = self._study.labels({name: teacher})
        self._study.do([step])
        self._figures["repcon_label_seconds"] = self._figures["repcon_start_label_seconds"] = _seconds(step)

    def _ours(self) -> dict[str, str]:
        own = self._study.student(self._seed, self._domain, "task_generalist")
        out = own.out.with_name(f"{own.out.name}-start")
        start = replace(self._settings(), out=str(out), init="backbone", head_warmup_steps=0)
        steps = {"repcon": own, "repcon_start": Step(settings=start, out=out)}
        self._study.do(list(steps.values()))
        for name, step in steps.items():
            self._figures[f"{name}_seconds"] = self._figures[f"{name}_label_seconds"] + _seconds(step)
            self._figures[f"{name}_version"] = "this checkout"
        return {name: str(step.out) for name, step in steps.items()}

    def _settings(self) -> TrainConfig:
        return self._study.student(self._seed, self._domain, "task_generalist").settings

    def _peer(self, name: str, train: Callable[[], nn.Module]) -> dict[str, str]:
        """{name: folder} of the trained backbone; none, and the error, where the peer cannot run."""
        console.rule(name)
        started = time.perf_counter()
        try:
            backbone = train()
        except ImportError as error:
            self._figures[f"{name}_error"] = first_line(error)
            return {}
        self._figures.setdefault(f"{name}_seconds", time.perf_counter() - started)
        out = self._study.work / "peers" / name
        size = self._study.protocol.size
        save_model(backbone, out, classes=(), preprocessing=preprocessing_of(backbone, size), extra={})
        return {name: str(out)}

    def _online(self, library: str, teachers: Mapping[str, str]) -> nn.Module:
        assert library in LOSSES
        self._figures[f"{library}_version"] = _version(library)
        data = preprocessing_of(create_model(self._study.generalist), self._study.protocol.size)
        return train_online(library, self._settings(), teachers, data)

    def _lightly_train(self, teacher: Path) -> nn.Module:
        if not self._lightly:
            raise ImportError("no Python was named that has it (--lightly-train)")
        study, work = self._study, self._study.work / "lightly"
        generalist = create_model(study.generalist)
        preprocessing = preprocessing_of(generalist, study.protocol.size)
        save_model(generalist, work / "generalist", classes=(), preprocessing=preprocessing, extra={})
        with tarfile.open(work.with_name("clean") / "proxy.tar") as tar:
            tar.extractall(work / "images", filter="data")
        backbone, said = train_lightly(
            self._lightly, student=work / "generalist", teacher=teacher, images=work / "images", out=work / "out",
            size=study.protocol.size, epochs=study.protocol.epochs, batch_size=study.protocol.batch_size,
        )  # fmt: skip
        self._figures |= {f"lightly_{fact}": said[fact] for fact in ("seconds", "version", "way")}
        self._figures["lightly_errors"] = "; ".join(said["errors"])
        return backbone


def grids(figures: Mapping[str, Any]) -> list[Grid]:
    """The table of those that ran, and that of those that could not."""
    names = [name.removesuffix("_probe") for name in figures if name.endswith("_probe")]
    rows = []
    for name in names:
        times = [figures.get(f"{name}_{part}seconds") for part in ("", "label_")]
        accuracies = [figures.get(f"{name}_{metric}") for metric in SHOWN]
        cells = [number(value) if value is not None else "" for value in (*times, *accuracies)]
        rows.append((name, *cells, figures.get(f"{name}_version", "")))
    titles = ("student", "seconds", "of these, labels", *SHOWN.values(), "version")
    absent = [(name.removesuffix("_error"), error) for name, error in figures.items() if name.endswith("_error")]
    if figures.get("lightly_errors"):
        absent.append(("lightly, timm models as they are", figures["lightly_errors"]))
    return [
        Grid(title="Transfer in per cent, beside the time", titles=titles, rows=rows),
        Grid(title="What could not run", titles=("peer", "error"), rows=absent or [("none", "")]),
    ]


def _version(library: str) -> str:
    try:
        return version(library)
    except ModuleNotFoundError as error:
        raise ImportError(f"{library} is not installed") from error


def _seconds(step: Step) -> float:
    held = step.held()
    assert held is not None
    return held["seconds"]
