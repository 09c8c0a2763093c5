"""What a training run prints."""

from pathlib import Path
from typing import Any

import pytest
import torch

from repcon.distill import metrics as logs
from repcon.distill.distributed import init_distributed
from repcon.distill.epoch_table import EpochTable, warn_about_worse_heads
from repcon.distill.metrics import StepTimer, TrainingLog
from repcon.runtime.console import console


def figures(birds: float, generalist: float) -> dict[str, Any]:
    heads = {"birds": {"agreement": 0.125, "kl": birds}, "generalist": {"agreement": 1.0, "kl": generalist}}
    return {"images": 8, "heads": heads, "knn": 0.58}


def test_epochs_are_rows_of_one_table_and_heads_its_columns() -> None:
    with init_distributed("cpu") as distributed, console.capture() as capture:
        log = TrainingLog(None, distributed, steps=1, images=8, heads=("birds",))
        log.log_validation(0, 0, figures(2.5694, 0.5))
        log.log_validation(1, 1, figures(1.2, 0.75))
        log.log_validation(2, 2, {"images": 0, "heads": {}})
    assert capture.get().splitlines() == [
        "epoch 0 is the start; KL in nat, same class as its teacher, on 8 held-out images",
        "epoch            birds       generalist              kNN",
        "    0    2.569  12.5 %    0.500 100.0 %           58.0 %",
        "    1    1.200  12.5 %    0.750 100.0 %           58.0 %",
    ]


def test_many_heads_are_total_images_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "width", 40)
    held = {f"head-of-many-letters-{number}": {"agreement": 0.5, "kl": 1.0} for number in range(5)}
    with console.capture() as capture:
        table = EpochTable()
        for epoch in range(2):
            table.add_row(epoch, {"images": 8, "heads": held})
    told = capture.get().splitlines()[1:]
    assert len(told) == 2 * 2 * 3 and all(len(line) <= 40 for line in told)
    assert sum(line.count("1.000") for line in told) == 10


def test_heads_that_end_worse_than_they_began_are_named(tmp_path: Path) -> None:
    """Also after a resume; those that moved by next to nothing are not."""
    with init_distributed("cpu") as distributed, console.capture() as capture:
        totals = {"steps": 1, "images": 8, "heads": ("birds",)}
        first, second = (TrainingLog(None, distributed, **totals) for _ in range(2))
        first.log_validation(0, 0, figures(0.3, 0.5))
        second.resume(1, 8, first.state_dict())
        second.log_validation(1, 1, figures(0.5, 0.505))
        start, end = second.results()["validation_start"], second.results()["validation"]
        assert warn_about_worse_heads(start, end) == ["birds"] and start["heads"]["birds"]["kl"] == 0.3
    assert "warning: head birds ends worse than it began: KL 0.500 nat, 0.300 at the start" in capture.get()


def test_a_line_of_several_steps_is_the_same_after_a_resume(monkeypatch) -> None:
    """A checkpoint between two lines holds what the next one is made of."""
    monkeypatch.setattr(logs, "MAX_STEP_LINES", 2)
    losses = torch.rand(9, 1)

    def loader(log: TrainingLog, steps: range) -> None:
        for step in steps:
            log.log_step(step, losses[step - 1], 4, 0.1, StepTimer())

    with init_distributed("cpu") as distributed:
        totals = {"steps": 9, "images": 36, "heads": ("birds",)}
        whole, first, second = (TrainingLog(None, distributed, **totals) for _ in range(3))
        loader(whole, range(1, 10))
        loader(first, range(1, 9))
        second.resume(8, 32, first.state_dict())
        loader(second, range(9, 10))
    assert second.results()["loss"] == whole.results()["loss"]
    assert second._total_images == whole._total_images == 36
