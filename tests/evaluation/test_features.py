"""Features are extracted once, and belong to one set of weights, one pack and one preprocessing."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from repcon.evaluation import features
from repcon.images.pack import ImagePack
from repcon.images.packing import open_or_pack
from repcon.models.preprocessing import preprocessing_of
from repcon.models.saved_model import save_model
from repcon.models.timm_import import timm
from repcon.runtime.console import progress
from repcon.runtime.errors import UserError


@pytest.fixture(scope="module")
def pack(picture_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> ImagePack:
    return open_or_pack(str(picture_folder), tmp_path_factory.mktemp("packs"))


def network(folder: Path, name: str, seed: int) -> str:
    torch.manual_seed(seed)
    model = timm.create_model(name, num_classes=3)
    save_model(model, folder, classes=list("abc"), preprocessing=preprocessing_of(model, 32), extra={})
    return str(folder)


@pytest.fixture
def reading(tmp_path: Path) -> features.ExtractConfig:
    return features.ExtractConfig(
        size=32, batch_size=5, loader="torch", num_workers=0, device="cpu", cache=tmp_path / "cache"
    )


def extract(model: str, pack: ImagePack, rows: np.ndarray, reading: features.ExtractConfig) -> tuple[np.ndarray, str]:
    with progress() as bars:
        found = features.extract(model, pack, rows, reading, bars)
    assert found.input_size == reading.size or not reading.size
    return found.values, found.weight_hash


def test_the_box_is_the_largest_centred_square():
    boxes = features.centre_boxes(np.array([[10, 6], [6, 11], [7, 7]], np.int32))
    assert boxes.tolist() == [[2, 0, 6, 6], [0, 2, 6, 6], [0, 0, 7, 7]]


def test_rows_are_computed_once_in_any_order(pack, reading, tmp_path, monkeypatch):
    model = network(tmp_path / "net", "test_efficientnet", 0)
    some, all_rows = np.array([7, 2, 19]), np.arange(len(pack))
    first, weights = extract(model, pack, some, reading)
    whole, again = extract(model, pack, all_rows, reading)
    assert weights == again and whole.dtype == np.float32
    assert np.array_equal(whole[some], first)
    fresh, _ = extract(model, pack, all_rows, replace(reading, cache=tmp_path / "other"))
    assert np.allclose(fresh, whole, atol=1e-5)
    monkeypatch.setattr(features, "open_loader", None)  # Nothing is decoded any more.
    assert np.array_equal(extract(model, pack, all_rows[::-1], reading)[0], whole[::-1])


def test_other_weights_size_or_pack_are_other_features(pack, reading, tmp_path):
    rows = np.arange(4)
    folder = tmp_path / "net"
    before, _ = extract(network(folder, "test_efficientnet", 0), pack, rows, reading)
    after, _ = extract(network(folder, "test_efficientnet", 1), pack, rows, reading)
    larger, _ = extract(str(folder), pack, rows, replace(reading, size=48))
    assert not np.allclose(before, after) and not np.allclose(after, larger)
    assert len(list(reading.cache.glob("*.npz"))) == 3


def test_a_damaged_cache_is_named(pack, reading, tmp_path):
    model = network(tmp_path / "net", "test_efficientnet", 0)
    extract(model, pack, np.arange(2), reading)
    [path] = reading.cache.glob("*.npz")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match=r"\.npz"):
        extract(model, pack, np.arange(2), reading)


def test_a_backbone_of_another_input_size_says_so(pack, reading, tmp_path):
    model = network(tmp_path / "vit", "test_vit", 0)
    with pytest.raises(UserError, match="size"):
        extract(model, pack, np.arange(2), replace(reading, size=40))
    assert extract(model, pack, np.arange(2), replace(reading, size=0))[0].shape[0] == 2


def test_a_folder_that_pools_otherwise_has_other_features(pack, reading, tmp_path):
    """Architecture and weights are the same: only config.json tells."""
    model, rows = network(tmp_path / "net", "test_resnet", 0), np.arange(4)
    reading = replace(reading, size=128)  # at 32 pixels its last map is a single place
    average, weights = extract(model, pack, rows, reading)
    path = tmp_path / "net" / "config.json"
    path.write_text(path.read_text().replace('"global_pool": "avg"', '"global_pool": "max"'))
    largest, again = extract(model, pack, rows, reading)
    assert weights == again and not np.allclose(average, largest)


@pytest.mark.parametrize(
    "forward, says",
    [
        ("self.net(x)", ""),
        ("self.net(x) - self.net(x).mean(0)", "when other images are beside it"),
        ("nn.functional.dropout(self.net(x), 0.5)", "when it is asked the same again"),
        ("self.parts[0](x)", "is not registered"),
        ("exit(1)", "the backbone does not take inputs of 32 pixels"),
        ("(self.net(x),)", "not one vector per image"),
        ("self.net(x)[:1]", "not one vector per image"),
    ],
)
def test_a_backbone_of_ones_own_gives_the_same_features_again(pack, reading, tmp_path, monkeypatch, forward, says):
    parts = "[nn.Conv2d(3, 8, 3)]" if "parts" in forward else "None"
    (tmp_path / "own_backbone.py").write_text(
        "from torch import nn\n"
        "class Own(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())\n"
        f"        self.parts = {parts}\n"
        "    def forward(self, x):\n"
        f"        return {forward}\n"
        "def make():\n"
        "    return Own(), {'size': 32, 'mean': [0.5] * 3, 'std': [0.25] * 3}\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "own_backbone", raising=False)
    rows = np.arange(8)
    if not says:
        assert extract("own_backbone:make", pack, rows, reading)[0].shape == (8, 8)
        return
    with pytest.raises(UserError, match=says):
        extract("own_backbone:make", pack, rows, reading)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_short_memory_is_not_a_wrong_size(error):
    class Short(torch.nn.Module):
        def forward(self, _: torch.Tensor) -> torch.Tensor:
            raise error

    with pytest.raises(type(error)) as caught:
        features._forward(Short(), torch.zeros(1, 3, 8, 8))
    assert caught.value is error
