"""A report over benchmark records, with the benchmarks' own plots.

    python -m benchmarks.report PATH ... [--out report]

`repcon report` shows the same records as plain tables.
"""

import argparse
from collections.abc import Sequence

from benchmarks.experiments.consolidation.section import consolidation_section, domains_of
from benchmarks.harness import script
from benchmarks.harness.record_sections import record_section
from repcon.commands import outcome, report
from repcon.config import ReportConfig
from repcon.reports.sections.records import KINDS
from repcon.reports.sources import Source
from repcon.reports.tables import Section


def write(paths: Sequence[str], out: str, title: str = "Benchmarks") -> None:
    """Write report.html and report.md into the folder `out`, and print where."""
    config = ReportConfig(paths=tuple(paths), out=out, title=title)
    outcome.show("report", config, report.run(config, sections))


def sections(sources: Sequence[Source]) -> list[Section]:
    """A section per record, each in the form of its benchmark."""
    return [_section(source, number) for number, source in enumerate(s for s in sources if s.kind in KINDS)]


def _section(source: Source, number: int) -> Section:
    domains = domains_of(source.figures)
    return consolidation_section(source, number, domains) if domains else record_section(source, number)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="A report over benchmark records.")
    parser.add_argument("paths", nargs="+", metavar="PATH", help="records, or a folder of them")
    parser.add_argument("--out", default="report", help="folder of the report")
    arguments = parser.parse_args()
    write(arguments.paths, arguments.out)


if __name__ == "__main__":
    script.run(main)
