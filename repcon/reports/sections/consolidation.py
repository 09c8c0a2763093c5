"""The report's section on a consolidation record: margins, and accuracies of every method on every domain."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from repcon.reports import plots
from repcon.reports.plots import Interval, Plot
from repcon.reports.section import Section
from repcon.reports.sections.transfer import METRICS, with_half
from repcon.reports.sources import Source
from repcon.reports.tables import Cell, Table, flat, is_number, listing, readable, table

METHODS = {
    "generalist": "generalist",
    "teacher": "task teacher",
    "teacher_a": "teacher of a quarter",
    "teacher_b": "teacher of another quarter",
    "average": "mean of both models' weights, no training",
    "task": "student: task only",
    "generalist_only": "student: generalist only",
    "task_generalist": "student: task + generalist",
    "average_of_students": "mean of the domains' task + generalist students, no more training",
    "tasks": "student: all domains' tasks",
    "tasks_generalist": "student: all tasks + generalist",
    "quarters": "student: two quarters",
    "quarters_generalist": "student: two quarters + generalist",
    "joint": "one network trained with all domains' labels",
    "ceiling": "task teacher and generalist side by side",
}
"""The rows of the consolidation benchmark, and what each is called: a record holds the short names only."""
MARGINS = {
    "finding_1": "the generalist over the student of the task teacher alone",
    "finding_2": "the student of task teacher and generalist over the better of the two",
    "finding_3": "ONE student of all domains over the better of each domain's teacher and the generalist",
    "finding_2_quarters": "the student of two quarters' teachers and the generalist over the best of the three",
    "generalist_head": "what the generalist's head adds to the student of one task",
    "generalist_head_of_tasks": "what the generalist's head adds to the student of all domains' tasks",
    "task_heads": "what the task teacher's head adds to the student of the generalist",
    "side_by_side": "the student of task teacher and generalist over both backbones side by side",
    "side_by_side_of_tasks": "ONE student of all domains over each domain's teacher and the generalist side by side",
    "over_joint": "ONE student of all domains over one network trained with all domains' labels",
    "training": "what distilling adds to the mean of both models' weights that the student starts from",
    "training_of_tasks": "what distilling adds to the mean that ONE student of all domains starts from",
}
"""What is compared in each margin."""
LEAD = (
    "A task teacher learns one half of a domain's classes, a quarter's teacher one half of those; all accuracies are "
    "on the other half, which no task teacher or student was trained on (ImageNet, the generalist's, knows some). "
    "Margins are in points, with 95 % intervals; a finding holds where the whole interval is "
    "above zero."
)


def domains_of(figures: Mapping[str, Any]) -> list[str]:
    """The domains of a consolidation record; none where the figures are of another benchmark."""
    protocol = figures.get("protocol")
    domains = protocol.get("domains") if isinstance(protocol, Mapping) else None
    named = [str(domain) for domain in domains] if isinstance(domains, list | tuple) else []
    return named if any(_parts(str(name), named)[0] for name in figures) else []


def consolidation(source: Source, number: int, title: str, domains: Sequence[str]) -> Section:
    """Figures `<domain>_<method>_<metric>` with intervals, and margins `finding_...`, in points."""
    figures = flat(source.figures)
    cells = {name: value for name, value in figures.items() if isinstance(value, Interval)}
    methods = list(dict.fromkeys(method for name in cells for method, _, _ in [_parts(name, domains)] if method))
    drawn: list[Plot] = []
    tables: list[Table] = []
    over = "the test images" if len(source.figures["protocol"].get("seeds", "")) == 1 else "seeds"
    for place, domain in enumerate(domains):
        held = {
            metric: {method: cells[name] for method in methods if (name := f"{domain}_{method}_{metric}") in cells}
            for metric in METRICS
        }
        held = {metric: values for metric, values in held.items() if values}
        if "probe" in held:
            groups = {_called(method): {"linear probe": value} for method, value in held["probe"].items()}
            name, heading = f"bench{number}-domain{place}", f"{domain}: linear probe"
            drawn.append(plots.intervals(name, heading, groups, ["linear probe"], "accuracy (%)"))
        shown = [method for method in methods if any(method in values for values in held.values())]
        rows = [[_method(method), *(_points(values.get(method)) for values in held.values())] for method in shown]
        columns = ("method", *(METRICS[metric] for metric in held))
        tables.append(table(domain, columns, rows, f"Accuracy in per cent with 95 % intervals over {over}."))
    margins = {name: value for name, value in figures.items() if f"{name}_worst" in figures}
    for place, (metric, held) in enumerate(_by_metric(margins).items()):
        if not place:
            drawn.insert(0, _margins(f"bench{number}-margins", held))
        tables.insert(place, _margin_table(held, figures, domains, metric))
    return Section(title=title, lead=LEAD, plots=tuple(drawn), tables=tuple(tables), more=(listing(source.figures),))


def _called(method: str) -> str:
    return METHODS.get(method, readable(method))


def _method(method: str) -> Cell:
    """The first cell of a method's row."""
    return Cell(text=_called(method), hint=method)


def _by_metric(margins: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """{metric: its margins}, the linear probe first, whose margins carry no metric in their names."""
    held: dict[str, dict[str, Any]] = {"probe": {}}
    for name, value in margins.items():
        held.setdefault(_margin_parts(name)[1], {})[name] = value
    return {metric: found for metric, found in held.items() if found}


def _margin_parts(name: str) -> tuple[str, str]:
    """What a margin compares, and its metric."""
    metric = next((metric for metric in METRICS if name.endswith(f"_{metric}")), "")
    return name.removesuffix(f"_{metric}"), metric or "probe"


def _margin(name: str) -> Cell:
    """The first cell of a margin's row: what the plot calls it, and what it compares."""
    plain = _margin_parts(name)[0]
    words = f": {MARGINS[plain]}" if plain in MARGINS else ""
    return Cell(text=readable(plain) + words, hint=name)


def _margin_table(margins: Mapping[str, Any], figures: Mapping[str, Any], domains: Sequence[str], metric: str) -> Table:
    """A margin's mean, and how it comes out in each domain."""
    rows: list[list[str | Cell]] = []
    for name, value in margins.items():
        apart = [figures.get(f"{name}_{domain}") for domain in domains]
        rows.append([_margin(name), *(_points(part, signed=True) for part in (value, *apart))])
    note = "In points; of a single run there is no interval."
    return table(f"Margins by {METRICS[metric]}", ("margin", "mean", *domains), rows, note)


def _margins(name: str, margins: Mapping[str, Any]) -> Plot:
    held = {margin: value if isinstance(value, Interval) else _alone(value) for margin, value in margins.items()}
    groups = {readable(margin): {"margin": value} for margin, value in held.items() if value is not None}
    return plots.intervals(name, "Margins", groups, ["margin"], "points", zero=True)


def _alone(value: Any) -> Interval | None:
    return Interval(mean=float(value), low=math.nan, high=math.nan) if is_number(value) else None


def _parts(name: str, domains: Sequence[str]) -> tuple[str, str, str]:
    """method, domain and metric of `<domain>_<method>_<metric>`; empty words for another name."""
    for domain in domains:
        for metric in METRICS:
            if name.startswith(f"{domain}_") and name.endswith(f"_{metric}"):
                return name[len(domain) + 1 : -len(metric) - 1], domain, metric
    return "", "", ""


def _points(value: Any, *, signed: bool = False) -> str:
    if isinstance(value, Interval):
        return with_half(value, signed=signed)
    return f"{value:{'+' if signed else ''}.1f}" if is_number(value) else "-"
