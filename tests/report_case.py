"""Run folders, records, stores and pages for the tests of reports."""

import json
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import torch

from repcon import report, topk
from repcon.config import CropConfig, EvaluateConfig, ReportConfig, TeachConfig, TrainConfig, dump
from repcon.crops import plan
from repcon.environment import environment
from repcon.images import Pack
from repcon.probing.data_sets import Split
from repcon.probing.summary import combine, summarise
from repcon.probing.verdict import verdict
from repcon.record import Run
from repcon.store import LabelStore, StoreSpec, TeacherSection

EVIL = "<script>alert(1)</script>\"'&amp;$x_1^2$|*b*`c`"
"""What a class, a teacher or a file might be called by someone who means no good (or loves TeX)."""
CLASSES = (f"tench {EVIL}", "goldfish", "great white shark, man-eater", "hammerhead", "ray")


def spelled(place: str) -> str:
    """What a place calls its name."""
    return {"class": CLASSES[0], "architecture": f"net {EVIL}"}.get(place, EVIL)


def write_store(folder: Path, pack: Pack, name: str = "teacher", text: Callable[[str], str] = spelled) -> LabelStore:
    """A store of labels that fix which crop they are about: teacher's first id is (row + crop) % 5."""
    recipe, crops = CropConfig(), 8
    classes = (text("class"), *CLASSES[1:])
    section = TeacherSection(
        name=name,
        model=text("model"),
        architecture=text("architecture"),
        weight_hash="ab" * 32,
        preprocessing={},
        num_classes=len(classes),
        classes=classes,
        licence=text("terms"),
    )
    spec = StoreSpec(
        pack_fingerprint=pack.fingerprint,
        images=len(pack),
        crops=crops,
        crop_recipe={"seed": recipe.seed},
        k=3,
        temperatures=(1.0,),
        teachers=(section,),
    )
    store = LabelStore.create(str(folder), spec)
    for unit in store.unfinished():
        rows = np.arange(unit.rows.start, unit.rows.stop)
        drawn = plan(recipe, pack.hashes[rows], pack.sizes[rows], list(unit.crops))
        labels = [top_three(rows, crop) for crop in unit.crops]
        ids, logp = (np.stack(part) for part in zip(*labels, strict=True))
        store.write(unit, drawn.boxes, drawn.flips, {name: (ids, logp)})
    return store


def top_three(rows: np.ndarray, crop: int) -> tuple[np.ndarray, np.ndarray]:
    logits = torch.zeros(len(rows), len(CLASSES))
    logits[torch.arange(len(rows)), torch.as_tensor((rows + crop) % len(CLASSES))] = 3.0
    ids, logp = topk.encode(logits, 3, (1.0,))
    return ids.numpy(), logp.numpy().astype(np.float16)


def write_train(out: Path, pack: str, store: str, heads: list[str], *, seed: int = 0, steps: int = 60) -> Path:
    run = Run(out, "train", dump(TrainConfig(pack=pack, store=store, out=str(out), seed=seed)))
    generator = np.random.default_rng(seed)
    for step in range(1, steps + 1):
        loss = {head: 3 * np.exp(-step / (20 + 9 * i)) + generator.random() / 9 for i, head in enumerate(heads)}
        timing = {"data_seconds": 0.02 + generator.random() / 90, "step_seconds": 0.2, "images_per_second": 290 + step}
        run.log("step", seconds=step * 0.23, step=step, loss=loss, lr=1e-3, **timing)
        if step % 20 == 0:
            figures = {head: {"agreement": 0.4 + step / 200, "kl": 0.4} for head in heads}
            run.log("validation", step=step, epoch=step // 20, heads=figures, knn=0.5 + step / 900)
    run.finish({"loss": dict.fromkeys(heads, 0.3), "images_per_second": 300.0, "seconds": 81.5, "memory_bytes": 9e8})
    return out


def write_evaluate(out: Path, trunks: list[str]) -> Path:
    run = Run(out, "evaluate", dump(EvaluateConfig(data="pack", out=str(out))))
    metrics = ("knn_5", "probe", "shot_1", "shot_5")

    def around(middle: float) -> dict[str, dict[str, float]]:
        return {m: {"mean": middle + i, "low": middle + i - 2, "high": middle + i + 2} for i, m in enumerate(metrics)}

    run.finish(
        {
            "trunks": {name: {"metrics": around(50 + 5 * i), "model": name} for i, name in enumerate(trunks)},
            "baseline": trunks[0],
            "differences": {name: around(-3.5 + 4 * i) for i, name in enumerate(trunks[1:])},
            "classes": 78,
            "class_names": list(CLASSES),
            "test_images": 588,
            "train_images": 567,
            "chance": 1.28,
        }
    )
    return out


def write_evaluate_sets(out: Path, trunks: list[str], sets: list[str]) -> Path:
    """An evaluation over several data sets with heads and a verdict, by `repcon evaluate`'s own summary."""
    generator = np.random.default_rng(0)
    answers = {
        name: {trunk: {"probe": generator.random(90) < 0.5 + 0.2 * i} for i, trunk in enumerate(trunks)}
        for name in sets
    }
    rows = np.arange(6)
    split = Split(train=rows, train_labels=rows % 2, test=rows, test_labels=rows % 2, classes=("a", "b"), left_out=())
    about = {trunk: {"model": trunk, "heads": []} for trunk in trunks}
    results = {name: summarise(one, about, split, trunks[0]) for name, one in answers.items()}
    found = verdict(answers, trunks[-1], trunks[:-1])
    interval = {"mean": 80.0, "low": 70.0, "high": 88.0}
    row = {"student": trunks[-1], "head": trunks[1], "dataset": sets[0], "images": 40, "held_out": True}
    heads = [row | dict.fromkeys(("teacher_accuracy", "head_accuracy"), interval)
             | {"difference": {"mean": -4.0, "low": -6.0, "high": -1.0}}]  # fmt: skip
    run = Run(out, "evaluate", dump(EvaluateConfig(data=tuple(sets), out=str(out))))
    run.finish(combine(results, trunks[0]) | {"heads": heads, "verdict": found})
    return out


def write_teach(out: Path, text: Callable[[str], str] = spelled) -> Path:
    run = Run(out, "teach", dump(TeachConfig(data="pack", out=str(out))))
    for epoch in range(1, 9):
        run.log(
            "epoch", epoch=epoch, loss=2 / epoch, accuracy=99 - 50 / epoch, held_accuracy=90 - 50 / epoch, best=True
        )
    names = [text("class"), *CLASSES[1:]]
    run.finish({"classes": 79, "class_names": names, "best_epoch": 8, "validation_accuracy": 83.7})
    return out


def write_record(folder: Path, **figures: Any) -> Path:
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(figures | {"environment": environment()}, default=list))
    return folder


class Page(HTMLParser):
    """Collects what a browser would act on, and the text that it would show."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str | None]] = []
        self.ids: list[str] = []
        self.text = ""
        self.open: list[str] = []
        self.unbalanced: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs
        self.ids += [value or "" for name, value in attrs if name == "id"]
        if tag not in ("meta", "img", "path", "use", "rect", "wbr"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs
        self.ids += [value or "" for name, value in attrs if name == "id"]

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.unbalanced.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


def make(out: Path, *paths: Path) -> tuple[str, str]:
    report.run(ReportConfig(paths=tuple(str(path) for path in paths), out=str(out), title=f"Report {EVIL}"))
    return (out / "report.html").read_text(), (out / "report.md").read_text()
