"""The report's section on a consolidation record: margins, and accuracies of every method on every domain."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.experiments.consolidation.protocol import METHODS
from benchmarks.harness.record_sections import interval_rows
from repcon.evaluation.results import METRICS
from repcon.reports.figure_names import label_of, record_figures
from repcon.reports.figures import Figures, Interval, is_number
from repcon.reports.plots import Plot
from repcon.reports.sections.records import record_title
from repcon.reports.sections.transfer import format_interval
from repcon.reports.sources import Source
from repcon.reports.tables import Cell, Section, Table, label_cell, table

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
    return named if any(_method_of(str(name), named) for name in figures) else []


def consolidation_section(source: Source, number: int, domains: Sequence[str]) -> Section:
    """Figures `<domain>_<method>_<metric>` with intervals, and margins `finding_...`, in points."""
    figures = record_figures(source.figures)
    accuracies = {name: figure.value for name, figure in figures.items() if isinstance(figure.value, Interval)}
    methods = list(dict.fromkeys(method for name in accuracies if (method := _method_of(name, domains))))
    over = "the test images" if len(source.figures["protocol"].get("seeds", "")) == 1 else "seeds"
    drawn: list[Plot] = []
    tables: list[Table] = []
    for place, domain in enumerate(domains):
        held = {
            metric: {
                method: accuracies[name] for method in methods if (name := f"{domain}_{method}_{metric}") in accuracies
            }
            for metric in METRICS
        }
        held = {metric: values for metric, values in held.items() if values}
        if "probe" in held:
            rows = {_title(method): value for method, value in held["probe"].items()}
            name = f"bench{number}-domain{place}"
            drawn.append(interval_rows(name, f"{domain}: linear probe", rows, "accuracy (%)"))
        shown = [method for method in methods if any(method in values for values in held.values())]
        cells = [
            [Cell(text=_title(method), hint=method), *(_cell(values.get(method)) for values in held.values())]
            for method in shown
        ]
        columns = ("method", *(METRICS[metric] for metric in held))
        tables.append(table(domain, columns, cells, f"Accuracy in per cent with 95 % intervals over {over}."))
    margins = {name: figure for name, figure in figures.items() if f"{name}_worst" in figures}
    by_metric = _by_metric(margins)
    if by_metric:
        drawn.insert(0, _margin_plot(f"bench{number}-margins", next(iter(by_metric.values()))))
    tables = [*(_margin_table(held, figures, domains, metric) for metric, held in by_metric.items()), *tables]
    more = (table("", ("figure", "value"), [(label_cell(figure), figure.text) for figure in figures.values()]),)
    return Section(title=record_title(source), lead=LEAD, plots=tuple(drawn), tables=tuple(tables), more=more)


def _title(method: str) -> str:
    return METHODS.get(method, label_of(method))


def _method_of(name: str, domains: Sequence[str]) -> str:
    """The method of `<domain>_<method>_<metric>`; empty for another name."""
    for domain in domains:
        for metric in METRICS:
            if name.startswith(f"{domain}_") and name.endswith(f"_{metric}"):
                return name[len(domain) + 1 : -len(metric) - 1]
    return ""


def _by_metric(margins: Figures) -> dict[str, Figures]:
    """{metric: its margins}, the linear probe first, whose margins carry no metric in their names."""
    held: dict[str, dict[str, Any]] = {"probe": {}}
    for name, figure in margins.items():
        held.setdefault(_margin_parts(name)[1], {})[name] = figure
    return {metric: found for metric, found in held.items() if found}


def _margin_parts(name: str) -> tuple[str, str]:
    """The margin without its metric, and the metric."""
    metric = next((metric for metric in METRICS if name.endswith(f"_{metric}")), "")
    return name.removesuffix(f"_{metric}"), metric or "probe"


def _margin_table(margins: Figures, figures: Figures, domains: Sequence[str], metric: str) -> Table:
    """A margin's mean, and its value in each domain."""
    rows: list[list[str | Cell]] = []
    for name, figure in margins.items():
        margin = _margin_parts(name)[0]
        compared = f": {MARGINS[margin]}" if margin in MARGINS else ""
        by_domain = [figures[key].value if (key := f"{name}_{domain}") in figures else None for domain in domains]
        values = [_cell(value, signed=True) for value in (figure.value, *by_domain)]
        rows.append([Cell(text=label_of(margin) + compared, hint=name), *values])
    note = "In points; of a single run there is no interval."
    return table(f"Margins by {METRICS[metric]}", ("margin", "mean", *domains), rows, note)


def _margin_plot(name: str, margins: Figures) -> Plot:
    rows: dict[str, Interval] = {}
    for figure in margins.values():
        if isinstance(figure.value, Interval):
            rows[figure.label] = figure.value
        elif is_number(figure.value):
            rows[figure.label] = Interval(mean=float(figure.value), low=math.nan, high=math.nan)
    return interval_rows(name, "Margins", rows, "points", zero=True)


def _cell(value: Any, *, signed: bool = False) -> str:
    if isinstance(value, Interval):
        return format_interval(value, signed=signed)
    return f"{value:{'+' if signed else ''}.1f}" if is_number(value) else "-"
