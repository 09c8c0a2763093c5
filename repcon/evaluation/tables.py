"""Transfer results for people: a table in the terminal and a plot with intervals."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from repcon.evaluation.intervals import show
from repcon.evaluation.verdict import METRICS
from repcon.runtime.console import console
from repcon.runtime.terminal import printable

TITLES: dict[str, str] = {
    "knn_1": "kNN 1", "knn_5": "kNN 5", "knn_20": "kNN 20", "probe": "probe",
    "shot_1": "1-shot", "shot_5": "5-shot", "shot_10": "10-shot", "finetune": "fine-tuned",
}  # fmt: skip
NAME_COLUMNS, WIDE_COLUMNS = 26, 13
"""Of the terminal: a backbone's name, and a metric whose interval stands beside its mean."""


def table(results: Mapping[str, Any], name: str = "") -> None:
    """Accuracies with 95 % intervals, and below each the paired difference to the baseline.

    name: of the data set where there are several. Four backbones fill a screen of 80 columns and 24 lines; on a wider
    one each interval stands beside its mean.
    """
    baseline = escape(results["baseline"])
    metrics: list[str] = list(next(iter(results["backbones"].values()))["metrics"])
    between = " " if console.width >= NAME_COLUMNS + WIDE_COLUMNS * len(metrics) else "\n"
    where = f"Transfer to {name}" if name else "Transfer"
    grid = Table(
        title=f"{where}: % of {results['test_images']:,} test images of {results['classes']} classes, 95 % intervals",
        title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), collapse_padding=True,
    )  # fmt: skip
    grid.add_column("backbone", style="bold", overflow="fold")
    for metric in metrics:
        grid.add_column(TITLES[metric], justify="right", no_wrap=True)
    for name, backbone in results["backbones"].items():
        values = [show(backbone["metrics"][metric]).replace(" ± ", f"{between}± ") for metric in metrics]
        grid.add_row(escape(name), *values)
        if name in results["differences"]:
            difference = results["differences"][name]
            cells = [_difference(difference[metric], between) for metric in metrics]
            grid.add_row(Text(f"  - {results['baseline']}", style="dim not bold"), *cells)
    console.print(grid)
    console.print(f"[dim]- {baseline}: paired difference in points, * where an exact paired test gives p < 0.05[/]")
    if short := [name for name, backbone in results["backbones"].items() if not backbone.get("probe_converged", True)]:
        names = escape(", ".join(short))
        console.print(f"[dim]the probe of {names} stopped before it converged: a little more regularised than asked[/]")


def summary(results: Mapping[str, Any]) -> None:
    """A row per backbone, a column per data set and one for their mean, by the metric of the verdict."""
    metric = results["verdict"].get("metric")
    if not metric:
        return
    columns = {name: one["backbones"] for name, one in results["datasets"].items()} | {
        "mean": results["mean"]["backbones"]
    }
    title = (
        f"{METRICS[metric][0].upper()}{METRICS[metric][1:]} on {len(results['datasets'])} data sets: %, 95 % intervals"
    )
    grid = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), collapse_padding=True)
    grid.add_column("backbone", style="bold", overflow="fold")
    for name in columns:
        grid.add_column(escape(name), justify="right", overflow="fold")
    for name in results["mean"]["backbones"]:
        cells = [show(backbones[name]["metrics"][metric]) for backbones in columns.values()]
        grid.add_row(escape(name), *cells, style="bold green" if name == results["verdict"]["subject"] else "")
    console.print(grid)


def heads(measured: Sequence[Mapping[str, Any]]) -> None:
    """A row per head: its accuracy, its teacher's, and the paired difference; nothing where none was measured."""
    if not measured:
        return
    grid = Table(
        title="Heads beside their teachers: % right of labelled images, 95 % intervals", title_justify="left",
        box=SIMPLE_HEAD, padding=(0, 1, 0, 0), collapse_padding=True,
    )  # fmt: skip
    grid.add_column("head", style="bold", overflow="fold")
    for title in ("images", "teacher", "head", "difference"):
        grid.add_column(title, justify="right")
    several = len({row["student"] for row in measured}) > 1
    for row in measured:
        name = f"{row['head']} of {row['student']}" if several else row["head"]
        accuracies = (show(row["teacher_accuracy"]), show(row["head_accuracy"]))
        images = f"{row['images']:,}{'' if row['held_out'] else ' *'}"
        grid.add_row(escape(name), images, *accuracies, _difference(row["difference"], " "))
    console.print(grid)
    if not all(row["held_out"] for row in measured):
        console.print("[dim]* not known to be held out: a teacher is flattered on images that it was trained on[/]")


def verdict(found: Mapping[str, Any]) -> None:
    """The last line of an evaluation, and before it how each data set came out."""
    for key, style in (("details", ""), ("sentence", "bold")):
        if key in found:
            console.print(Text(found[key], style=style), highlight=False, soft_wrap=True)


def _difference(interval: Mapping[str, float], between: str) -> Text:
    """Starred, green or red, only where the interval leaves zero out."""
    colour = "green" if interval["low"] > 0 else "red" if interval["high"] < 0 else "dim"
    mean, _, rest = show(interval, signed=True).partition(" ± ")
    return Text(f"{mean}{'' if colour == 'dim' else '*'}{between}± {rest}", style=colour)


@rc_context({"text.parse_math": False})  # a backbone's name is no formula
def plot(results: Mapping[str, Any], path: Path) -> None:
    """Two panels as SVG: accuracy per metric and backbone, and the paired difference to the baseline."""
    backbones = results["backbones"]
    metrics: list[str] = list(next(iter(backbones.values()))["metrics"])
    figure = Figure(figsize=(max(4.4, 1.6 + 1.3 * len(metrics)), 5.6 + 0.22 * len(backbones)), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    for place, name in enumerate(backbones):
        offset = (place - (len(backbones) - 1) / 2) * 0.8 / len(backbones)
        look = {"color": f"C{place % 10}", "fmt": "os^Dv"[place % 5], "label": printable(name)}
        _points(above, [backbones[name]["metrics"][metric] for metric in metrics], offset, look)
        if name in results["differences"]:
            _points(below, [results["differences"][name][metric] for metric in metrics], offset, look)
    above.set_ylabel("accuracy (%)")
    below.axhline(0, color="0.4", linewidth=0.8)
    below.set_ylabel(f"points over {printable(results['baseline'])}")
    below.set_xticks(range(len(metrics)), [TITLES[metric] for metric in metrics])
    for axes in (above, below):
        axes.grid(axis="y", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*above.get_legend_handles_labels(), loc="outside upper left", frameon=False)
    figure.savefig(path, metadata={"Date": None})


def _points(axes: Any, values: list[Mapping[str, float]], offset: float, look: Mapping[str, Any]) -> None:
    means = [value["mean"] for value in values]
    errors = [
        [value["mean"] - value["low"] for value in values],
        [value["high"] - value["mean"] for value in values],
    ]
    places = [place + offset for place in range(len(values))]
    axes.errorbar(places, means, yerr=errors, markersize=4, capsize=2, **look)
