"""Tiny npm packages of icons, laid out as the real ones are: what the drawings' tests read instead of the network."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

from repcon.pictures import icon_sets

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
    path = cache / f"iconify-json-{artist}-{icon_sets.PACKAGES[artist]}.tgz"
    with tarfile.open(path, "w:gz") as tar:
        for name, value in {"info.json": info, **contents}.items():
            data = json.dumps(value).encode()
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def write_cache(cache: Path) -> Path:
    """Five artists drew the cat face under different names, two of them only drew the dog; four drew nothing."""
    categories = {label: ["cat-face", "dog"] if "Animals" in label else [] for label in icon_sets.CATEGORIES.values()}
    packages = {artist: icons([], "#000") for artist in icon_sets.PACKAGES}
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
