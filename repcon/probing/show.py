"""Transfer results for people: a table in the terminal and a plot with intervals."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.table import Table

from repcon.probing.intervals import show
from repcon.record import console

TITLES: dict[str, str] = {
    "knn_1": "kNN 1", "knn_5": "kNN 5", "knn_20": "kNN 20", "probe": "probe",
    "shot_1": "1-shot", "shot_5": "5-shot", "shot_10": "10-shot", "finetune": "fine-tuned",
}  # fmt: skip


def table(results: Mapping[str, Any]) -> None:
    """Accuracies with 95 % intervals, and below each the paired difference to the baseline."""
    metrics: list[str] = list(next(iter(results["trunks"].values()))["metrics"])
    grid = Table(
        title=f"Transfer, % of {results['test_images']:,} test images of {results['classes']} classes "
        f"(95 % intervals; differences to {results['baseline']}, paired)"
    )
    grid.add_column("trunk", style="bold", overflow="fold")
    for metric in metrics:
        grid.add_column(TITLES[metric], justify="right", no_wrap=True)
    for name, trunk in results["trunks"].items():
        grid.add_row(name, *(_narrow(trunk["metrics"][metric]) for metric in metrics))
        if name in results["differences"]:
            difference = results["differences"][name]
            grid.add_row(f"[dim]- {results['baseline']}[/]", *(_colour(difference[metric]) for metric in metrics))
        grid.add_section()
    console.print(grid)


def _colour(difference: Mapping[str, float]) -> str:
    """Green or red only where the interval leaves zero out."""
    colour = "green" if difference["low"] > 0 else "red" if difference["high"] < 0 else "dim"
    return f"[{colour}]{_narrow(difference, signed=True)}[/]"


def _narrow(interval: Mapping[str, float], *, signed: bool = False) -> str:
    """The interval below the mean, so that seven metrics fit a terminal of 80 columns."""
    return show(interval, signed=signed).replace(" ± ", "\n± ")


def plot(results: Mapping[str, Any], path: Path) -> None:
    """Two panels as SVG: accuracy per metric and trunk, and the paired difference to the baseline."""
    trunks = results["trunks"]
    metrics: list[str] = list(next(iter(trunks.values()))["metrics"])
    figure = Figure(figsize=(1.6 + 1.3 * len(metrics), 6.4), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    for place, name in enumerate(trunks):
        offset = (place - (len(trunks) - 1) / 2) * 0.8 / len(trunks)
        _points(above, [trunks[name]["metrics"][metric] for metric in metrics], offset, f"C{place % 10}", name)
        if name in results["differences"]:
            _points(below, [results["differences"][name][metric] for metric in metrics], offset, f"C{place % 10}", name)
    above.set_ylabel("accuracy (%)")
    below.axhline(0, color="0.4", linewidth=0.8)
    below.set_ylabel(f"points over {results['baseline']}")
    below.set_xticks(range(len(metrics)), [TITLES[metric] for metric in metrics])
    for axes in (above, below):
        axes.grid(axis="y", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*above.get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
    figure.savefig(path, metadata={"Date": None})


def _points(axes: Any, values: list[Mapping[str, float]], offset: float, colour: str, label: str) -> None:
    means = [value["mean"] for value in values]
    errors = [
        [value["mean"] - value["low"] for value in values],
        [value["high"] - value["mean"] for value in values],
    ]
    places = [place + offset for place in range(len(values))]
    axes.errorbar(places, means, yerr=errors, fmt="o", markersize=4, capsize=2, color=colour, label=label)
