"""`repcon report`: run folders and benchmark records as Markdown and as one self-contained HTML page.

The page needs no network and no script; its plots are inline SVG, its pictures are in it. Names from data (classes,
files, teachers, runs) are text wherever they appear.
"""

import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from repcon.models.model_card import escape_markdown
from repcon.reports.figure_names import run_figures
from repcon.reports.figures import Figures, format_value
from repcon.reports.plot_style import DARK, LIGHT, SeriesStyles, variables
from repcon.reports.sections.labels import labels
from repcon.reports.sections.records import compared_records, record_sections
from repcon.reports.sections.training import teachers, training
from repcon.reports.sections.transfer import is_evaluation, transfer, verdicts
from repcon.reports.sources import Source
from repcon.reports.tables import Section, differing_settings, list_settings, side_by_side, table
from repcon.runtime.text import printable

RecordSections = Callable[[Sequence[Source]], list[Section]]
"""Gives the sections on the benchmark records among the sources."""
RUN = ("command", "started", "commit")
"""Keys of an environment that are the run's, and not its machine's."""
WITH_SECTIONS = ("consolidate", "demo", "teach", "train", "precompute", "inspect", "benchmark", "figures", "store")


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """All that the templates show."""

    title: str
    made: str
    sources: tuple[Source, ...]
    sections: tuple[Section, ...]
    notes: tuple[str, ...]
    verdicts: tuple[str, ...] = ()
    """The results in one line each; the page opens with them."""


def build(sources: Sequence[Source], title: str, records: RecordSections = record_sections) -> Report:
    """Every section that the sources have something for. `records` makes those on benchmark records."""
    styles = SeriesStyles()
    of_transfer = transfer(sources, styles)  # first, so that the models that are compared get the first styles
    of_labels, notes = labels(sources, styles)
    sections = [
        *of_transfer,
        *training(sources, styles),
        *teachers(sources),
        *of_labels,
        *records(sources),
        *compared_records(sources),
        *_other_commands(sources),
        *_settings(sources),
        *_licences(sources),
        *_environment(sources),
    ]
    return Report(
        title=title,
        made=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        sources=tuple(sources),
        sections=tuple(_with_unique_titles(sections)),
        notes=(*(f"{source.name}: {note}" for source in sources for note in source.notes), *notes),
        verdicts=tuple(verdicts(sources)),
    )


def _with_unique_titles(sections: Sequence[Section]) -> list[Section]:
    """The sections, a second one of the same heading with a number, since headings are anchors."""
    counts: dict[str, int] = {}
    found: list[Section] = []
    for section in sections:
        number = counts[section.id] = counts.get(section.id, 0) + 1
        found.append(replace(section, title=f"{section.title} ({number})") if number > 1 else section)
    return found


def _other_commands(sources: Sequence[Source]) -> list[Section]:
    """Commands without a section of their own: every figure, runs of one command side by side."""
    by_kind: dict[str, dict[str, Figures]] = {}
    for source in sources:
        shown = source.kind in WITH_SECTIONS or (source.kind == "evaluate" and is_evaluation(source.figures))
        if source.figures and not shown:
            by_kind.setdefault(source.kind, {})[source.name] = run_figures(source.figures)
    return [
        Section(title=f"Results of repcon {kind}", tables=(side_by_side("", held),)) for kind, held in by_kind.items()
    ]


def _settings(sources: Sequence[Source]) -> list[Section]:
    """Where runs of one command were set differently; every run's settings folded away."""
    by_kind: dict[str, dict[str, Mapping[str, Any]]] = {}
    for source in sources:
        if source.config:
            by_kind.setdefault(source.kind, {})[source.name] = source.config
    differences = [differing_settings(f"Differences between runs of {kind}", held) for kind, held in by_kind.items()]
    whole = [list_settings(f"Settings of {name}", config) for held in by_kind.values() for name, config in held.items()]
    shown = tuple(found for found in differences if found)
    return [Section(title="Settings", tables=shown, more=tuple(whole))] if whole else []


def _licences(sources: Sequence[Source]) -> list[Section]:
    """Lists of records called `licences`, each once."""
    rows: dict[str, Mapping[str, Any]] = {}
    for source in sources:
        listed = source.figures.get("licences")
        for row in listed if isinstance(listed, list) else ():
            if isinstance(row, Mapping):
                rows[repr(sorted(row.items()))] = row
    if not rows:
        return []
    columns = list(dict.fromkeys(key for row in rows.values() for key in row))
    cells = [[format_value(row.get(key)) for key in columns] for row in rows.values()]
    lead = "The pictures that this report was made with, and the terms they come under."
    return [Section(title="Licences", lead=lead, tables=(table("", columns, cells),))]


def _environment(sources: Sequence[Source]) -> list[Section]:
    """Who ran what, when and on which machine; then machines and versions, those that are the same in one column."""
    machines: dict[str, Figures] = {}
    commands: list[list[str]] = []
    for source in sources:
        facts = run_figures({key: value for key, value in source.environment.items() if key not in RUN})
        if facts:
            machines.setdefault(repr(facts), facts)
            number = list(machines).index(repr(facts)) + 1
            given = [str(source.environment.get(key) or "")[: 12 if key == "commit" else None] for key in RUN]
            commands.append([source.name, source.kind, *given, str(number)])
    if not machines:
        return []
    titles = ("name", "kind", *RUN, "machine")
    one = len(machines) == 1
    runs = table("", titles[:-1] if one else titles, [row[:-1] if one else row for row in commands])
    held = {"everywhere" if one else f"machine {number}": facts for number, facts in enumerate(machines.values(), 1)}
    return [Section(title="Environment", tables=(runs, side_by_side("Machines and versions", held)))]


def html(report: Report) -> str:
    """The self-contained page. All text but the plots is escaped by the template engine."""
    return _templates(escaped=True).get_template("report.html.j2").render(report=report, light=LIGHT, dark=DARK)


def markdown(report: Report) -> str:
    """The same tables as Markdown, the plots as links to files next to it."""
    text = _templates(escaped=False).get_template("report.md.j2").render(report=report)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def _templates(*, escaped: bool) -> Any:
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup, escape

    environment = Environment(
        loader=PackageLoader("repcon.reports"),
        autoescape=escaped,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: printable(value) if type(value) is str else value,
    )
    environment.filters |= {
        "plain": escape_markdown,
        "share": lambda part: "<1 %" if 0 < part < 0.005 else f"{100 * part:.0f} %",
        "variables": lambda theme: Markup(variables(theme)),
        "breakable": lambda text: escape(printable(text)).replace("_", Markup("_<wbr>")).replace("/", Markup("/<wbr>")),
        "picture": lambda plot: Markup(plot.svg),
    }
    return environment
