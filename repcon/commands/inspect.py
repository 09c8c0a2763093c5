"""`repcon inspect`: what a store holds, how small it is, and what its truncation to the top k costs."""

import time
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from repcon.config import InspectConfig
from repcon.labels.statistics import MUTUAL_INFORMATION, UNCOMPRESSED, figures, known, warn_uninformative, why_no_labels
from repcon.labels.store import LabelStore
from repcon.reports.figures import format_value
from repcon.reports.sections.store import encoding_rows, store_sections
from repcon.runtime.console import console, narrow_table
from repcon.runtime.run_dir import write_text
from repcon.runtime.text import format_bytes

_SHOWN_MISSING = 10


def run(config: InspectConfig) -> dict[str, Any]:
    """Prints the tables, writes the page where `html` names one, and gives the figures."""
    store = LabelStore.open(config.store)
    found = figures(store)
    show(store, found)
    if config.html:
        _write_page(Path(config.html), f"Labels in {Path(config.store).name}", found)
    return found


def show(store: LabelStore, found: dict[str, Any]) -> None:
    found = known(found)
    recipe = ", ".join(f"{name} {_range(value)}" for name, value in found["crop_recipe"].items())
    facts = Table(box=None, show_header=False, title=escape(store.url), title_justify="left", title_style="bold")
    facts.add_row("images", f"{found['images']:,}" + (f" ({found['missing']} missing)" if found["missing"] else ""))
    facts.add_row("crops per image", f"{found['crops']}   [dim]{escape(recipe)}[/]")
    facts.add_row("units finished", f"{found['units_finished']} of {found['units']}")
    facts.add_row("size", f"{format_bytes(found['bytes'])} in {found['codec']}, values as {found['values']}")
    if found["bytes_per_crop"] is not None:
        boxes = f"{found['box_bytes_per_crop']:.1f} of them boxes"
        facts.add_row("bytes per crop", f"{found['bytes_per_crop']:.1f} ({boxes})")
        facts.add_row("compression", f"{found['compression']:.2f} x smaller than {UNCOMPRESSED}")
    facts.add_row("temperatures", ", ".join(f"{value:g}" for value in found["temperatures"]))
    console.print(facts)
    reasons = found["missing_rows"]
    for row, reason in list(reasons.items())[:_SHOWN_MISSING]:
        console.print(f"[yellow]missing[/] row {row}: {escape(reason)}", soft_wrap=True, highlight=False)
    if len(reasons) > _SHOWN_MISSING:
        console.print(f"and {len(reasons) - _SHOWN_MISSING:,} more, all in --json FILE")
    console.print(_heads(found))
    if found["sampled_crops"]:
        console.print(_losses(found))
        console.print(_encodings(found))
    for name, head in found["heads"].items():
        if reason := head.get("uninformative"):
            warn_uninformative(name, reason)
    _agreement(found["agreement"])
    if reason := why_no_labels(found):
        console.print(f"no labels to look at: {reason}")
    else:
        console.print(f"[dim]crops looked at: {found['sampled_crops']:,}; KL in nat at temperature 1[/]")


def _agreement(pairs: dict[str, dict[str, float]]) -> None:
    """A line for each two teachers, and what its first figure means."""
    for pair, values in pairs.items():
        same = f", the same class on {100 * values['same_class']:.1f} %" if "same_class" in values else ""
        console.print(f"[dim]agreement[/] {escape(pair)}: mutual information {values['mutual_information']:.2f}{same}")
    if pairs:
        console.print(f"[dim]mutual information {MUTUAL_INFORMATION}[/]")


def _range(value: Any) -> str:
    """`0.25 to 1` for a pair of ends."""
    return " to ".join(format_value(end) for end in value) if isinstance(value, list | tuple) else format_value(value)


def _heads(found: dict[str, Any]) -> Table:
    title = "Teachers (mass: of the k stored; on top: classes that ever were)"
    table = narrow_table(title, "teacher", ["classes", "k", "B/crop", "top-1 p", "mass", "entropy", "on top"])
    for name, head in found["heads"].items():
        labels = ["-"] * 4
        if "mass" in head:
            labels = [f"{head['top1_probability']:.3f}", f"{head['mass']:.4f}", f"{head['entropy_nat']:.2f} nat"]
            labels.append(f"{head['classes_on_top']:,}")
        size_per_crop = "-" if head["bytes_per_crop"] is None else f"{head['bytes_per_crop']:.1f}"
        title = f"{escape(name)}\n[dim not bold]{escape(head['architecture'])}[/]"
        table.add_row(title, f"{head['classes']:,}", str(head["k"]), size_per_crop, *labels)
    return table


def _losses(found: dict[str, Any]) -> Table:
    """Mean KL lost and mass kept by a smaller k."""
    heads = found["heads"]
    largest = max(head["k"] for head in heads.values())
    ks = sorted({k for k in (1, 2, 4, 8, 16, 32, 64, 128, 256, largest) if k <= largest})
    table = narrow_table("KL lost by a smaller k (mass kept)", "teacher", [f"k={k}" for k in ks])
    for name, head in heads.items():
        pairs = zip(head.get("kl_by_k", ()), head.get("mass_by_k", ()), strict=True)
        cells = [f"{lost:.4f}\n[dim]({mass:.3f})[/]" for lost, mass in pairs]
        table.add_row(escape(name), *(cells[k - 1] if k <= len(cells) else "" for k in ks))
    return table


def _encodings(found: dict[str, Any]) -> Table:
    """Size and loss of both encodings of the values, whichever the store has."""
    columns = ["values", "B/crop", "mean KL", "worst KL", "saturated"]
    table = narrow_table("Encodings of these rows", "teacher", columns)
    for row in encoding_rows(found):
        table.add_row(*map(escape, row))
    return table


def _write_page(path: Path, title: str, found: dict[str, Any]) -> None:
    # Imported here: for pages only.
    from repcon.reports import page as report
    from repcon.reports.plot_style import SeriesStyles
    from repcon.reports.sources import Source

    made = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    source = Source(path=path, name=title, kind="store", figures=found)
    sections = tuple(store_sections(found, SeriesStyles(), "store"))
    page = report.Report(title=title, made=made, sources=(source,), sections=sections, notes=())
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, report.html(page))
