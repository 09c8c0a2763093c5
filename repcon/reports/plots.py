"""The report's plots: lines, intervals and bars. Each takes plain numbers and gives one SVG element (`plot_style`).

Labels are data: shown as they are, never as markup or formulas.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from repcon.reports.figures import Interval
from repcon.reports.plot_style import INK, MUTED, SERIES, SeriesStyles, styled, svg
from repcon.runtime.text import printable

WIDTH, WIDE = 4.4, 9.2
"""Inches: one of two plots in a row, and one that takes the page's width."""
BINS = 160
"""Points of a line: means of equal parts of what was logged, with their range shaded behind."""
LEAST = 1e-9
"""Least value on a logarithmic axis; below it lies the rounding of sums."""
MOST_LINES, MOST_ROWS, MOST_PANELS = 40, 60, 16
"""Lines, rows and panels of one plot; of more, the first are shown."""
PANELS_PER_ROW = 4
INTEGER_AXES = ("epoch", "step", "k")
"""x axes whose ticks are whole numbers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plot:
    """One picture, also written as a file called `name`.svg."""

    name: str
    """Unique in a report."""
    title: str
    svg: str
    wide: bool = False
    """Whether it takes the page's width."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """One bar; `limit` is where a line is drawn across it, NaN for none."""

    label: str
    value: float
    low: float = math.nan
    high: float = math.nan
    limit: float = math.nan


Line = tuple[Sequence[float], Sequence[float]]
"""x and y of equal length."""


def lines(
    name: str, title: str, series: Mapping[str, Line], x: str, y: str, *, styles: SeriesStyles | None = None,
    points: bool = False, from_zero: bool = False, reaching: float = 0.0, log: bool = False, log_x: bool = False,
    spreads: Mapping[str, Sequence[float]] | None = None,
) -> Plot:  # fmt: skip
    """A line per series over a shared x.

    points: mark every value. from_zero: y begins at 0 and reaches at least `reaching`, so that noise about nothing
    looks like nothing. log, log_x: logarithmic axes. spreads: lengths of whiskers to both sides, by series.
    """
    styles = styles or SeriesStyles()
    series, title = first(series, MOST_LINES, title)
    rows = math.ceil(len(series) / _legend_columns([_short(label) for label in series]))
    with styled(name):
        figure, axes = _figure(WIDTH, 2.4 + 0.17 * max(rows, 2))
        for label, (xs, ys) in series.items():
            style = styles[label]
            centre, mean, low, high = binned(xs, [y if y > LEAST or not log else math.nan for y in ys], BINS)
            look: dict[str, Any] = {"color": style.color, "linestyle": style.dash}
            if points or len(centre) == 1:
                look |= {"marker": style.marker, "markersize": 4}
            elif np.any(low < high):
                axes.fill_between(centre, low, high, color=style.color, alpha=0.16, linewidth=0)
            axes.plot(centre, mean, label=_short(label), **look)
            if spreads and label in spreads:
                axes.errorbar(xs, ys, yerr=spreads[label], fmt="none", elinewidth=1.2, color=style.color)
        axes.set(xlabel=x, ylabel=y, yscale="log" if log else "linear")
        _x_ticks(axes, x, sorted({at for xs, _ in series.values() for at in xs}), log=log_x)
        if log:
            axes.yaxis.set_major_formatter(lambda value, place: f"{value:g}")
            axes.yaxis.set_minor_formatter(lambda value, place: "")
        if from_zero:
            axes.set_ylim(bottom=0, top=max(1.04 * axes.get_ylim()[1], reaching))
        axes.margins(x=0.02)
        _legend(figure, axes)
        return _plot(figure, name, title, f"{y} over {x}, {', '.join(series)}")


def _x_ticks(axes: Any, x: str, values: Sequence[float], *, log: bool) -> None:
    axes.xaxis.get_major_locator().set_params(integer=x in INTEGER_AXES)
    if log and values[0] > 0 and values[-1] > 8 * values[0]:
        axes.set_xscale("log", base=2)
        axes.set_xticks(values, [f"{value:,g}" for value in values])
        axes.xaxis.set_minor_formatter(lambda value, place: "")
    elif x in INTEGER_AXES and len(values) == 1:
        axes.set_xticks(values)


def binned(xs: Sequence[float], ys: Sequence[float], bins: int) -> tuple[np.ndarray, ...]:
    """Positions, means, least and greatest values of at most `bins` equal runs of points; non-finite points are left
    out."""
    x, y = np.asarray(xs, np.float64), np.asarray(ys, np.float64)
    kept = np.isfinite(x) & np.isfinite(y)
    x, y = x[kept], y[kept]
    parts = [part for part in np.array_split(np.arange(len(x)), min(bins, max(len(x), 1))) if len(part)]
    means = np.array([[x[part].mean(), y[part].mean(), y[part].min(), y[part].max()] for part in parts])
    return tuple(means.reshape(-1, 4).T)


def intervals(
    name: str, title: str, groups: Mapping[str, Mapping[str, Interval]], labels: Sequence[str], x: str, *,
    styles: SeriesStyles | None = None, zero: bool = False,
) -> Plot:  # fmt: skip
    """Points with whiskers: a panel per group, in it a row per label. Labels that no group has get no row.

    styles: the look of each label; labels without a value take theirs too. zero: draw a line at 0.
    """
    styles = styles or SeriesStyles()
    looks = {label: styles[label] for label in labels}
    groups, title = first(groups, MOST_PANELS, title)
    present = {label: looks[label] for label in labels if any(label in group for group in groups.values())}
    present, title = first(present, MOST_ROWS, title)
    columns = max(1, min(PANELS_PER_ROW, len(groups)))
    rows = max(1, math.ceil(len(groups) / columns))
    wide = columns > 2
    with styled(name):
        figure, grid = _figure(WIDE if wide else WIDTH, 0.5 + rows * (0.55 + 0.19 * len(present)), rows, columns)
        for axes, (group, values) in zip(grid.flat, groups.items(), strict=False):
            for place, (label, style) in enumerate(present.items()):
                if label in values:
                    _whiskers(axes, values[label], place, style.color, style.marker)
            _rows(axes, list(present))
            axes.set_title(_short(group) if len(groups) > 1 else "")
            if zero:
                axes.axvline(0, color=INK, linewidth=0.8)
        for axes in grid.flat[len(groups) :]:
            axes.set_visible(False)
        for axes in grid[:, 1:].flat:
            axes.set_yticklabels([])
        for axes in grid[-1]:
            axes.set_xlabel(x)
        return _plot(figure, name, title, f"{x} with intervals, {', '.join(present)}", wide=wide)


def _whiskers(axes: Any, value: Interval, place: int, color: str, marker: str) -> None:
    """One value; a bound that is not finite gets no whisker."""
    lengths = (value.mean - value.low, value.high - value.mean)
    below, above = (length if math.isfinite(length) and length > 0 else 0.0 for length in lengths)
    axes.errorbar(value.mean, place, xerr=[[below], [above]], fmt=marker, markersize=4.5, elinewidth=1.5, color=color)


def bars(name: str, title: str, rows: Sequence[Bar], x: str) -> Plot:
    """Horizontal bars with their values beside them, whiskers where known, and each one's limit as a line across."""
    rows = [row for row in rows if math.isfinite(row.value)][:MOST_ROWS]
    ends = [0.0, *(end for row in rows for end in (row.value, row.low, row.high, row.limit))]
    ends = [end for end in ends if math.isfinite(end)]
    with styled(name):
        figure, axes = _figure(WIDTH, 0.75 + 0.22 * len(rows))
        axes.barh(range(len(rows)), [row.value for row in rows], height=0.62, color=SERIES[0], alpha=0.85, linewidth=0)
        for place, row in enumerate(rows):
            if math.isfinite(row.low) and math.isfinite(row.high):
                axes.plot([row.low, row.high], [place, place], color=INK, linewidth=1.1)
            if math.isfinite(row.limit):
                axes.plot([row.limit, row.limit], [place - 0.42, place + 0.42], color=SERIES[1], linewidth=1.8)
            beside = {"xycoords": ("axes fraction", "data"), "va": "center", "fontsize": 8}
            axes.annotate(f"{row.value:.3g}", (1.02, place), **beside)
        _rows(axes, [row.label for row in rows])
        axes.set(xlim=(min(ends), 1.04 * max(ends) or 1.0), xlabel=x)
        return _plot(figure, name, title, f"{x}, " + ", ".join(f"{row.label} {row.value:.3g}" for row in rows))


def first(held: Mapping[str, Any], most: int, title: str) -> tuple[Mapping[str, Any], str]:
    """The first `most` entries, and a title that says so where there are more."""
    if len(held) <= most:
        return held, title
    return dict(list(held.items())[:most]), f"{title} (the first {most} of {len(held):,})"


def _figure(width: float, height: float, rows: int = 0, columns: int = 0) -> tuple[Any, Any]:
    """A figure with one pair of axes, or with an array (rows, columns) of them."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False) if rows else figure.subplots()


def _rows(axes: Any, labels: Sequence[str]) -> None:
    """Named rows from top to bottom, without horizontal grid lines."""
    axes.set_yticks(range(len(labels)), [_short(label) for label in labels])
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)
    axes.set_ylim(len(labels) - 0.45, -0.55)


def _legend(figure: Any, axes: Any) -> None:
    """Below the plot, where there is more than one series."""
    handles, labels = axes.get_legend_handles_labels()
    if len(labels) > 1:
        figure.legend(
            handles, labels, loc="outside lower left", ncols=_legend_columns(labels), labelcolor=INK, handlelength=2.4,
            columnspacing=1.2, borderaxespad=0,
        )  # fmt: skip


def _plot(figure: Any, name: str, title: str, description: str, *, wide: bool = False) -> Plot:
    figure.suptitle(_short(title, 60), x=0.01, ha="left", fontsize=9, fontweight="bold")
    for axes in figure.axes:
        axes.spines["bottom"].set_color(MUTED)
    return Plot(name=name, title=title, svg=svg(figure, printable(f"{title}: {description}")), wide=wide)


def _legend_columns(labels: Sequence[str]) -> int:
    """Columns in which a legend of these labels fits under a plot."""
    longest = max(map(len, labels), default=0)
    return 1 if longest > 26 else 2 if longest > 14 else 3


def _short(label: str, longest: int = 34) -> str:
    """Long names keep their beginning and their end."""
    label = " ".join(printable(label).split())
    return label if len(label) <= longest else f"{label[: longest // 2]}…{label[-(longest // 2 - 1) :]}"
