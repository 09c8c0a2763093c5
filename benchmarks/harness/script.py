"""Command-line options, results and errors of the benchmark scripts."""

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.markup import escape

from benchmarks.harness.records import write_record
from benchmarks.harness.tables import Grid, of_figures
from benchmarks.harness.targets import targets
from repcon.runtime.console import console
from repcon.runtime.errors import UserError
from repcon.runtime.run_dir import write_json
from repcon.runtime.system import environment


def parser(description: str, data: str = "") -> argparse.ArgumentParser:
    """A parser with `--json` and `--record`; with `data`, its help, also `--data` (default: REPCON_DATA)."""
    made = argparse.ArgumentParser(description=description)
    if data:
        made.add_argument("--data", default=os.environ.get("REPCON_DATA", ""), help=data)
    made.add_argument("--json", help="write the figures here")
    made.add_argument("--record", action="store_true", help="add a folder to benchmarks/records")
    return made


def photographs(arguments: argparse.Namespace) -> Path:
    """The folder of `--data`. Raises UserError where none was given."""
    if not arguments.data:
        raise UserError("no photographs: give --data FOLDER or set REPCON_DATA (tools/photos.py builds the folder)")
    return Path(arguments.data)


def finish(benchmark: str, figures: dict[str, Any], grids: Sequence[Grid], arguments: argparse.Namespace) -> None:
    """Print the tables; write figures and tables where `--json` and `--record` ask for it."""
    for grid in grids:
        console.print(grid.table())
    keep(benchmark, figures, "\n".join(grid.markdown() for grid in grids), arguments)


def finish_figures(
    benchmark: str, figures: dict[str, Any], title: str, arguments: argparse.Namespace, **facts: str
) -> None:
    """Add the environment and the targets to the figures, and finish with one table of them all.

    facts: parts of the environment that are known better here.
    """
    found = environment() | facts
    figures |= {"environment": found, "targets": targets(benchmark, found["device"])}
    finish(benchmark, figures, [of_figures(title, figures)], arguments)


def keep(
    benchmark: str, figures: dict[str, Any], markdown: str, arguments: argparse.Namespace, files: Sequence[Path] = ()
) -> None:
    """Write the figures into the file of `--json`, and with `--record` a record with the table and `files`."""
    if arguments.json:
        write_json(Path(arguments.json), figures)
    if arguments.record:
        console.print(f"recorded in {write_record(benchmark, figures, markdown, files)}")


def run(main: Callable[[], None]) -> None:
    """Run a script; a UserError is printed as one line, with exit code 1."""
    try:
        main()
    except UserError as error:
        console.print(f"[bold red]error[/] {escape(str(error))}")
        raise SystemExit(1) from None
