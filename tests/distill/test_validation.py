"""Validation: agreement and KL as a dense computation gives them, and kNN."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from training_case import SIZE, colour_logits, lines, settings

from repcon.commands import train
from repcon.config import OptimConfig
from repcon.decode.factory import open_loader
from repcon.distill.loader import DistillLoader
from repcon.evaluation.features import centred_squares
from repcon.evaluation.probes import split_classes
from repcon.images.pack import ImagePack
from repcon.labels.store import LabelStore
from repcon.models.preprocessing import normalise, preprocessing_of
from repcon.models.student import load_student
from repcon.runtime.errors import UserError

pytest_plugins = ("training_fixtures",)


def test_validation_agrees_with_a_dense_computation(case: Path, tmp_path: Path) -> None:
    """KL and agreement of an untrained student, from scratch in plain torch."""
    config = settings(case, tmp_path / "run", epochs=1, optim=OptimConfig(lr=1e-60, weight_decay=0.0), freeze_norm=True)
    train.run(config)
    told = lines(tmp_path / "run", "validation")[0]["heads"]
    pack, store = ImagePack.open(config.pack), LabelStore.open(config.store)
    loader = DistillLoader(
        pack, store, size=SIZE, batch_size=8, epochs=1, val_fraction=config.val_fraction, loader="torch", num_workers=1
    )
    model = load_student(tmp_path / "run" / "student").eval()
    preprocessing = preprocessing_of(model.backbone, SIZE)
    pixels = torch.cat([batch.pixels for batch in loader.validation_batches()])
    loader.close()
    with torch.no_grad():
        logits = model(normalise(pixels, preprocessing, torch.float32))[:, model.head_slices["tones"]]
    teacher = colour_logits(pixels, 3)
    kl = torch.nn.functional.kl_div(
        logits.log_softmax(1), teacher.log_softmax(1), reduction="batchmean", log_target=True
    )
    assert told["tones"]["kl"] == pytest.approx(float(kl), rel=2e-3)
    agreement = (logits.argmax(1) == teacher.argmax(1)).float().mean()
    assert told["tones"]["agreement"] == pytest.approx(float(agreement))


def test_knn_is_that_of_the_students_features(case: Path, tmp_path: Path, picture_folder: Path) -> None:
    """Computed otherwise, on the features that the saved student gives."""
    out = tmp_path / "run"
    config = settings(case, out, epochs=1, knn=str(picture_folder))
    told = train.run(config)["validation"]["knn"]
    model = load_student(out / "student").eval()
    pack = ImagePack.open(str(next(path.parent for path in (out / "knn-pack").rglob("*.npz"))))
    inputs = preprocessing_of(model.backbone, SIZE)
    loader = open_loader("torch", pack, (SIZE,), num_workers=1)
    with torch.no_grad():
        batches = loader.batches(centred_squares(pack, np.arange(len(pack)), 8))
        pixels = torch.cat([batch.pixels[SIZE] for batch in batches])
        features = model.features(normalise(pixels, inputs, torch.float32))
    loader.close()
    near, far = split_classes(pack.labels, 0.5, config.seed)
    assert len(near) == 16  # Fewer than 20, 4 of each class: all vote, and the nearest class by summed cosine wins.
    cosine = torch.nn.functional.cosine_similarity(features[far, None], features[None, near], dim=2)
    sums = torch.stack([cosine[:, pack.labels[near] == label].sum(1) for label in range(4)], dim=1)
    assert told == pytest.approx(float((sums.argmax(1).numpy() == pack.labels[far]).mean()))


def test_knn_needs_a_class_of_two_images(case: Path, tmp_path: Path, picture_folder: Path) -> None:
    source, target = picture_folder, tmp_path / "single"
    for folder in [path for path in sorted(source.iterdir()) if path.is_dir()][:2]:
        (target / folder.name).mkdir(parents=True)
        shutil.copy(sorted(folder.iterdir())[0], target / folder.name)
    with pytest.raises(UserError, match=r"knn: .*single: no class has two images"):
        train.run(settings(case, tmp_path / "run", epochs=1, knn=str(target)))


def test_tensorboard_shows_losses_rates_and_validation(case: Path, tmp_path: Path, picture_folder: Path) -> None:
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    out = tmp_path / "run"
    train.run(settings(case, out, epochs=2, knn=str(picture_folder), trackers=("tensorboard",)))
    shown = accumulators.EventAccumulator(str(out / "tensorboard")).Reload()
    wanted = {"loss/colours", "loss/tones", "lr", "images_per_second", "data_share", "knn"}
    assert wanted | {"agreement/colours", "kl/tones"} <= set(shown.Tags()["scalars"])
    steps = [line["loss"]["tones"] for line in lines(out, "step")]
    assert [event.value for event in shown.Scalars("loss/tones")] == pytest.approx(steps)
