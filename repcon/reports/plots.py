"""The report's plots. Each takes plain numbers and gives a picture, one SVG element (see `plot_style`), small enough to
stand beside another on a desk and alone on a phone. Labels are data: shown as they are, never as markup or formulas."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from repcon.reports.plot_style import DASHES, GRID, INK, MARKERS, MUTED, SERIES, styled, svg
from repcon.runtime.terminal import printable

WIDTH = 4.4
"""Inches; a plot is shown at the width of its column."""
BINS = 160
"""Points that a line keeps: means of equal parts of what was logged, with their range shaded behind."""

LEAST = 1e-9
"""What a logarithmic axis shows; below it lies the rounding of sums."""

MOST_LINES, MOST_ROWS, MOST_SERIES = 40, 60, 16
"""Lines, rows, and points in a row, that one plot shows; of more, the first."""

COUNTS = ("epoch", "step", "k")
"""Axes on which there is nothing between two whole numbers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plot:
    """One picture, also written as a file called `name`.svg."""

    name: str
    title: str
    svg: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """One measured value and how far it may be off."""

    mean: float
    low: float
    high: float
    repeats: int = 0
    """Measurements that it comes from, where that was told."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """One bar; `limit` is where a line is drawn across it, NaN for none."""

    label: str
    value: float
    low: float = math.nan
    high: float = math.nan
    limit: float = math.nan


Line = tuple[Sequence[float], Sequence[float]]


def lines(
    name: str, title: str, series: Mapping[str, Line], x: str, y: str, *,
    places: Mapping[str, int] | None = None, points: bool = False, from_zero: bool = False, reaching: float = 0.0,
    log: bool = False, log_x: bool = False, spreads: Mapping[str, Sequence[float]] | None = None,
) -> Plot:  # fmt: skip
    """A line per series over a shared x. `places` fixes colours across plots; `points` marks every value; y reaches
    `reaching` at least, so that noise about nothing looks like nothing; a `log` axis shows what is more than rounding;
    `spreads` are whiskers' lengths to both sides, of the series that have any.
    """
    series, title = first(series, MOST_LINES, title)
    rows = -(-len(series) // _columns([_short(label) for label in series], 3))
    figure, axes = _figure(2.4 + 0.17 * max(rows, 2))
    with styled():
        for number, (label, (xs, ys)) in enumerate(series.items()):
            place = (places or {}).get(label, number)
            look: dict[str, Any] = {"color": SERIES[place % 8], "linestyle": DASHES[place // 8 % 4]}
            centre, mean, low, high = binned(xs, [y if y > LEAST or not log else math.nan for y in ys], BINS)
            if points or len(centre) == 1:
                look |= {"marker": MARKERS[place % 8], "markersize": 4}
            elif np.any(low < high):
                axes.fill_between(centre, low, high, color=look["color"], alpha=0.16, linewidth=0)
            axes.plot(centre, mean, label=_short(label), **look)
            if spreads and label in spreads:
                axes.errorbar(xs, ys, yerr=spreads[label], fmt="none", elinewidth=1.2, color=look["color"])
        axes.set(xlabel=x, ylabel=y, yscale="log" if log else "linear")
        axes.xaxis.get_major_locator().set_params(integer=x in COUNTS)
        every = sorted({at for xs, _ in series.values() for at in xs})
        if log_x and every[0] > 0 and every[-1] > 8 * every[0]:
            axes.set_xscale("log", base=2)
            axes.set_xticks(every, [f"{at:,g}" for at in every])
            axes.xaxis.set_minor_formatter(lambda value, place: "")
        if log:
            axes.yaxis.set_major_formatter(lambda value, place: f"{value:g}")
            axes.yaxis.set_minor_formatter(lambda value, place: "")
        if from_zero:
            axes.set_ylim(bottom=0, top=max(1.04 * axes.get_ylim()[1], reaching))
        axes.margins(x=0.02)
        if x in COUNTS and len(every) == 1:
            axes.set_xticks(every)
        _finish(figure, axes, title, max(len(series), len(places or ())))
        return _plot(figure, name, title, f"{y} over {x}, {', '.join(series)}")


def binned(xs: Sequence[float], ys: Sequence[float], bins: int) -> tuple[np.ndarray, ...]:
    """Positions, means, least and greatest values of at most `bins` equal runs of points; what is not finite goes."""
    x, y = np.asarray(xs, np.float64), np.asarray(ys, np.float64)
    kept = np.isfinite(x) & np.isfinite(y)
    x, y = x[kept], y[kept]
    parts = [part for part in np.array_split(np.arange(len(x)), min(bins, max(len(x), 1))) if len(part)]
    means = np.array([[x[part].mean(), y[part].mean(), y[part].min(), y[part].max()] for part in parts])
    return tuple(means.reshape(-1, 4).T)


def intervals(
    name: str, title: str, groups: Mapping[str, Mapping[str, Interval]], labels: Sequence[str], x: str, *,
    zero: bool = False,
) -> Plot:  # fmt: skip
    """Points with whiskers: a row per group, in it a point per series. `labels` are the series in the order of their
    colours; one that no group has is not drawn, so that a series keeps its colour from plot to plot."""
    labels = labels[:MOST_SERIES]
    groups, title = first(groups, MOST_ROWS, title)
    figure, axes = _figure(1.0 + 0.17 * len(groups) * (len(labels) + 1) + 0.17 * len(labels))
    with styled():
        for number, label in enumerate(labels):
            offset = (number - (len(labels) - 1) / 2) * 0.8 / len(labels)
            held = [(place + offset, group[label]) for place, group in enumerate(groups.values()) if label in group]
            if not held:
                continue
            axes.errorbar(
                [value.mean for _, value in held], [place for place, _ in held],
                xerr=np.array([_whiskers(value) for _, value in held]).T,
                fmt=MARKERS[number % 8], markersize=4.5, capsize=0, elinewidth=1.5, color=SERIES[number % 8],
                label=_short(label),
            )  # fmt: skip
        if zero:
            axes.axvline(0, color=INK, linewidth=0.8)
        for edge in range(1, len(groups)):
            axes.axhline(edge - 0.5, color=GRID, linewidth=0.6)
        axes.set_yticks(range(len(groups)), [_short(group) for group in groups])
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="y", visible=False)
        axes.set_ylim(len(groups) - 0.5, -0.5)
        axes.set_xlabel(x)
        _finish(figure, axes, title, len(labels), columns=2)
        return _plot(figure, name, title, f"{x} with intervals, {', '.join(labels)}")


def _whiskers(value: Interval) -> tuple[float, float]:
    """Lengths to both sides; an interval without bounds gets none."""
    below, above = value.mean - value.low, value.high - value.mean
    return tuple(length if math.isfinite(length) and length > 0 else 0.0 for length in (below, above))  # type: ignore[return-value]


def bars(name: str, title: str, rows: Sequence[Bar], x: str) -> Plot:
    """Horizontal bars with their values beside them, whiskers where known, and each one's limit as a line across."""
    rows = [row for row in rows if math.isfinite(row.value)][:MOST_ROWS]
    figure, axes = _figure(0.75 + 0.22 * len(rows))
    with styled():
        values = [row.value for row in rows]
        reached = [0.0, *(end for row in rows for end in (row.value, row.low, row.high, row.limit))]
        reached = [end for end in reached if math.isfinite(end)]
        axes.barh(range(len(rows)), values, height=0.62, color=SERIES[0], alpha=0.85, linewidth=0)
        for place, row in enumerate(rows):
            if math.isfinite(row.low) and math.isfinite(row.high):
                axes.plot([row.low, row.high], [place, place], color=INK, linewidth=1.1)
            if math.isfinite(row.limit):
                axes.plot([row.limit, row.limit], [place - 0.42, place + 0.42], color=SERIES[1], linewidth=1.8)
            axes.annotate(
                f"{row.value:.3g}", (1.02, place), xycoords=("axes fraction", "data"), va="center", fontsize=8
            )
        axes.set_yticks(range(len(rows)), [_short(row.label) for row in rows])
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="y", visible=False)
        axes.set(ylim=(len(rows) - 0.45, -0.55), xlim=(min(reached), 1.04 * max(reached) or 1.0), xlabel=x)
        _finish(figure, axes, title, 1)
        return _plot(figure, name, title, f"{x}, " + ", ".join(f"{row.label} {row.value:.3g}" for row in rows))


def first(held: Mapping[str, Any], most: int, title: str) -> tuple[Mapping[str, Any], str]:
    """The first `most` entries, and a title that says so where there are more."""
    if len(held) <= most:
        return held, title
    return dict(list(held.items())[:most]), f"{title} (the first {most} of {len(held):,})"


def _figure(height: float) -> tuple[Any, Any]:
    with styled():
        from matplotlib.figure import Figure

        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        return figure, figure.subplots()


def _finish(figure: Any, axes: Any, title: str, series: int, columns: int = 3) -> None:
    figure.suptitle(_short(title, 60), x=0.01, ha="left", fontsize=9, fontweight="bold")
    if series > 1:
        handles, labels = axes.get_legend_handles_labels()
        columns = _columns(labels, columns)
        figure.legend(
            handles, labels, loc="outside lower left", ncols=columns, labelcolor=INK, handlelength=1.8,
            columnspacing=1.2, borderaxespad=0,
        )  # fmt: skip
    axes.spines["bottom"].set_color(MUTED)


def _plot(figure: Any, name: str, title: str, description: str) -> Plot:
    return Plot(name=name, title=title, svg=svg(figure, name, printable(f"{title}: {description}")))


def _columns(labels: Sequence[str], most: int) -> int:
    """Columns in which a legend of these labels fits under a plot."""
    longest = max(map(len, labels), default=0)
    return 1 if longest > 26 else 2 if longest > 14 else most


def _short(label: str, longest: int = 34) -> str:
    """Long names keep their beginning and their end."""
    label = " ".join(printable(label).split())
    return label if len(label) <= longest else f"{label[: longest // 2]}…{label[-(longest // 2 - 1) :]}"
