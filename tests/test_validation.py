"""validation.py: agreement and KL as a dense computation gives them, and kNN."""

from pathlib import Path

import pytest
import torch
from training_case import SIZE, colour_logits, lines, settings

from repcon import backbones, student, train
from repcon.config import OptimConfig
from repcon.images import Pack
from repcon.store import LabelStore
from repcon.training.feed import Feed

pytest_plugins = ("training_fixtures",)
pytestmark = pytest.mark.usefixtures("one_thread")


def test_validation_agrees_with_a_dense_computation(case: Path, tmp_path: Path) -> None:
    """KL and agreement of an untrained student, from scratch in plain torch."""
    config = settings(case, tmp_path / "run", epochs=1, optim=OptimConfig(lr=0.0, weight_decay=0.0), freeze_norm=True)
    train.run(config)
    told = lines(tmp_path / "run", "validation")[0]["heads"]
    pack, store = Pack.open(config.pack), LabelStore.open(config.store)
    feed = Feed(pack, store, size=SIZE, batch_size=8, epochs=1, holdout=config.holdout, loader="torch", workers=1)
    model = student.load(tmp_path / "run" / "student").eval()
    preprocessing = backbones.preprocessing(model.trunk, SIZE)
    pixels = torch.cat([batch.pixels for batch in feed.held_out()])
    feed.close()
    with torch.no_grad():
        logits = model(backbones.normalise(pixels, preprocessing, torch.float32))[:, model.head_slices["tones"]]
    teacher = colour_logits(pixels, 3)
    kl = torch.nn.functional.kl_div(
        logits.log_softmax(1), teacher.log_softmax(1), reduction="batchmean", log_target=True
    )
    assert told["tones"]["kl"] == pytest.approx(float(kl), rel=2e-3)
    agreement = (logits.argmax(1) == teacher.argmax(1)).float().mean()
    assert told["tones"]["agreement"] == pytest.approx(float(agreement))


def test_knn_and_tensorboard(case: Path, tmp_path: Path, picture_folder: Path) -> None:
    out = tmp_path / "run"
    results = train.run(settings(case, out, epochs=1, knn=str(picture_folder), tensorboard=True))
    assert 0 <= results["validation"]["knn"] <= 1
    assert list((out / "tensorboard").glob("events*"))
