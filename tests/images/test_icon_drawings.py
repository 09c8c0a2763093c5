"""Drawings: the pictures, their cache, and failures that leave nothing half done."""

from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from tiny_icons import icons, write_cache, write_package

from repcon.images import icon_drawings
from repcon.runtime.errors import UserError


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return write_cache(tmp_path / "cache")


def pixels(folder: Path, artist: str) -> np.ndarray:
    return simplejpeg.decode_jpeg((folder / "cat-face" / f"{artist}.jpg").read_bytes()).astype(int)


def test_render_writes_what_was_drawn(cache: Path, tmp_path: Path) -> None:
    out = tmp_path / "animals"
    summary = icon_drawings.render(["animals"], out, 32, cache=cache)
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
    summary = icon_drawings.render(["animals"], tmp_path / "animals", 16, cache=cache)
    assert [row["artist"] for row in summary["licences"]] == ["noto", "noto-v1", "twemoji", "openmoji", "emojione"]
    first = summary["licences"][0]
    assert (first["licence"], first["author"]) == ("MIT", "The noto people")
    assert first["package"] == "@iconify-json/noto@1.2.9"


def test_a_second_render_does_nothing_and_another_is_refused(cache: Path, tmp_path: Path) -> None:
    out = tmp_path / "animals"
    first = icon_drawings.render(["animals"], out, 16, cache=cache)
    assert icon_drawings.render(["animals"], out, 16, cache=tmp_path / "no cache") == first
    with pytest.raises(UserError, match="something else"):
        icon_drawings.render(["animals"], out, 24, cache=cache)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("all of it")
    with pytest.raises(UserError, match="something else"):
        icon_drawings.render(["animals"], tmp_path / "mine", 16, cache=cache)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "all of it"


def test_a_failure_leaves_no_folder(cache: Path, tmp_path: Path) -> None:
    broken = icons(["cat-face", "dog"], "#ff0000")
    broken["icons"]["cat-face"]["body"] = "<path"
    write_package(cache, "emojione-v1", {"icons.json": broken})
    with pytest.raises(UserError, match="emojione-v1's drawing of cat-face"):
        icon_drawings.render(["animals"], tmp_path / "out" / "animals", 16, cache=cache)
    assert list((tmp_path / "out").iterdir()) == []


def test_an_unknown_category_is_an_error_that_lists_the_known(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"animal.*animals, foods, places, objects, activities"):
        icon_drawings.render(["animal"], tmp_path / "x", 16)
    with pytest.raises(UserError, match="nothing"):
        icon_drawings.render([], tmp_path / "x", 16)
