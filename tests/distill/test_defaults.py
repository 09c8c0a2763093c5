"""defaults.py: what follows from store and pack where a recipe says nothing."""

import dataclasses
from pathlib import Path

import pytest
from start_case import SIZE, make_case
from store_builder import section, spec
from training_case import pack_path

from repcon.commands import train
from repcon.config import HeadConfig, TrainConfig
from repcon.distill import defaults
from repcon.distill.loss import default_temperature
from repcon.labels.store import LabelStore

pytest_plugins = ("training_fixtures",)
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("images", "size"),
    [(32, 8), (216, 8), (300, 16), (2_500, 64), (20_000, 64), (20_001, 128), (200_000, 256), (10**7, 256)],
)
def test_batches_grow_with_the_images(images: int, size: int) -> None:
    assert defaults.batch_size_for(images) == size


@pytest.mark.parametrize(
    ("stored", "taken"),
    [((1.0, 2.0), 2.0), ((1.0,), 1.0), ((1.0, 4.0), 1.0), ((3.0, 4.0), 3.0), ((0.5, 1.5, 2.5), 1.5)],
)
def test_the_temperature_is_a_stored_one(stored: tuple[float, ...], taken: float) -> None:
    assert default_temperature(stored) == taken


def test_what_the_recipe_says_stays(tmp_path: Path) -> None:
    sections = (section("a", 9, preprocessing={"size": 64}), section("b", 9, preprocessing={"size": 96}))
    store = LabelStore.create(
        str(tmp_path / "s"), spec(teachers=(*sections, section("c", 9, preprocessing={"size": 96})))
    )
    open_ = TrainConfig(pack="p", store="s", out="o")
    chosen = defaults.resolve(open_, store)
    assert [(head.name, head.weight, head.temperature) for head in chosen.heads] == [(name, 1.0, 2.0) for name in "abc"]
    assert (chosen.size, chosen.batch_size, chosen.freeze_norm, chosen.balance_heads) == (96, 8, True, True)
    assert defaults.resolve(dataclasses.replace(open_, pretrained=False), store).freeze_norm is False
    assert defaults.resolve(dataclasses.replace(open_, heads=(HeadConfig(name="a"),)), store).size == 64
    said = dataclasses.replace(
        open_,
        heads=(HeadConfig(name="b", weight=0.1, temperature=1.0),),
        size=32,
        batch_size=5,
        freeze_norm=False,
        balance_heads=False,
    )
    assert defaults.resolve(said, store) == said


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
