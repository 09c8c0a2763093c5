"""What a training run prints."""

from repcon.record import console
from repcon.training.log import Totals, TrainingLog
from repcon.training.processes import join


def test_validation_is_told_in_per_cent_and_nat() -> None:
    with join("cpu") as team, console.capture() as capture:
        log = TrainingLog(None, Totals(steps=1, images=8, heads=("birds",)), team, tensorboard=False)
        log.validated(1, 1, {"images": 8, "heads": {"birds": {"agreement": 0.125, "kl": 2.5694}}, "knn": 0.58})
    assert capture.get().splitlines() == [
        "epoch 1, birds: agrees with its teacher on 12.5 % of 8 images, KL 2.569 nat",
        "epoch 1, kNN: 58.0 %",
    ]
