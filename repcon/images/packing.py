"""A pack from any source of images, with the record of how it was made."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from repcon import config as configuration
from repcon.config import PackConfig
from repcon.images import hub, sources, writer
from repcon.images.format import LEFT_OUT, MANIFEST, Manifest
from repcon.images.pack import ImagePack
from repcon.runtime.console import console, print_outcome, warn
from repcon.runtime.errors import UserError
from repcon.runtime.local_files import OpenFile
from repcon.runtime.run_dir import MARKER, RunDir, read_results
from repcon.runtime.text import abbreviate


def write_pack(config: PackConfig, on_written: Callable[[Path], None] | None = None) -> dict[str, Any]:
    """Writes the pack, prints a summary and gives the figures; calls `on_written` before these are stored."""
    started = time.perf_counter()
    plan, out = writer.plan(config), Path(config.out)
    # A finished pack keeps the record of the run that made it.
    recorded = read_results(out) if (out / MANIFEST).is_file() else {}
    record = None if "fingerprint" in recorded else RunDir(out, "pack", configuration.dump(config))
    manifest = writer.write(plan)
    seconds = time.perf_counter() - started
    if on_written is not None:
        on_written(out)
    figures = _figures(manifest, seconds, plan.listing.warnings)
    _print_summary(config, figures, manifest.classes)
    # A record of an earlier version may lack some.
    return figures | recorded if record is None else record.finish(figures)


def _figures(manifest: Manifest, seconds: float, warnings: Sequence[str]) -> dict[str, Any]:
    left_out, re_encoded = (manifest.summary.get(name, {}) for name in ("left_out", "re_encoded"))
    return {
        "images": manifest.images,
        "classes": len(manifest.classes),
        "shards": len(manifest.shard_bytes),
        "megabytes": round(sum(manifest.shard_bytes) / 1e6, 3),
        "kept": manifest.images - sum(re_encoded.values()),
        "re_encoded": re_encoded,
        "left_out": left_out,
        "fingerprint": manifest.fingerprint,
        "warnings": list(warnings),
        "seconds": round(seconds, 3),
    }


def is_pack(source: str) -> bool:
    """Whether a source is a pack: its folder, or its URL."""
    return ("://" in source and not hub.is_dataset(source)) or Path(source, MANIFEST).is_file()


def open_or_pack(source: str, cache: Path) -> ImagePack:
    """Opens a pack (path or URL); packs any other source into `cache` first, once for each state of the source."""
    if is_pack(source):
        return ImagePack.open(source)
    held = _output_of(Path(source))
    if held:  # a run's output folder, whose tars are not the user's images
        what = f"the output of `repcon {held}`, no images"
        if held == "pack":
            what = "a pack that was begun and not finished; give the same `repcon pack` again"
        raise UserError(f"{source}: holds {what}")
    identity = sources.list_source(source).identity
    out = Path(cache) / f"pack-{identity[:16]}"
    if not (out / MANIFEST).is_file():
        figures = write_pack(PackConfig(source=source, out=str(out)))
        print_outcome(f"pack of {figures['images']:,} images", str(out))
    return ImagePack.open(out)


def _output_of(folder: Path) -> str:
    """The command whose output folder this is; empty where it is none."""
    try:
        held = OpenFile(folder / MARKER).read(0, 100).decode("ascii", "replace").strip()
    except OSError:
        return ""
    return held if held.isalpha() else ""


def _print_summary(config: PackConfig, figures: dict[str, Any], names: tuple[str, ...]) -> None:
    """Packing summary, where not all files were kept unchanged, and the pack's facts."""
    table = Table()
    table.add_column("packing summary")
    table.add_column("images", justify="right")
    table.add_row("kept unchanged", f"{figures['kept']:,}")
    for reason, count in figures["re_encoded"].items():
        table.add_row(f"re-encoded: {escape(reason)}", f"{count:,}")
    for reason, count in figures["left_out"].items():
        table.add_row(f"[yellow]left out: {escape(reason)}[/]", f"{count:,}")
    if table.row_count > 1:
        console.print(table)
    if names:
        console.print(f"{figures['classes']:,} classes: {abbreviate(names)}", markup=False, highlight=False)
    shards = f"{figures['shards']} shard{'s' if figures['shards'] != 1 else ''}"
    facts = f"{figures['megabytes']:,.1f} MB in {shards}, fingerprint {figures['fingerprint'][:16]}"
    console.print(facts, markup=False, highlight=False)
    for warning in figures.get("warnings", ()):
        warn(warning)
    if figures["left_out"]:
        path = escape(str(Path(config.out, LEFT_OUT)))
        console.print(f"each file that was left out, with the reason: {path}", soft_wrap=True)
