"""The parts of a report: sections, and their tables of figures, side by side or not, and of settings."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from repcon.reports.crop_sheet import SheetImage
from repcon.reports.figures import Figure, Figures, Interval, flatten, format_value
from repcon.reports.plots import Plot

MARKED = "Marked where the interval leaves that of the first column; a figure without an interval is never marked."
"""The note under a table whose cells have a `mark` outside the first column."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One cell; `mark` (`better`, `higher`, `reached`, ...) is a word, so that colour is not needed."""

    text: str
    detail: str = ""
    """Shown smaller, on a line of its own."""
    hint: str = ""
    """Shown when pointed at: a figure's name as the file has it."""
    mark: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Rows of cells under column titles; the first cell of a row is its name."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A heading, and under it text, plots, tables and sample images."""

    title: str
    lead: str = ""
    plots: tuple[Plot, ...] = ()
    tables: tuple[Table, ...] = ()
    more: tuple[Table, ...] = ()
    """Tables that the page folds away."""
    folded: bool = False
    """Whether the page folds all of it away."""
    sheet: tuple[SheetImage, ...] = ()

    @property
    def id(self) -> str:
        """The heading's anchor."""
        return re.sub("[^a-z0-9]+", "-", self.title.lower()).strip("-")


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str | Cell]], note: str = "") -> Table:
    """A table of cells; a plain string is a cell without detail."""
    cells = tuple(tuple(cell if isinstance(cell, Cell) else Cell(text=cell) for cell in row) for row in rows)
    return Table(title=title, columns=tuple(columns), rows=cells, note=note)


def label_cell(figure: Figure) -> Cell:
    """The first cell of a figure's row."""
    return Cell(text=figure.label, hint=figure.name if figure.name != figure.label else "")


def side_by_side(title: str, sources: Mapping[str, Figures], note: str = "") -> Table:
    """Figures in rows, sources in columns. A source is marked where its interval leaves the first one's out."""
    first = next(iter(sources.values()))
    labelled = {name: figure for figures in reversed(list(sources.values())) for name, figure in figures.items()}
    names = dict.fromkeys(name for figures in sources.values() for name in figures)
    rows: list[list[str | Cell]] = []
    for name in names:
        row: list[str | Cell] = [label_cell(labelled[name])]
        for figures in sources.values():
            figure = figures.get(name)
            mark = compare(figure.value, first[name].value) if figure and name in first else ""
            row.append(Cell(text=figure.text if figure else "", mark=mark))
        rows.append(row)
    return table(title, ("figure", *sources), rows, note)


def compare(value: Any, reference: Any) -> str:
    """`higher` or `lower` where two intervals do not touch; empty where they do, or where one is no interval."""
    if not (isinstance(value, Interval) and isinstance(reference, Interval)):
        return ""
    return "higher" if value.low > reference.high else "lower" if value.high < reference.low else ""


def list_settings(title: str, config: Mapping[str, Any]) -> Table:
    """A recipe, a row for each key, as the recipe calls it."""
    rows = [(_key(name), format_value(value)) for name, value in flatten(config).items()]
    return table(title, ("setting", "value"), rows)


def differing_settings(title: str, configs: Mapping[str, Mapping[str, Any]]) -> Table | None:
    """Only the settings in which the recipes differ; None where they agree."""
    held = {name: flatten(config) for name, config in configs.items()}
    first = next(iter(held.values()))
    absent = object()
    rows = [
        [_key(key), *(format_value(values[key]) if key in values else "" for values in held.values())]
        for key in dict.fromkeys(key for values in held.values() for key in values)
        if any(values.get(key, absent) != first.get(key, absent) for values in held.values())
    ]
    return table(title, ("setting", *held), rows) if rows else None


def _key(name: str) -> str:
    return name.replace(" / ", ".")
