"""The report's sections on benchmark records: ratios as bars with their limits, scaling as lines, gains with intervals,
and every figure in a table."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from repcon.evaluation.results import METRICS
from repcon.reports import plots
from repcon.reports.figure_names import label_of, record_figures
from repcon.reports.figures import Figure, Figures, Interval, Unit, is_number
from repcon.reports.plot_style import SeriesStyle, SeriesStyles
from repcon.reports.plots import Bar, Plot
from repcon.reports.sections.records import Targets, describe, figure_table, record_title, targets_of
from repcon.reports.sources import Source
from repcon.reports.tables import Section

BARS_PER_PLOT = 24
FAMILY = 3
"""Ratios to one peer from which on they get a plot of their own."""
MOST_PLOTS = 20
"""Plots of one kind that a record gets."""
LEAST_POINTS = 3
"""Points that make a line."""
ACCURACY = "accuracy (%)"
RATIOS = (
    "Ratios measured in one run; the line across a bar is what it should reach, or its limit or peer. Ranges in "
    "brackets are 20 to 80 % of the repeats, or 95 % intervals where no number of repeats is named."
)
_NUMBERED = re.compile(r"((?:.*_)?)(?:([a-z]+)([0-9]+)|([0-9]+)_([a-z]+))(_.*)?")
"""`probe_k4_minus_online` or `memory_1000_images_bytes`: what stands before the number, the number, and after it."""


def record_section(source: Source, number: int) -> Section:
    """The section of one record. Its plots are called `bench<number>-...`."""
    targets, figures = targets_of(source), record_figures(source.figures)
    parts = [
        (title, bars[start : start + BARS_PER_PLOT])
        for title, bars in _ratio_families(figures, targets).items()
        for start in range(0, len(bars), BARS_PER_PLOT)
    ][:MOST_PLOTS]
    drawn = [plots.bars(f"bench{number}-{part}", title, rows, "ratio") for part, (title, rows) in enumerate(parts)]
    drawn += [found.plot(f"bench{number}-line{part}") for part, found in enumerate(_scaling(figures)[:MOST_PLOTS])]
    drawn += _gains(figures, number)
    lead = " ".join(part for part in (describe(source), RATIOS if parts else "") if part)
    return Section(title=record_title(source), lead=lead, plots=tuple(drawn), tables=(figure_table(source),))


def _ratio_families(figures: Figures, targets: Targets) -> dict[str, list[Bar]]:
    """{title: bars}: ratios to one peer in one plot, those of a peer with few of them together."""
    by_peer: dict[str, list[Bar]] = {}
    for name, figure in figures.items():
        if bar := _bar(figure, figures, targets):
            by_peer.setdefault(name.rpartition("over_")[2], []).append(bar)
    families: dict[str, list[Bar]] = {}
    for peer, bars in by_peer.items():
        over = label_of(peer)
        if len(bars) < FAMILY:
            families.setdefault("Ratios", []).extend(bars)
        else:
            families[f"Over {over}"] = [replace(bar, label=bar.label.removesuffix(f" over {over}")) for bar in bars]
    return families


def _bar(figure: Figure, figures: Figures, targets: Targets) -> Bar | None:
    """`this_over_that` and `over_that` are ratios; their limit is 1, or what the targets or `..._limit` say."""
    if "over" not in figure.name.split("_")[:-1] or figure.name.endswith("_limit"):
        return None
    named = figures.get(f"{figure.name}_limit")
    limit = targets[figure.name][1] if figure.name in targets else named.value if named else 1.0
    limit = float(limit) if is_number(limit) else 1.0
    value = figure.value
    if isinstance(value, Interval):
        return Bar(label=figure.label, value=value.mean, low=value.low, high=value.high, limit=limit)
    return Bar(label=figure.label, value=float(value), limit=limit) if is_number(value) else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Scaling:
    """Figures whose names differ in one number, against that number `x`."""

    title: str
    x: str
    unit: str
    series: dict[str, plots.Line] = field(default_factory=dict)
    spreads: dict[str, Sequence[float]] = field(default_factory=dict)
    """Standard deviations, of the series that have them."""

    def plot(self, name: str) -> Plot:
        """From zero where nothing is below it, so that noise does not look like growth; but for accuracies."""
        least = min(y for _, ys in self.series.values() for y in ys)
        from_zero = least >= 0 and self.unit != ACCURACY
        unit = f"{self.unit}, ± sd" if self.spreads else self.unit
        return plots.lines(
            name, self.title, self.series, self.x, unit, points=True, log_x=True, from_zero=from_zero,
            spreads=self.spreads,
        )  # fmt: skip


def _scaling(figures: Figures) -> list[Scaling]:
    """A plot for all series of one meaning, one axis and one unit."""
    series: dict[tuple[str, str, str, str], list[tuple[float, float, float]]] = {}
    for name, figure in figures.items():
        value = figure.value.mean if isinstance(figure.value, Interval) else figure.value
        found = _NUMBERED.fullmatch(name.removesuffix("_bytes"))
        if not found or not is_number(value) or name.endswith("_spread"):
            continue
        before, after = found[1].strip("_"), (found[6] or "").strip("_")
        unit, scale = ("MB", 1e6) if name.endswith("_bytes") else (_axis_unit(figure, before, after), 1.0)
        spread = figures[f"{name}_spread"].value if f"{name}_spread" in figures else None
        point = (float(found[3] or found[4]), value / scale, spread / scale if is_number(spread) else math.nan)
        series.setdefault((before, found[2] or found[5], after, unit), []).append(point)
    shared: dict[tuple[str, str, str], Scaling] = {}
    for (before, x, after, unit), points in series.items():
        if len(points) < LEAST_POINTS:
            continue
        title = f"{label_of(after or before)} by {x}"
        plot = shared.setdefault((after or before, x, unit), Scaling(title=title, x=x, unit=unit))
        xs, ys, spreads = map(list, zip(*sorted(points), strict=True))
        plot.series[label_of(before)] = xs, ys
        if not math.isnan(sum(spreads)):
            plot.spreads[label_of(before)] = spreads
    return list(shared.values())


def _axis_unit(figure: Figure, before: str, after: str) -> str:
    """Empty where the name does not tell one."""
    if "minus_" in after:
        return "points"
    return ACCURACY if before in METRICS else "nat" if figure.unit is Unit.NAT else ""


def _gains(figures: Figures, number: int) -> list[Plot]:
    """Figures `<variant>_<metric>_gain` with intervals: a plot per metric, a row per variant."""
    drawn: list[Plot] = []
    for metric, title in METRICS.items():
        end = f"_{metric}_gain"
        rows = {
            label_of(name.removesuffix(end)): figure.value
            for name, figure in figures.items()
            if name.endswith(end) and isinstance(figure.value, Interval)
        }
        if rows:
            drawn.append(interval_rows(f"bench{number}-gain-{metric}", f"Gain in {title}", rows, "points", zero=True))
    return drawn


class _SameStyle(SeriesStyles):
    """One style for every name, where rows are told apart by their labels."""

    def __getitem__(self, name: str) -> SeriesStyle:
        return super().__getitem__("")


def interval_rows(name: str, title: str, rows: Mapping[str, Interval], x: str, *, zero: bool = False) -> Plot:
    """One panel with a row per name, all in one colour."""
    return plots.intervals(name, title, {"": rows}, list(rows), x, styles=_SameStyle(), zero=zero)
