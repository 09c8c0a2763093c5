"""The parts of a report: sections with their plots and tables."""

import re
from dataclasses import dataclass

from repcon.reports.crop_sheet import SheetImage
from repcon.reports.plots import Plot
from repcon.reports.tables import Table


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
