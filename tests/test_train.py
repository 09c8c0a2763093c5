"""train.py and its parts: losses fall, runs resume to the bit, refusals name the field, the output opens in timm."""

import json
import os
import re
import shutil
import signal
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from training_case import CLASSES, SIZE, colour_logits, make_case, make_store, one_thread, pack_path, settings  # noqa: F401

from repcon import backbones, student, train
from repcon.backbones import timm
from repcon.config import HeadConfig, OptimConfig
from repcon.errors import UserError
from repcon.feed import Feed
from repcon.images import Pack
from repcon.loss import HeadsLoss
from repcon.store import LabelStore
from repcon.trainer import Trainer


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory, picture_folder: Path) -> Path:
    return make_case(tmp_path_factory.mktemp("case"), picture_folder)


def lines(out: Path, event: str) -> list[dict[str, Any]]:
    events = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [line for line in events if line["event"] == event]


def losses(out: Path) -> list[tuple[int, dict[str, float]]]:
    return [(line["step"], line["loss"]) for line in lines(out, "step")]


def stop_after(steps: int, monkeypatch: pytest.MonkeyPatch, number: int = signal.SIGTERM) -> None:
    """Sends this process a real signal in the middle of the run."""
    plain = Trainer.train_batch
    taken = 0

    def stopping(self: Trainer, *arguments: Any) -> torch.Tensor:
        nonlocal taken
        taken += 1
        if taken == steps:
            os.kill(os.getpid(), number)
        return plain(self, *arguments)

    monkeypatch.setattr(Trainer, "train_batch", stopping)


def test_the_loss_falls_and_everything_is_written(case: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    results = train.run(settings(case, out, epochs=12))
    told = losses(out)
    assert told[-1][1]["colours"] < 0.5 * told[0][1]["colours"]
    assert [step for step, _ in told] == list(range(1, results["steps"] + 1))
    line = lines(out, "step")[0]
    assert {"images_per_second", "data_seconds", "step_seconds", "loss", "lr", "memory_bytes"} <= set(line)
    validation = lines(out, "validation")
    assert len(validation) == 12
    assert validation[-1]["heads"]["colours"]["kl"] < validation[0]["heads"]["colours"]["kl"]
    assert json.loads((out / "results.json").read_text())["steps"] == results["steps"]
    assert len(list((out / "checkpoints").glob("step-*.pt"))) == 2
    assert (out / "checkpoints" / "best.pt").is_file()


def test_the_student_opens_with_timm(case: Path, tmp_path: Path) -> None:
    train.run(settings(case, tmp_path / "run", epochs=1, heads=()))
    folder = tmp_path / "run" / "student"
    trunk = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0).eval()
    loaded = student.load(folder).eval()
    images = torch.randn(2, 3, SIZE, SIZE)
    with torch.no_grad():
        assert torch.equal(trunk(images), loaded.features(images))
        assert loaded(images).shape == (2, sum(CLASSES.values()))
    config = timm.data.resolve_model_data_config(trunk)
    assert config["input_size"] == (3, SIZE, SIZE)
    card = (folder / "README.md").read_text()
    store = LabelStore.open(str(case / "labels.zarr"))
    for word in ("colours", "tones", "CC0-1.0", store.fingerprint, "agreement", "[optim]"):
        assert word in card


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"crops_per_decode": 4, "mix_window": 4, "batch_size": 16, "optim": OptimConfig(lr=1e-3, ema=0.9)},
        {"accumulate": 3, "precision": "bf16", "projection": 8},
    ],
    ids=["plain", "mixed-ema", "accumulate-bf16"],
)
@pytest.mark.parametrize("steps", [5, 7])
def test_a_stopped_run_goes_on_to_the_last_bit(
    case: Path, tmp_path: Path, changes: dict[str, Any], steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train.run(settings(case, whole, **changes))
    with monkeypatch.context() as patch:
        stop_after(steps, patch)
        with pytest.raises(KeyboardInterrupt):
            train.run(settings(case, parts, **changes))
    assert not (parts / "results.json").exists()
    train.run(settings(case, parts, **changes, workers=2))
    assert losses(parts) == losses(whole)
    assert [line["heads"] for line in lines(parts, "validation")] == [
        line["heads"] for line in lines(whole, "validation")
    ]
    weights = [torch.load(newest(out), weights_only=True)["student"] for out in (whole, parts)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def newest(out: Path) -> Path:
    return max((out / "checkpoints").glob("step-*.pt"))


def test_a_run_killed_between_checkpoints_repeats_its_steps(
    case: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was logged after the last checkpoint is logged once, with the same figures."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train.run(settings(case, whole))
    plain = Trainer.train_batch

    def dies(self: Trainer, *arguments: Any) -> torch.Tensor:
        if self.step == 6:
            raise OSError("power cut")
        return plain(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_batch", dies)
        with pytest.raises(OSError, match="power cut"):
            train.run(settings(case, parts))
    assert losses(parts)[-1][0] == 6
    train.run(settings(case, parts))
    assert losses(parts) == losses(whole)


def test_a_finished_run_is_not_repeated(case: Path, tmp_path: Path) -> None:
    first = train.run(settings(case, tmp_path / "run", epochs=1))
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert train.run(settings(case, tmp_path / "run", epochs=1)) == json.loads(json.dumps(first))
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"optim": OptimConfig(lr=1e-4, warmup_epochs=0.5)}, "optim.lr"),
        ({"epochs": 9}, "epochs"),
        ({"heads": (HeadConfig(name="tones"),)}, "heads"),
        ({"batch_size": 4}, "batch_size"),
    ],
)
def test_another_recipe_is_refused_by_name(case: Path, tmp_path: Path, changes: dict[str, Any], field: str) -> None:
    out = tmp_path / "run"
    train.run(settings(case, out, epochs=1))
    recipe = (out / "config.toml").read_text()
    with pytest.raises(UserError, match=re.escape(field)):
        train.run(settings(case, out, **{"epochs": 1, **changes}))
    assert (out / "config.toml").read_text() == recipe


def test_another_store_is_refused(case: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train.run(settings(case, out, epochs=1))
    pack = Pack.open(str(pack_path(case)))
    make_store(tmp_path / "other.zarr", pack, crop_seed=1)
    with pytest.raises(UserError, match="store was"):
        train.run(settings(case, out, epochs=1, store=str(tmp_path / "other.zarr")))


def test_a_damaged_checkpoint_is_named(case: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train.run(settings(case, out, epochs=1))
    newest(out).write_bytes(b"half")
    with pytest.raises(UserError, match=r"step-0.*delete it"):
        train.run(settings(case, out, epochs=1))


def test_a_loss_that_is_no_number_stops_with_step_head_and_dump(case: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(UserError, match=r"step \d+: the loss of head 'colours'.*not-finite") as error:
        train.run(settings(case, out, optim=OptimConfig(lr=1e30, clip_norm=0.0, warmup_epochs=0.0)))
    (dump,) = out.glob("not-finite-step-*.pt")
    assert str(dump) in str(error.value)
    state = torch.load(dump, weights_only=True)
    assert len(state["pixels"]) == len(state["labels"]["tones"][0]) == len(state["logits"])


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"heads": (HeadConfig(name="cars"),)}, "cars"),
        ({"heads": (HeadConfig(name="tones"), HeadConfig(name="tones"))}, "twice"),
        ({"heads": (HeadConfig(name="tones", temperature=3.0),)}, "temperature"),
        ({"optim": OptimConfig(name="adamm")}, "optim.name"),
        ({"optim": OptimConfig(schedule="zigzag")}, "optim.schedule"),
        ({"optim": OptimConfig(schedule="plateau")}, "plateau"),
        ({"crops_per_decode": 5}, "crops_per_decode"),
        ({"trunk": "resnet5000"}, "resnet5000"),
    ],
)
def test_mistakes_are_named(case: Path, tmp_path: Path, changes: dict[str, Any], word: str) -> None:
    with pytest.raises(UserError, match=word):
        train.run(settings(case, tmp_path / "run", **changes))


def test_another_packs_labels_are_refused(case: Path, tmp_path: Path, picture_folder: Path) -> None:
    from repcon.images import open_or_pack

    open_or_pack(str(picture_folder / "apple"), tmp_path / "cache")
    with pytest.raises(UserError, match="another pack"):
        train.run(settings(case, tmp_path / "run", pack=str(pack_path(tmp_path))))


@pytest.mark.parametrize("window", [0, 4])
def test_labels_belong_to_the_pixels(case: Path, window: int) -> None:
    """The teacher, asked again about the very pixels that a batch holds, gives the stored label."""
    pack, store = Pack.open(str(pack_path(case))), LabelStore.open(str(case / "labels.zarr"))
    feed = Feed(
        pack, store, size=SIZE, batch_size=8, epochs=4, crops_per_decode=2, mix_window=window, loader="torch", workers=1
    )
    for part in range(len(feed.passes)):
        for batch in feed.batches(part):
            for name, classes in CLASSES.items():
                ids = batch.labels[name][0].to(torch.int64)[batch.rows, 0]
                assert torch.equal(ids, colour_logits(batch.pixels, classes).argmax(1))
    feed.close()


def test_leaving_an_epoch_early_leaves_no_thread(case: Path) -> None:
    pack, store = Pack.open(str(pack_path(case))), LabelStore.open(str(case / "labels.zarr"))
    before = threading.active_count()
    feed = Feed(pack, store, size=SIZE, batch_size=4, epochs=1, loader="torch", workers=1)
    next(iter(feed.batches(0)))
    feed.close()
    assert threading.active_count() == before


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


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_compile_gives_the_same_loss(case: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"trunk": "test_vit", "size": 160, "epochs": 1, "holdout": 0.0}
    changes["heads"] = (HeadConfig(name="tones"),)
    train.run(settings(case, tmp_path / "eager", **changes))
    train.run(settings(case, tmp_path / "compiled", **changes, compile=True))
    eager, compiled = losses(tmp_path / "eager"), losses(tmp_path / "compiled")
    assert [loss["tones"] for _, loss in compiled] == pytest.approx([loss["tones"] for _, loss in eager], rel=0.02)


def test_the_python_api(case: Path, tmp_path: Path) -> None:
    """The README's own loop."""
    pack_folder, store_folder, folder = str(pack_path(case)), str(case / "labels.zarr"), tmp_path / "student"
    torch.manual_seed(0)

    pack, store = Pack.open(pack_folder), LabelStore.open(store_folder)
    feed = Feed(pack, store, size=32, batch_size=8, epochs=4)
    model = student.build("test_efficientnet", store.heads, pretrained=False)
    inputs = backbones.preprocessing(model.trunk, size=32)
    loss = HeadsLoss(store.heads, [HeadConfig(name=name) for name in store.heads])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    told = []
    for epoch in range(4):
        for batch in feed.batches(epoch):
            logits = model(backbones.normalise(batch.pixels, inputs, torch.float32))
            total = loss(logits, batch.labels, batch.rows).sum()
            total.backward()
            optimizer.step()
            optimizer.zero_grad()
            told.append(total.item())
    student.save(model, folder, preprocessing=inputs, card={})

    feed.close()
    assert np.mean(told[-4:]) < np.mean(told[:4])
    assert timm.create_model(f"local-dir:{folder}", pretrained=True) is not None
