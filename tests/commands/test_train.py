"""Training: losses fall, runs resume to the bit, refusals name the field, the output opens in timm."""

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch._dynamo.utils import counters
from training_case import CLASSES, SIZE, lines, losses, make_store, pack_path, settings, stop_after

from repcon.commands import train
from repcon.config import HeadConfig, OptimConfig
from repcon.distill.loader import DistillLoader
from repcon.distill.loss import MultiHeadKLLoss
from repcon.distill.loss_guard import LossGuard
from repcon.images.pack import ImagePack
from repcon.labels.store import LabelStore
from repcon.models.preprocessing import normalise, preprocessing_of
from repcon.models.student import build_student, load_student, save_student
from repcon.models.timm_import import timm
from repcon.runtime.errors import UserError

pytest_plugins = ("training_fixtures",)


def test_the_loss_falls_and_everything_is_written(case: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    results = train.run(settings(case, out, epochs=12))
    told = losses(out)
    assert told[-1][1]["colours"] < 0.5 * told[0][1]["colours"]
    assert [step for step, _ in told] == list(range(1, results["steps"] + 1))
    line = lines(out, "step")[0]
    assert {"images_per_second", "data_seconds", "step_seconds", "lr"} <= set(line) and set(line["loss"]) == set(
        CLASSES
    )
    assert line["memory_bytes"] > 50e6  # torch alone takes more.
    validation = lines(out, "validation")
    assert [line["epoch"] for line in validation] == list(range(13))  # from the start on, before any step
    assert validation[-1]["heads"]["colours"]["kl"] < validation[0]["heads"]["colours"]["kl"]
    assert json.loads((out / "results.json").read_text())["steps"] == results["steps"]
    assert len(list((out / "checkpoints").glob("step-*.pt"))) == 2
    assert (out / "checkpoints" / "best.pt").is_file()


def test_the_student_opens_with_timm(case: Path, tmp_path: Path) -> None:
    train.run(settings(case, tmp_path / "run", epochs=1, heads=()))
    folder = tmp_path / "run" / "student"
    assert load_student(tmp_path / "run").heads == CLASSES
    backbone = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0).eval()
    loaded = load_student(folder).eval()
    images = torch.randn(2, 3, SIZE, SIZE)
    with torch.no_grad():
        assert torch.equal(backbone(images), loaded.features(images))
        assert loaded(images).shape == (2, sum(CLASSES.values()))
    config = timm.data.resolve_model_data_config(backbone)
    assert config["input_size"] == (3, SIZE, SIZE)
    card = (folder / "README.md").read_text()
    store = LabelStore.open(str(case / "labels.zarr"))
    for word in ("colours", "tones", "CC0-1.0", store.fingerprint, "agreement", "[optim]"):
        assert word in card


@pytest.mark.parametrize("backbone", ["resnet10t", "vit_tiny_patch16_224", "mobilenetv3_small_050"])
def test_any_backbone_from_random_weights(case: Path, tmp_path: Path, backbone: str) -> None:
    """Also one of a fixed input size, and one whose pooled features are wider than `num_features`."""
    train.run(settings(case, tmp_path / "run", backbone=backbone, epochs=1))
    folder = tmp_path / "run" / "student"
    opened = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    images = torch.randn(2, 3, SIZE, SIZE)
    with torch.no_grad():
        assert torch.equal(opened(images), load_student(folder).eval().features(images))


def test_a_start_from_a_folder(case: Path, tmp_path: Path) -> None:
    """Another run's student, or anything else that timm wrote: with a rate of nothing its weights come out again."""
    train.run(settings(case, tmp_path / "first", epochs=1))
    folder = tmp_path / "first" / "student"
    still: dict[str, Any] = {"optim": OptimConfig(lr=1e-60, weight_decay=0.0), "freeze_norm": True, "epochs": 1}
    train.run(settings(case, tmp_path / "second", backbone=str(folder), pretrained=True, **still))
    first, second = (load_file(tmp_path / name / "student" / "model.safetensors") for name in ("first", "second"))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_a_finished_run_is_not_repeated(case: Path, tmp_path: Path) -> None:
    first = train.run(settings(case, tmp_path / "run", epochs=1))
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert train.run(settings(case, tmp_path / "run", epochs=1)) == json.loads(json.dumps(first))
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before


def test_a_finished_run_without_its_checkpoints_is_not_written_over(case: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train.run(settings(case, out, epochs=1))
    shutil.rmtree(out / "checkpoints")
    with pytest.raises(UserError, match="holds a finished run, whose checkpoints are gone"):
        train.run(settings(case, out, epochs=2))


def test_a_run_that_begins_again_begins_its_metrics_again(
    case: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: LossGuard, *_: Any) -> None:
        raise UserError("stopped before the first checkpoint")

    with monkeypatch.context() as patch, pytest.raises(UserError, match="before the first"):
        patch.setattr(LossGuard, "check_logits", broken)
        train.run(settings(case, tmp_path / "run", epochs=1))
    assert losses(tmp_path / "run")
    results = train.run(settings(case, tmp_path / "run", epochs=1, optim=OptimConfig(lr=1e-3)))
    assert [step for step, _ in losses(tmp_path / "run")] == list(range(1, results["steps"] + 1))


def test_a_store_that_got_another_teacher_is_still_the_run_s(
    case: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_store(tmp_path / "labels.zarr", ImagePack.open(str(pack_path(case))))
    run = settings(case, tmp_path / "run", store=store.url)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(6, patch)
        train.run(run)
    metadata = dataclasses.replace(store.heads["tones"].metadata, name="later")
    store.append_teachers([metadata])
    assert LabelStore.open(store.url).fingerprint != run.store
    assert train.run(run)["steps"] == len(losses(tmp_path / "run"))


def test_a_run_s_folder_is_a_backbone(case: Path, tmp_path: Path) -> None:
    train.run(settings(case, tmp_path / "first", epochs=1))
    train.run(settings(case, tmp_path / "second", epochs=1, backbone=str(tmp_path / "first"), pretrained=True))
    (tmp_path / "first" / "results.json").unlink()
    with pytest.raises(UserError, match="the run that makes it has not ended"):
        train.run(settings(case, tmp_path / "third", epochs=1, backbone=str(tmp_path / "first"), pretrained=True))


def test_results_are_those_of_all_parts_of_a_run(case: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(15, patch)
        train.run(settings(case, out))
    first = {line["step"]: line for line in lines(out, "step")}
    results = train.run(settings(case, out))
    every = {line["step"]: line for line in lines(out, "step")}
    spent = sum(line["data_seconds"] + line["step_seconds"] for line in every.values())
    assert len(first) == 15 and len(every) == results["steps"]
    assert results["images_per_second"] == pytest.approx(results["images"] / spent, rel=0.01)
    assert results["seconds"] > spent and results["loss"] == every[results["steps"]]["loss"]
    (out / "results.json").unlink()
    again = train.run(settings(case, out))
    assert again["loss"] == results["loss"] and again["images_per_second"] == results["images_per_second"]


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
    pack = ImagePack.open(str(pack_path(case)))
    make_store(tmp_path / "other.zarr", pack, crop_seed=1)
    with pytest.raises(UserError, match="store was"):
        train.run(settings(case, out, epochs=1, store=str(tmp_path / "other.zarr")))


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
        ({"backbone": "resnet5000"}, "resnet5000"),
        ({"epochs": 0}, "epochs: 0 makes no sense"),
        ({"grad_accum_steps": -1}, "grad_accum_steps: -1"),
        ({"val_fraction": 1.0}, "val_fraction: 1.0 leaves no image"),
        ({"optim": OptimConfig(clip_norm=-1.0)}, "optim.clip_norm: -1.0"),
        ({"optim": OptimConfig(ema=1.0)}, "optim.ema: 1.0"),
        ({"mix_window": 3}, "mix_window: 3 has nothing to spread"),
        ({"freeze_blocks": 2}, "freeze_blocks: 2 would keep random weights"),
        ({"heads": (HeadConfig(name="tones", weight=-1.0),)}, "tones: weight -1.0"),
        ({"heads": (HeadConfig(name="tones", weight=0.0),)}, "all weights are 0"),
    ],
)
def test_mistakes_are_named(case: Path, tmp_path: Path, changes: dict[str, Any], word: str) -> None:
    with pytest.raises(UserError, match=word):
        train.run(settings(case, tmp_path / "run", **changes))


def test_another_packs_labels_are_refused(case: Path, tmp_path: Path, picture_folder: Path) -> None:
    from repcon.images.packing import open_or_pack

    open_or_pack(str(picture_folder / "apple"), tmp_path / "cache")
    with pytest.raises(UserError, match="another pack"):
        train.run(settings(case, tmp_path / "run", pack=str(pack_path(tmp_path))))


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_compile_gives_the_same_loss(case: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"backbone": "test_vit", "size": 160, "epochs": 1, "val_fraction": 0.0}
    changes["heads"] = (HeadConfig(name="tones"),)
    train.run(settings(case, tmp_path / "eager", **changes))
    counters.clear()
    train.run(settings(case, tmp_path / "compiled", **changes, compile=True))
    assert counters["stats"]["unique_graphs"] > 0 and not counters["graph_break"]
    eager, compiled = losses(tmp_path / "eager"), losses(tmp_path / "compiled")
    assert [loss["tones"] for _, loss in compiled] == pytest.approx([loss["tones"] for _, loss in eager], rel=0.02)


def test_the_python_api(case: Path, tmp_path: Path) -> None:
    """The README's own loop."""
    pack_folder, store_folder, folder = str(pack_path(case)), str(case / "labels.zarr"), tmp_path / "student"
    torch.manual_seed(0)

    pack, store = ImagePack.open(pack_folder), LabelStore.open(store_folder)
    loader = DistillLoader(pack, store, size=32, batch_size=8, epochs=4)
    model = build_student("test_efficientnet", store.heads, pretrained=False)
    inputs = preprocessing_of(model.backbone, size=32)
    loss = MultiHeadKLLoss(store.heads, [HeadConfig(name=name) for name in store.heads])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    told = []
    for epoch in range(4):
        for batch in loader.batches(epoch):
            logits = model(normalise(batch.pixels, inputs, torch.float32))
            total = loss(logits, batch.labels, batch.rows).sum()
            total.backward()
            optimizer.step()
            optimizer.zero_grad()
            told.append(total.item())
    save_student(model, folder, preprocessing=inputs, card={})

    loader.close()
    assert np.mean(told[-4:]) < np.mean(told[:4])
    assert timm.create_model(f"local-dir:{folder}", pretrained=True) is not None


def test_labels_in_windows_resume_to_the_same_losses(
    case: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run within little memory for labels, stopped in the middle of a window, ends as an unbroken one."""
    sharded = make_store(tmp_path / "labels.zarr", ImagePack.open(str(pack_path(case))), rows_per_shard=6)
    changes = {"store": sharded.url, "label_cache_gib": 1000 / 2**30}
    train.run(settings(case, tmp_path / "whole", **changes))
    with monkeypatch.context() as patch:
        stop_after(6, patch)
        with pytest.raises(KeyboardInterrupt):
            train.run(settings(case, tmp_path / "broken", **changes))
    train.run(settings(case, tmp_path / "broken", **changes))
    assert losses(tmp_path / "broken") == losses(tmp_path / "whole")
