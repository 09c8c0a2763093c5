"""The tables of evaluate, inspect, the estimate and pack at 80 columns, with four teachers and long names."""

import re
from collections.abc import Iterator

import numpy as np
import pytest
from store_builder import spec

from repcon.commands import inspect
from repcon.config import PackConfig
from repcon.evaluation import tables
from repcon.evaluation.data_sets import Split
from repcon.evaluation.results import combine, summarise, verdict
from repcon.images import packing
from repcon.precompute import estimate
from repcon.runtime.console import console

NAMES = ["generalist", "student of all the domains' teachers", "fine-grained-birds-of-north-america teacher", "signs"]
METRICS = ("knn_1", "knn_5", "knn_20", "probe", "shot_1", "shot_5", "shot_10", "finetune")
SETS = ["birds", "food-101", "grocery-store", "art-cartoons", "signs", "textures"]


@pytest.fixture(autouse=True)
def eighty_columns(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(console, "_width", 80)
    yield


def shown(write, *arguments) -> str:
    with console.capture() as captured:
        result = write(*arguments)
        if result is not None:
            console.print(result)
    text = captured.get()
    assert max(len(line.rstrip("\n")) for line in text.splitlines()) <= 80
    assert "…" not in text
    return text


def total() -> dict:
    generator = np.random.default_rng(0)
    rows = np.arange(6)
    split = Split(rows=rows, labels=rows % 2, folds=((rows, rows),), classes=("a", "b"), left_out=())
    answers = {
        name: {
            backbone: {metric: generator.random(400) < 0.5 + 0.1 * i for metric in METRICS}
            for i, backbone in enumerate(NAMES)
        }
        for name in SETS
    }
    about = {backbone: {"model": backbone, "heads": [], "input_size": [96]} for backbone in NAMES}
    results = {name: summarise(one, about, split, NAMES[0]) for name, one in answers.items()}
    return combine(results, NAMES[0]) | {"verdict": verdict(answers, NAMES[1], [NAMES[0], *NAMES[2:]])}


def test_transfer_of_eight_metrics() -> None:
    results = total()["datasets"]["birds"]
    text = shown(tables.table, results, "birds")
    for name, backbone in results["backbones"].items():
        line = next(line for line in text.splitlines() if line.startswith(name[:14]))
        assert line.split()[-8:] == [f"{backbone['metrics'][metric]['mean']:.1f}" for metric in METRICS]
    assert "fine-tuned" in text and len(re.findall(r"± \d+\.\d(?!\d)", text)) == 8 * (2 * len(NAMES) - 1)


def test_the_summary_of_six_data_sets() -> None:
    results = total()
    text = shown(tables.summary, results)
    assert all(part in text for name in SETS for part in name.split("-"))
    assert len(re.findall(r"± \d+\.\d", text)) == 7 * len(NAMES)


def test_heads_beside_their_teachers() -> None:
    interval, difference = {"mean": 80.0, "low": 70.0, "high": 88.0}, {"mean": -4.0, "low": -6.0, "high": -1.0}
    row = {"head": NAMES[2], "dataset": "d", "images": 12345, "held_out": False, "difference": difference}
    row |= dict.fromkeys(("teacher_accuracy", "head_accuracy"), interval)
    text = shown(tables.heads, [row | {"student": name} for name in NAMES])
    assert text.count("80.0 ± 10.0") == 8 and text.count("-4.0* ± 3.0") == 4 and text.count("12,345 *") == 4


def test_what_a_store_holds() -> None:
    encoding = {"bytes_per_crop": 118.3, "kl": 1e-5, "kl_worst": 1.2e-4, "saturated": 0.001}
    head = {
        "classes": 21841, "k": 64, "crops_finished": 1, "bytes_per_crop": 118.3, "top1_probability": 0.512,
        "architecture": "tf_efficientnetv2_b3.in21k_ft_in1k", "mass": 0.9876, "entropy_nat": 2.34,
        "classes_on_top": 10450, "kl_by_k": [0.1234] * 64, "mass_by_k": [0.987] * 64,
        "encodings": {"float16": encoding, "other": encoding},
    }  # fmt: skip
    found = {"heads": dict.fromkeys(NAMES, head), "values": "float16"}
    text = shown(inspect._heads, found)
    assert re.search(r"generalist +21,841 +64 +118\.3 +0\.512 +0\.9876 +2\.34 nat +10,450", text)
    assert shown(inspect._losses, found).count("0.1234") == 7 * len(NAMES)
    assert shown(inspect._encodings, found).count("1.2e-04") == 2 * len(NAMES)


def test_what_k_costs() -> None:
    ks = (4, 8, 16, 32, 64)
    found = {
        "sampled_crops": 1000, "total_crops": 1_000_000, "bytes": {k: k * 10**8 for k in ks}, "encodings": {},
        "teachers": {name: {k: {"kl": 0.0123, "mass": 0.9876} for k in ks} for name in NAMES}, "uninformative": {},
        "unlabelled_crops": 1_000_000, "seconds": 12345.0, "crops_per_second": 321.0, "waited_share": 0.02,
    }  # fmt: skip
    text = shown(estimate._show, spec(), found)
    assert text.count("0.0123") == text.count("(0.9876)") == len(ks) * len(NAMES)


def test_what_became_of_a_source() -> None:
    reasons = {"no picture in a format that is read, or a file that ends before its picture does": 12345}
    figures = {
        "images": 10, "kept": 123456, "re_encoded": reasons, "left_out": reasons, "shards": 2, "classes": 0,
        "megabytes": 1.5, "fingerprint": "f" * 64,
    }  # fmt: skip
    assert shown(packing._print_summary, PackConfig(source="", out="packs/a"), figures, ()).count("12,345") == 2
