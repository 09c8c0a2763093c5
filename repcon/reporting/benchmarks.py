"""The report's sections on benchmarks: ratios as bars with their limit, findings with intervals, the rest as tables."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from repcon.reporting import plots
from repcon.reporting.plots import Bar, Interval
from repcon.reporting.sections import Plot, Section
from repcon.reporting.sources import Source
from repcon.reporting.tables import Table, flat, is_number, listing, side_by_side, table
from repcon.reporting.transfer import METRICS

ROWS = 24
"""Bars in one plot; a benchmark of more shapes gets several plots."""
FAMILY = 3
"""Ratios to the same peer from which on they get a plot of their own."""


def benchmarks(sources: Sequence[Source]) -> list[Section]:
    """A section per record."""
    found = [source for source in sources if source.kind in ("benchmark", "figures")]
    return [_section(source, number) for number, source in enumerate(found)]


def _section(source: Source, number: int) -> Section:
    kind = "Benchmark" if source.kind == "benchmark" else "Figures"
    title = f"{kind}: {source.name}"
    if domains := _domains(source.figures):
        return _consolidation(source, number, title, domains)
    figures = flat(source.figures)
    parts = [
        (title, bars[start : start + ROWS])
        for title, bars in _families(figures).items()
        for start in range(0, len(bars), ROWS)
    ]
    drawn = [_bars(f"bench{number}-{part}", heading, rows) for part, (heading, rows) in enumerate(parts)]
    lead = "Ratios measured in one run; the line across a bar is its limit or its peer." if drawn else ""
    return Section(title=title, lead=lead, plots=tuple(drawn), tables=(listing("", source.figures),))


def _bars(name: str, title: str, rows: Sequence[Bar]) -> Plot:
    return Plot(name=name, title=title, svg=plots.bars(name, title, rows, "ratio"))


def _families(figures: Mapping[str, Any]) -> dict[str, list[Bar]]:
    """Ratios to one and the same thing in one plot, `this` beside `that`; those that stand alone together."""
    by_peer: dict[str, list[Bar]] = {}
    for name, value in figures.items():
        if bar := _bar(name, value, figures):
            by_peer.setdefault(name.rpartition("_over_")[2], []).append(bar)
    families: dict[str, list[Bar]] = {}
    for peer, bars in by_peer.items():
        words = peer.replace("_", " ")
        if len(bars) < FAMILY:
            families.setdefault("Ratios", []).extend(bars)
        else:
            families[f"Over {words}"] = [replace(bar, label=bar.label.removesuffix(f" over {words}")) for bar in bars]
    return families


def _bar(name: str, value: Any, figures: Mapping[str, Any]) -> Bar | None:
    """Figures called `this_over_that` are ratios; their limit is 1, or what `..._limit` says."""
    if "_over_" not in name or name.endswith("_limit"):
        return None
    limit = figures.get(f"{name}_limit", 1.0)
    limit = float(limit) if is_number(limit) else 1.0
    label = name.replace("_", " ")
    if isinstance(value, Interval):
        return Bar(label=label, value=value.mean, low=value.low, high=value.high, limit=limit)
    return Bar(label=label, value=float(value), limit=limit) if is_number(value) else None


def _domains(figures: Mapping[str, Any]) -> list[str]:
    """The domains of a consolidation record; none where the figures are of another benchmark."""
    protocol = figures.get("protocol")
    domains = protocol.get("domains") if isinstance(protocol, Mapping) else None
    return [str(domain) for domain in domains] if isinstance(domains, list | tuple) else []


def _consolidation(source: Source, number: int, title: str, domains: Sequence[str]) -> Section:
    """Figures `<domain>_<method>_<metric>` with intervals, and margins `finding_...`, in points."""
    figures = flat(source.figures)
    cells = {name: value for name, value in figures.items() if isinstance(value, Interval)}
    methods = list(dict.fromkeys(method for name in cells for method, _, _ in [_parts(name, domains)] if method))
    drawn: list[Plot] = []
    tables: list[Table] = []
    for place, domain in enumerate(domains):
        held = {
            metric: {method: cells[name] for method in methods if (name := f"{domain}_{method}_{metric}") in cells}
            for metric in METRICS
        }
        held = {metric: values for metric, values in held.items() if values}
        if "probe" in held:
            groups = {method: {"linear probe": value} for method, value in held["probe"].items()}
            name, heading = f"bench{number}-domain{place}", f"{domain}: linear probe"
            svg = plots.intervals(name, heading, groups, ["linear probe"], "accuracy (%)")
            drawn.append(Plot(name=name, title=heading, svg=svg))
        rows = [[method, *(_points(values.get(method)) for values in held.values())] for method in methods]
        columns = ("method", *(METRICS[metric] for metric in held))
        tables.append(table(domain, columns, rows, "Accuracy in per cent with 95 % intervals over seeds."))
    margins = {name: value for name, value in cells.items() if not _parts(name, domains)[0]}
    if margins:
        drawn.insert(0, _margins(f"bench{number}-margins", margins))
        rows = [[name, _points(value, signed=True)] for name, value in margins.items()]
        tables.insert(0, table("Margins", ("margin", "points"), rows))
    lead = "Margins are in points of linear-probe accuracy, with 95 % intervals; above zero the finding holds."
    return Section(
        title=title, lead=lead, plots=tuple(drawn), tables=tuple(tables), more=(listing("", source.figures),)
    )


def _margins(name: str, margins: Mapping[str, Interval]) -> Plot:
    groups = {margin: {"margin": value} for margin, value in margins.items()}
    return Plot(
        name=name, title="Margins", svg=plots.intervals(name, "Margins", groups, ["margin"], "points", zero=True)
    )


def _parts(name: str, domains: Sequence[str]) -> tuple[str, str, str]:
    """method, domain and metric of `<domain>_<method>_<metric>`; empty words for another name."""
    for domain in domains:
        for metric in METRICS:
            if name.startswith(f"{domain}_") and name.endswith(f"_{metric}"):
                return name[len(domain) + 1 : -len(metric) - 1], domain, metric
    return "", "", ""


def _points(value: Interval | None, *, signed: bool = False) -> str:
    if value is None:
        return "-"
    half = max(value.high - value.mean, value.mean - value.low)
    return f"{value.mean:{'+' if signed else ''}.1f} ± {half:.1f}"


def compared(sources: Sequence[Source]) -> list[Section]:
    """Records of one benchmark side by side: those that share most of their figures' names."""
    found = {source.name: flat(source.figures) for source in sources if source.kind in ("benchmark", "figures")}
    groups: list[dict[str, Mapping[str, Any]]] = []
    for name, figures in found.items():
        for group in groups:
            first = next(iter(group.values()))
            if 2 * len(first.keys() & figures.keys()) > max(len(first), len(figures)):
                group[name] = figures
                break
        else:
            groups.append({name: figures})
    note = "Marked where the interval leaves that of the first column; a figure without an interval is never marked."
    tables = tuple(side_by_side("", group, note) for group in groups if len(group) > 1)
    return [Section(title="Benchmarks side by side", tables=tables)] if tables else []
