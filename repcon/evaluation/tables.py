"""Transfer results as tables in the terminal, which read at 80 columns."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.markup import escape
from rich.text import Text

from repcon.evaluation.intervals import plus_minus
from repcon.evaluation.results import COLUMN_TITLES, VERDICT_METRICS
from repcon.runtime.console import console, narrow_table, warn

NAME_COLUMNS, WIDE_COLUMNS = 26, 13
"""Of the terminal: a backbone's name, and a column with each interval next to its mean."""


def show(total: Mapping[str, Any], results: Mapping[str, Mapping[str, Any]]) -> None:
    """Every table, that over all data sets last.

    total: the results of `repcon evaluate`; results: those of each data set.
    """
    for number, (name, one) in enumerate(results.items()):
        if not number:
            _note_sizes(one["backbones"])
        shown = name if len(results) > 1 else ""
        _note_left_out(one, shown)
        table(one, shown)
    heads(total.get("heads", ()))
    if len(results) > 1:
        summary(total)


def _note_left_out(results: Mapping[str, Any], name: str) -> None:
    """Which classes and shots were left out of a data set."""
    where = f"{name}: " if name else ""
    if results["left_out"]:
        console.print(f"{where}left out, with one image each: {escape(', '.join(results['left_out']))}")
    if results["shots_left_out"]:
        shots = ", ".join(f"{count}-shot" for count in results["shots_left_out"])
        smallest, count = results["smallest_class"]
        console.print(f"{where}left out: {shots}; the class {escape(smallest)} has {count} to train on")


def _note_sizes(backbones: Mapping[str, Mapping[str, Any]]) -> None:
    """The input size of each backbone, where they differ."""
    sizes = {name: held["input_size"] for name, held in backbones.items()}
    if len({tuple(size) for size in sizes.values()}) > 1:
        listed = ", ".join(f"{name} {' + '.join(map(str, size))}" for name, size in sizes.items())
        what = f"each backbone at its own input size, in pixels: {listed}; `size` takes one for all"
        warn(what, "note")


def table(results: Mapping[str, Any], name: str = "") -> None:
    """Accuracies with 95 % intervals, and below each the paired difference to the baseline.

    name: of the data set where there are several. Where the terminal is narrow, each interval stands below its mean.
    """
    baseline = results["baseline"]
    metrics: list[str] = list(next(iter(results["backbones"].values()))["metrics"])
    between = _between(len(metrics))
    where = f"Transfer to {name}" if name else "Transfer"
    title = f"{where}: % of {results['test_images']:,} test images of {results['classes']} classes, 95 % intervals"
    grid = narrow_table(title, "backbone", [COLUMN_TITLES[metric] for metric in metrics])
    for name, backbone in results["backbones"].items():
        grid.add_row(escape(name), *(_interval(backbone["metrics"][metric], between) for metric in metrics))
        if name in results["differences"]:
            difference = results["differences"][name]
            cells = [_difference(difference[metric], between) for metric in metrics]
            grid.add_row(Text(f"  - {baseline}", style="dim not bold"), *cells)
    console.print(grid)
    note = f"- {baseline}: paired difference in points, * where an exact paired test gives p < 0.05"
    console.print(f"[dim]{escape(note)}[/]")
    if short := [name for name, backbone in results["backbones"].items() if not backbone.get("probe_converged", True)]:
        names = escape(", ".join(short))
        console.print(f"[dim]the probe of {names} stopped before it converged: a little more regularised than asked[/]")


def summary(results: Mapping[str, Any]) -> None:
    """A row per backbone, a column per data set and one for their mean, by the metric of the verdict."""
    metric = results["verdict"].get("metric")
    if not metric:
        return
    what = VERDICT_METRICS[metric]
    columns = {name: one["backbones"] for name, one in results["datasets"].items()}
    columns["mean"] = results["mean"]["backbones"]
    title = f"{what[0].upper()}{what[1:]} on {len(columns) - 1} data sets: %, 95 % intervals"
    grid = narrow_table(title, "backbone", list(columns))
    between = _between(len(columns))
    for name in results["mean"]["backbones"]:
        cells = [_interval(backbones[name]["metrics"][metric], between) for backbones in columns.values()]
        grid.add_row(escape(name), *cells, style="bold green" if name == results["verdict"]["subject"] else "")
    console.print(grid)


def heads(measured: Sequence[Mapping[str, Any]]) -> None:
    """A row per head: its accuracy, its teacher's, and the paired difference; nothing where none was measured."""
    if not measured:
        return
    title = "Heads beside their teachers: % right of labelled images, 95 % intervals"
    grid = narrow_table(title, "head", ["images", "teacher", "head", "difference"])
    several = len({row["student"] for row in measured}) > 1
    for row in measured:
        name = f"{row['head']} of {row['student']}" if several else row["head"]
        accuracies = (_interval(row[key], " ") for key in ("teacher_accuracy", "head_accuracy"))
        images = f"{row['images']:,}{'' if row['held_out'] else ' *'}"
        grid.add_row(escape(name), images, *accuracies, _difference(row["difference"], " "))
    console.print(grid)
    if not all(row["held_out"] for row in measured):
        console.print("[dim]* not known to be held out: a teacher is flattered on images that it was trained on[/]")


def _between(columns: int) -> str:
    """What stands between mean and interval so that `columns` of them fit."""
    return " " if console.width >= NAME_COLUMNS + WIDE_COLUMNS * columns else "\n"


def _interval(interval: Mapping[str, float], between: str) -> str:
    mean, _, half = plus_minus(interval).partition(" ± ")
    return f"{mean}{between}± {half}"


def verdict(found: Mapping[str, Any]) -> None:
    """The last line of an evaluation, and before it how each data set came out."""
    for key, style in (("details", ""), ("sentence", "bold")):
        if key in found:
            console.print(Text(found[key], style=style), highlight=False, soft_wrap=True)


def _difference(interval: Mapping[str, float], between: str) -> Text:
    """Starred, green or red, only where the interval leaves zero out."""
    colour = "green" if interval["low"] > 0 else "red" if interval["high"] < 0 else "dim"
    mean, _, half = plus_minus(interval, signed=True).partition(" ± ")
    return Text(f"{mean}{'' if colour == 'dim' else '*'}{between}± {half}", style=colour)
