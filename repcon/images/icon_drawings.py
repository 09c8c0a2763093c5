"""Render the icon sets of `repcon.images.icon_sets` into an image folder, for the demo."""

import importlib.util
import io
import json
import multiprocessing
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from repcon.images.icon_sets import CATEGORIES, FEWEST_DRAWINGS, PACKAGES, Drawing, fetch
from repcon.runtime.atomic_files import move_into_place
from repcon.runtime.console import progress
from repcon.runtime.errors import UserError
from repcon.runtime.run_dir import write_json
from repcon.runtime.system import cores


def render(names: Sequence[str], out: Path, size: int, *, cache: Path | None = None) -> dict[str, Any]:
    """Renders the categories `names` (of CATEGORIES) into the image folder `out`: class/artist.jpg, white background.

    Gives `folder`, `categories`, `size`, `classes`, `images` and `licences`, and stores them in `<out>.json`; does
    nothing if that file has the same settings. The folder appears complete or not at all. Raises UserError for an
    unknown category, a folder of other content, and as `fetch`.
    """
    unknown = [name for name in names if name not in CATEGORIES]
    if unknown or not names:
        raise UserError(f"no drawings of {', '.join(unknown) or 'nothing'}; there are {', '.join(CATEGORIES)}")
    settings = {"categories": sorted(names), "size": size, "packages": PACKAGES, "fewest_drawings": FEWEST_DRAWINGS}
    record = out.with_name(out.name + ".json")
    if done := _finished(out, record, settings):
        return done
    sets = fetch(cache)
    drawings = [drawing for name in settings["categories"] for drawing in sets.drawings(name)]
    artists = {drawing.artist for drawing in drawings}
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        temporary.chmod(0o755)
        _draw(drawings, temporary, size)
        move_into_place(temporary, out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    summary = settings | {
        "folder": str(out),
        "classes": len({drawing.thing for drawing in drawings}),
        "images": len(drawings),
        "licences": [row for row in sets.licences() if row["artist"] in artists],
    }
    write_json(record, summary)
    return summary


def _finished(out: Path, record: Path, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    if not out.exists():
        return None
    if out.is_dir() and not any(out.iterdir()):
        return None
    try:
        summary = json.loads(record.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        summary = {}
    if any(summary.get(key) != value for key, value in settings.items()):
        raise UserError(f"{out} holds something else than the drawings asked for; remove it or name another folder")
    return summary | {"folder": str(out)}


def _draw(drawings: Sequence[Drawing], folder: Path, size: int) -> None:
    """Renders in processes: the renderer holds the interpreter's lock, so threads would not run in parallel."""
    if importlib.util.find_spec("resvg_py") is None:
        raise UserError('the demo\'s pictures need the package resvg_py: pip install "repcon[demo]"')
    for thing in {drawing.thing for drawing in drawings}:
        (folder / thing).mkdir()
    workers = min(cores(), 8)
    spawn = multiprocessing.get_context("spawn")
    jobs = ((drawing, folder / drawing.thing / f"{drawing.artist}.jpg", size) for drawing in drawings)
    with progress() as bar, ProcessPoolExecutor(workers, mp_context=spawn) as pool:
        task = bar.add_task("drawings", total=len(drawings), unit="images", note="")
        for _ in pool.map(_draw_one, jobs, chunksize=16):
            bar.advance(task)


def _draw_one(job: tuple[Drawing, Path, int]) -> None:
    import numpy as np
    import resvg_py
    import simplejpeg
    from PIL import Image

    drawing, path, size = job
    try:
        png = resvg_py.svg_to_bytes(svg_string=drawing.svg(size), background="#ffffff", skip_system_fonts=True)
    except ValueError as error:
        raise UserError(f"{drawing.artist}'s drawing of {drawing.thing} cannot be rendered: {error}") from error
    pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
    path.write_bytes(simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), quality=95, colorsubsampling="444"))
