"""`repcon report`: run folders and benchmark records as Markdown and as one self-contained HTML page."""

from typing import Any

from repcon.config import ReportConfig, dump
from repcon.reports.page import RecordSections, build, html, markdown
from repcon.reports.plot_style import standalone
from repcon.reports.sections.records import record_sections
from repcon.reports.sources import read_sources
from repcon.runtime.console import warn
from repcon.runtime.run_dir import RunDir, write_text


def run(config: ReportConfig, records: RecordSections = record_sections) -> dict[str, Any]:
    """Write `report.html`, `report.md` and the plots as files into `config.out`; give their paths and counts.

    records: makes the sections on benchmark records.
    """
    report = build(read_sources(config.paths), config.title, records)
    output = RunDir(config.out, "report", dump(config))
    pages = {"report.html": html(report), "report.md": markdown(report)}
    plots = [plot for section in report.sections for plot in section.plots]
    (output.path / "plots").mkdir(exist_ok=True)
    for plot in plots:
        write_text(output.path / "plots" / f"{plot.name}.svg", standalone(plot.svg))
    for name, text in pages.items():
        write_text(output.path / name, text)
    for note in report.notes:
        warn(note, "note")
    counts = {"sources": len(report.sources), "sections": len(report.sections), "plots": len(plots)}
    files = {"html": str(output.path / "report.html"), "markdown": str(output.path / "report.md")}
    return output.finish(files | counts | {"notes": list(report.notes)})
