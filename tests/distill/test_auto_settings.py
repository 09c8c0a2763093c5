"""auto_settings.py: what follows from store and pack where a recipe says nothing."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from sklearn.datasets import load_sample_image
from start_case import SIZE, make_case
from store_builder import spec, teacher_metadata
from training_case import pack_path

from repcon.commands import pack, precompute, teach, train
from repcon.config import HeadConfig, OptimConfig, PackConfig, PrecomputeConfig, TeachConfig, TeacherConfig, TrainConfig
from repcon.distill.auto_settings import batch_size_for, learning_rate_for, resolve_auto_settings
from repcon.distill.loss import default_temperature
from repcon.labels.store import LabelStore


@pytest.mark.parametrize(
    ("images", "size"),
    [(32, 8), (216, 8), (300, 16), (2_500, 64), (20_000, 64), (20_001, 128), (200_000, 256), (10**7, 256)],
)
def test_batches_grow_with_the_images(images: int, size: int) -> None:
    assert batch_size_for(images) == size


def test_the_rate_falls_with_small_batches_and_does_not_grow_with_large_ones() -> None:
    assert [learning_rate_for(crops) for crops in (64, 256)] == [3e-4, 3e-4]
    assert learning_rate_for(16) == pytest.approx(7.5e-5) and learning_rate_for(8) == pytest.approx(3.75e-5)


@pytest.mark.parametrize(
    ("stored", "taken"),
    [((1.0, 2.0), 2.0), ((1.0,), 1.0), ((1.0, 4.0), 1.0), ((3.0, 4.0), 3.0), ((0.5, 1.5, 2.5), 1.5)],
)
def test_the_temperature_is_a_stored_one(stored: tuple[float, ...], taken: float) -> None:
    assert default_temperature(stored) == taken


def test_what_the_recipe_says_stays(tmp_path: Path) -> None:
    two = (teacher_metadata("a", 9, preprocessing={"size": 64}), teacher_metadata("b", 9, preprocessing={"size": 96}))
    store = LabelStore.create(
        str(tmp_path / "s"), spec(teachers=(*two, teacher_metadata("c", 9, preprocessing={"size": 96})))
    )
    open_ = TrainConfig(pack="p", store="s", out="o")
    chosen = resolve_auto_settings(open_, store)
    assert [(head.name, head.weight, head.temperature) for head in chosen.heads] == [(name, 1.0, 2.0) for name in "abc"]
    assert (chosen.size, chosen.batch_size, chosen.freeze_norm, chosen.balance_heads) == (96, 8, True, True)
    assert chosen.optim == dataclasses.replace(open_.optim, lr=learning_rate_for(8))
    summed = dataclasses.replace(open_, grad_accum_steps=4)
    assert resolve_auto_settings(summed, store).optim.lr == learning_rate_for(32)
    assert resolve_auto_settings(dataclasses.replace(open_, pretrained=False), store).freeze_norm is False
    assert resolve_auto_settings(dataclasses.replace(open_, heads=(HeadConfig(name="a"),)), store).size == 64
    said = dataclasses.replace(
        open_,
        heads=(HeadConfig(name="b", weight=0.1, temperature=1.0),),
        size=32,
        batch_size=5,
        freeze_norm=False,
        balance_heads=False,
        optim=OptimConfig(lr=1e-3),
    )
    assert resolve_auto_settings(said, store) == said


def test_no_warm_head_ends_worse_than_it_began_by_default(tmp_path: Path, picture_folder: Path) -> None:
    root = make_case(tmp_path, picture_folder)
    heads = (HeadConfig(name="generalist"), HeadConfig(name="birds"))
    made = {"pack": str(pack_path(root)), "store": str(root / "labels.zarr"), "out": str(root / "run")}
    results = train.run(TrainConfig(**made, backbone=str(root / "generalist"), heads=heads, val_fraction=0.2))
    assert results["init"]["warm_heads"] == ["generalist", "birds"]
    assert not results["heads_worse_than_at_the_start"]
    begun, ended = (results[key]["heads"] for key in ("validation_start", "validation"))
    assert all(ended[name]["kl"] < begun[name]["kl"] for name in begun)
    assert f"size = {SIZE}" in (root / "run" / "config.toml").read_text()


def photographs(folder: Path) -> Path:
    """A labelled folder of 38 parts of two photographs."""
    for name in ("china", "flower"):
        (folder / name).mkdir(parents=True)
        pixels = load_sample_image(f"{name}.jpg")
        for number in range(19):
            top, left = 80 * (number // 5), 120 * (number % 5)
            part = np.ascontiguousarray(pixels[top : top + 150, left : left + 150])
            (folder / name / f"{number}.jpg").write_bytes(simplejpeg.encode_jpeg(part, quality=90))
    return folder


def test_no_warm_head_ends_worse_than_it_began_on_few_photographs(tmp_path: Path) -> None:
    """With a real network and its teacher of a task; at 3e-4 in the same steps of 8 crops a head does."""
    data = str(photographs(tmp_path / "photographs"))
    teach.run(TeachConfig(data=data, out=str(tmp_path / "task"), size=64, epochs=2, batch_size=8, device="cpu"))
    pack.run(PackConfig(source=data, out=str(tmp_path / "pack")))
    models = {"generalist": "package:efficientnet_lite0", "task": str(tmp_path / "task")}
    teachers = tuple(TeacherConfig(name=name, model=model, size=64) for name, model in models.items())
    made = {"pack": str(tmp_path / "pack"), "device": "cpu"}
    precompute.run(
        PrecomputeConfig(**made, out=str(tmp_path / "labels"), crops=4, temperatures=(1.0, 2.0), teachers=teachers)
    )
    worse = {}
    for rate in (0.0, 3e-4):
        settings = TrainConfig(
            **made,
            store=str(tmp_path / "labels"),
            out=str(tmp_path / str(rate)),
            val_fraction=0.2,
            optim=OptimConfig(lr=rate),
        )
        results = train.run(settings)
        worse[rate] = results["heads_worse_than_at_the_start"]
    assert not worse[0.0] and worse[3e-4]
