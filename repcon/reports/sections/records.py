"""The report's sections on benchmark records and JSON files of figures: every figure, its target, records compared."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from repcon.reports.figure_names import record_figures
from repcon.reports.figures import Figure, Figures, Interval, as_mapping, format_number, is_number
from repcon.reports.sources import Source
from repcon.reports.tables import MARKED, Cell, Section, Table, label_cell, side_by_side, table

KINDS = ("benchmark", "figures")
Targets = Mapping[str, tuple[str, float]]
"""By figure: `<=` or `>=`, and the number."""
_TARGET = re.compile(r"(<=|>=) (-?[0-9.]+(?:e-?[0-9]+)?)")


def record_sections(sources: Sequence[Source]) -> list[Section]:
    """A section per record, with every figure."""
    found = [source for source in sources if source.kind in KINDS]
    return [Section(title=record_title(source), lead=describe(source), tables=(figure_table(source),))
            for source in found]  # fmt: skip


def record_title(source: Source) -> str:
    """The heading of a record's section."""
    return f"{'Benchmark' if source.kind == 'benchmark' else 'Figures'}: {source.name}"


def describe(source: Source) -> str:
    """The machine, the day and the notes of a record."""
    facts = source.environment
    machine = ""
    if "device" in facts:
        device = "CPU" if facts["device"] == "cpu" else facts["device"]
        processor = f" of {facts['processor']}" if facts.get("processor") else ""
        machine = f"{device}, {facts.get('cores', '?')} cores{processor}, {str(facts.get('started', ''))[:10]}."
    return " ".join(part for part in (machine, *source.notes) if part)


def targets_of(source: Source) -> Targets:
    """The record's `targets`, `{"name": ">= 0.5"}`; what is not of that form is left out."""
    pairs = as_mapping(source.figures.get("targets")).items()
    matches = {str(name): _TARGET.fullmatch(str(target)) for name, target in pairs}
    return {name: (match[1], float(match[2])) for name, match in matches.items() if match}


def figure_table(source: Source) -> Table:
    """Every figure of a record, and for those that have a target, whether they reach it."""
    targets = targets_of(source)
    columns = ("figure", "value", "target") if targets else ("figure", "value")
    rows: list[list[str | Cell]] = []
    for figure in record_figures(source.figures).values():
        row = [label_cell(figure), figure.text]
        rows.append([*row, _target_cell(figure, targets)] if targets else row)
    return table("", columns, rows)


def _target_cell(figure: Figure, targets: Targets) -> Cell:
    amount = figure.value.mean if isinstance(figure.value, Interval) else figure.value
    if figure.name not in targets or not is_number(amount):
        return Cell(text="")
    sign, limit = targets[figure.name]
    reached = amount <= limit if sign == "<=" else amount >= limit
    words = "at most" if sign == "<=" else "at least"
    return Cell(text=f"{words} {format_number(limit, figure.unit)}", mark="reached" if reached else "missed")


def compared_records(sources: Sequence[Source]) -> list[Section]:
    """Records side by side: those of one device and one protocol that share most of their figures' names."""
    groups: list[dict[str, Figures]] = []
    kinds: list[tuple[Any, Any]] = []
    for source in sources:
        if source.kind not in KINDS:
            continue
        figures = record_figures(source.figures)
        kind = (source.environment.get("device"), _protocol(source))
        for group, other in zip(groups, kinds, strict=True):
            names = next(iter(group.values())).keys()
            if kind == other and 2 * len(names & figures.keys()) > max(len(names), len(figures)):
                group[source.name] = figures
                break
        else:
            groups.append({source.name: figures})
            kinds.append(kind)
    tables = tuple(side_by_side("", group, MARKED) for group in groups if len(group) > 1)
    return [Section(title="Benchmarks side by side", tables=tables)] if tables else []


def _protocol(source: Source) -> dict[str, Any]:
    """What was run; other seeds and other methods leave two records comparable."""
    protocol = as_mapping(source.figures.get("protocol"))
    return {name: value for name, value in protocol.items() if name not in ("seeds", "methods")}
