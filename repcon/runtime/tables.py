"""Terminal tables that read at 80 columns."""

import textwrap
from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from repcon.runtime.console import console

_NAME_COLUMNS, _LEAST_HEADING = 20, 10


def narrow_table(title: str, name: str, columns: Sequence[str]) -> Table:
    """A table whose first column, `name`, folds where room is short, and whose figures are never broken.

    title, name and columns are plain text; headings fold at spaces and hyphens.
    """
    table = Table(title=f"\n{escape(title)}", title_justify="left", box=SIMPLE_HEAD, padding=0, show_edge=False)
    table.add_column(escape(name), style="bold", overflow="fold")
    room = max(_LEAST_HEADING, (console.width - _NAME_COLUMNS) // max(len(columns), 1) - 1)
    for column in columns:
        heading = "\n".join(textwrap.wrap(column, room)) or column
        table.add_column(escape(heading), justify="right", no_wrap=True)
    return table
