"""The report's sections on benchmarks: ratios as bars with their limit, scaling as lines, gains with intervals, the
rest as tables."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from repcon.reports import plots
from repcon.reports.plots import Bar, Interval, Plot
from repcon.reports.section import Section
from repcon.reports.sections.consolidation import consolidation, domains_of
from repcon.reports.sections.transfer import METRICS
from repcon.reports.sources import Source
from repcon.reports.tables import (
    MARKED,
    Cell,
    Table,
    figure,
    flat,
    is_number,
    listing,
    readable,
    side_by_side,
    table,
    words,
)

ROWS = 24
"""Bars in one plot; a benchmark of more shapes gets several plots."""
FAMILY = 3
"""Ratios to the same peer from which on they get a plot of their own."""
MOST_PLOTS = 20
"""Plots of one kind that a record gets."""
LEAST_POINTS = 3
"""Points that make a line."""

ACCURACY = "accuracy (%)"

Targets = Mapping[str, tuple[str, float]]
"""By figure: `<=` or `>=`, and the number."""


def benchmarks(sources: Sequence[Source]) -> list[Section]:
    """A section per record."""
    found = [source for source in sources if source.kind in ("benchmark", "figures")]
    return [_section(source, number) for number, source in enumerate(found)]


def _section(source: Source, number: int) -> Section:
    kind = "Benchmark" if source.kind == "benchmark" else "Figures"
    title = f"{kind}: {source.name}"
    if domains := domains_of(source.figures):
        return consolidation(source, number, title, domains)
    targets = targets_of(source.figures)
    shown = {name: value for name, value in source.figures.items() if name != "targets"}
    figures = flat(shown)
    parts = [
        (title, bars[start : start + ROWS])
        for title, bars in _families(figures, targets).items()
        for start in range(0, len(bars), ROWS)
    ][:MOST_PLOTS]
    drawn = [plots.bars(f"bench{number}-{part}", heading, rows, "ratio") for part, (heading, rows) in enumerate(parts)]
    drawn += [found.plot(f"bench{number}-line{part}") for part, found in enumerate(_scaling(figures)[:MOST_PLOTS])]
    drawn += _gains(figures, number)
    ratios = (
        "Ratios measured in one run; the line across a bar is what it should reach, or its limit or peer. Ranges in "
        "brackets are 20 to 80 % of the repeats, or 95 % intervals where no number of repeats is named."
    )
    lead = " ".join(part for part in (_where(source), *source.notes, ratios if parts else "") if part)
    tables = (_with_targets(figures, targets) if targets else listing(shown),)
    return Section(title=title, lead=lead, plots=tuple(drawn), tables=tables)


def _where(source: Source) -> str:
    """The machine and the day, for the line above a record's figures."""
    facts = source.environment
    if "device" not in facts:
        return ""
    device = "CPU" if facts["device"] == "cpu" else facts["device"]
    processor = f" of {facts['processor']}" if facts.get("processor") else ""
    return f"{device}, {facts.get('cores', '?')} cores{processor}, {str(facts.get('started', ''))[:10]}."


def targets_of(figures: Mapping[str, Any]) -> Targets:
    """`targets` of a record, `{"name": ">= 0.5"}`; what is not of that form is left out."""
    targets = figures.get("targets")
    found: dict[str, tuple[str, float]] = {}
    for name, target in targets.items() if isinstance(targets, Mapping) else ():
        if match := re.fullmatch(r"(<=|>=) (-?[0-9.]+(?:e-?[0-9]+)?)", str(target)):
            found[str(name)] = match[1], float(match[2])
    return found


def _with_targets(figures: Mapping[str, Any], targets: Targets) -> Table:
    """Every figure, and beside it what it should reach and whether it does."""
    rows: list[list[str | Cell]] = []
    for name, value in figures.items():
        amount = value.mean if isinstance(value, Interval) else value
        cell = Cell(text="")
        if name in targets and is_number(amount):
            sign, limit = targets[name]
            reached = amount <= limit if sign == "<=" else amount >= limit
            text = f"{'at most' if sign == '<=' else 'at least'} {words(name, limit)}"
            cell = Cell(text=text, mark="reached" if reached else "missed")
        rows.append([figure(name), words(name, value), cell])
    return table("", ("figure", "value", "to reach"), rows)


def _families(figures: Mapping[str, Any], targets: Targets) -> dict[str, list[Bar]]:
    """Ratios to one and the same thing in one plot, `this` beside `that`; those that stand alone together."""
    by_peer: dict[str, list[Bar]] = {}
    for name, value in figures.items():
        if bar := _bar(name, value, figures, targets):
            by_peer.setdefault(name.rpartition("over_")[2], []).append(bar)
    families: dict[str, list[Bar]] = {}
    for peer, bars in by_peer.items():
        over = readable(peer)
        if len(bars) < FAMILY:
            families.setdefault("Ratios", []).extend(bars)
        else:
            families[f"Over {over}"] = [replace(bar, label=bar.label.removesuffix(f" over {over}")) for bar in bars]
    return families


def _bar(name: str, value: Any, figures: Mapping[str, Any], targets: Targets) -> Bar | None:
    """`this_over_that` and `over_that` are ratios; their limit is 1, or what the targets or `..._limit` say."""
    if not re.search("(^|_)over_", name) or name.endswith("_limit"):
        return None
    limit = targets[name][1] if name in targets else figures.get(f"{name}_limit", 1.0)
    limit = float(limit) if is_number(limit) else 1.0
    label = readable(name)
    if isinstance(value, Interval):
        return Bar(label=label, value=value.mean, low=value.low, high=value.high, limit=limit)
    return Bar(label=label, value=float(value), limit=limit) if is_number(value) else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Scaling:
    """Figures whose names differ in one number, against that number `x`."""

    title: str
    x: str
    unit: str
    series: Mapping[str, plots.Line]
    spreads: Mapping[str, Sequence[float]]
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


def _scaling(figures: Mapping[str, Any]) -> list[Scaling]:
    """Of figures like `probe_k4_minus_online` or `memory_1000_images_bytes`; names that go on alike share one."""
    held: dict[tuple[str, str, str, str], list[tuple[float, float, float]]] = {}
    for name, value in figures.items():
        amount = value.mean if isinstance(value, Interval) else value
        found = re.fullmatch(r"((?:.*_)?)(?:([a-z]+)([0-9]+)|([0-9]+)_([a-z]+))(_.*)?", name.removesuffix("_bytes"))
        if found and is_number(amount) and not name.endswith("_spread"):
            before, after = found[1].strip("_"), (found[6] or "").strip("_")
            unit, scale = ("MB", 1e6) if name.endswith("_bytes") else (_unit(before, after), 1.0)
            place = (before, found[2] or found[5], after, unit)
            spread = figures.get(f"{name}_spread")
            spread = float(spread) / scale if is_number(spread) else math.nan
            held.setdefault(place, []).append((float(found[3] or found[4]), float(amount) / scale, spread))
    shared: dict[tuple[str, str, str], dict[str, tuple[list[float], list[float], list[float]]]] = {}
    for (before, x, after, unit), points in held.items():
        if len(points) >= LEAST_POINTS:
            xs, ys, spreads = map(list, zip(*sorted(points), strict=True))
            shared.setdefault((after or before, x, unit), {})[readable(before)] = xs, ys, spreads
    return [
        Scaling(
            title=f"{readable(what)} by {x}", x=x, unit=unit,
            series={name: (xs, ys) for name, (xs, ys, _) in series.items()},
            spreads={name: spreads for name, (_, _, spreads) in series.items() if not math.isnan(sum(spreads))},
        )
        for (what, x, unit), series in shared.items()
    ]  # fmt: skip


def _unit(before: str, after: str) -> str:
    """Of figures that start and go on like this around their number; empty where the name does not tell."""
    if "minus_" in after:
        return "points"
    return ACCURACY if before in METRICS else "nat" if before == "kl" else ""


def _gains(figures: Mapping[str, Any], number: int) -> list[Plot]:
    """Figures `<variant>_<metric>_gain` with intervals: a plot per metric of what each variant gains or loses."""
    drawn: list[Plot] = []
    for metric, called in METRICS.items():
        end = f"_{metric}_gain"
        values = {name: value for name, value in figures.items() if name.endswith(end) and isinstance(value, Interval)}
        if values:
            groups = {readable(name.removesuffix(end)): {"gain": value} for name, value in values.items()}
            name = f"bench{number}-gain-{metric}"
            drawn.append(plots.intervals(name, f"Gain in {called}", groups, ["gain"], "points", zero=True))
    return drawn


def compared(sources: Sequence[Source]) -> list[Section]:
    """Records of one benchmark side by side: those of one device that share most of their figures' names, and their
    protocol."""
    devices = {source.name: source.environment.get("device") for source in sources}
    found = {
        source.name: flat({name: value for name, value in source.figures.items() if name != "targets"})
        for source in sources
        if source.kind in ("benchmark", "figures")
    }
    groups: list[dict[str, Mapping[str, Any]]] = []
    for name, figures in found.items():
        for group in groups:
            other, first = next(iter(group.items()))
            alike = 2 * len(first.keys() & figures.keys()) > max(len(first), len(figures))
            if alike and devices[other] == devices[name] and _protocol(first) == _protocol(figures):
                group[name] = figures
                break
        else:
            groups.append({name: figures})
    tables = tuple(side_by_side("", group, MARKED) for group in groups if len(group) > 1)
    return [Section(title="Benchmarks side by side", tables=tables)] if tables else []


def _protocol(figures: Mapping[str, Any]) -> dict[str, Any]:
    """What was run, but for the seeds and the rows of the table."""
    beside = ("protocol / seeds", "protocol / methods")
    return {name: value for name, value in figures.items() if name.startswith("protocol / ") and name not in beside}
