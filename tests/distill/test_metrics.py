"""What a training run prints."""

import torch

from repcon.distill import metrics as logs
from repcon.distill.distributed import join
from repcon.distill.loader import Clock
from repcon.distill.metrics import Totals, TrainingLog
from repcon.runtime.console import console


def test_validation_is_told_in_per_cent_and_nat() -> None:
    with join("cpu") as team, console.capture() as capture:
        log = TrainingLog(None, Totals(steps=1, images=8, heads=("birds",)), team, tensorboard=False)
        log.validated(1, 1, {"images": 8, "heads": {"birds": {"agreement": 0.125, "kl": 2.5694}}, "knn": 0.58})
    assert capture.get().splitlines() == [
        "epoch 1, birds: agrees with its teacher on 12.5 % of 8 images, KL 2.569 nat",
        "epoch 1, kNN: 58.0 %",
    ]


def test_a_line_of_several_steps_is_the_same_after_a_resume(monkeypatch) -> None:
    """A checkpoint between two lines holds what the next one is made of."""
    monkeypatch.setattr(logs, "MOST_LINES", 2)
    losses = torch.rand(9, 1)

    def feed(log: TrainingLog, steps: range) -> None:
        for step in steps:
            log.step(step, losses[step - 1], 4, 0.1, Clock())

    with join("cpu") as team:
        totals = Totals(steps=9, images=36, heads=("birds",))
        whole, first, second = (TrainingLog(None, totals, team, tensorboard=False) for _ in range(3))
        feed(whole, range(1, 10))
        feed(first, range(1, 9))
        second.resumed(8, 32, first.state())
        feed(second, range(9, 10))
    assert second.results()["loss"] == whole.results()["loss"]
    assert second._shown == whole._shown == 36
