"""Tables of figures for the terminal and for the record."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from benchmarks.harness import records


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """One table; the first column names its rows."""

    title: str
    titles: Sequence[str]
    rows: Sequence[Sequence[str]]

    def table(self) -> Table:
        """The table for the terminal."""
        table = Table(title=self.title, title_justify="left")
        for number, title in enumerate(self.titles):
            table.add_column(title, justify="right" if number else "left", overflow="fold")
        for row in self.rows:
            table.add_row(*row)
        return table

    def markdown(self) -> str:
        """The table for the record."""
        return f"{self.title}\n\n{records.markdown(self.titles, self.rows)}"


def of_figures(title: str, figures: Mapping[str, Any]) -> Grid:
    """Every figure with its spread, repeats and target."""
    return Grid(title=title, titles=records.TITLES, rows=records.table_rows(figures))
