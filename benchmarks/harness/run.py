"""Run the benchmarks listed below, one after the other, and write a report over them (`make bench`).

    python -m benchmarks [--data FOLDER] [--long] [--record] [--only NAME,NAME] [--out bench-run]

Each runs in a process of its own, which writes NAME.json into the output folder. After a failure the others still run;
the exit code is then 1. Those that need photographs are skipped where neither --data nor REPCON_DATA names any.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.markup import escape

from benchmarks import report
from benchmarks.harness.records import number
from benchmarks.harness.targets import met, targets
from repcon.runtime.console import console
from repcon.runtime.errors import UserError

PACKAGE = "benchmarks"
ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    """One of the scripts, and the options of its short and long form."""

    name: str
    module: str = ""
    """Its module below `benchmarks`; empty where it is the name."""
    short: tuple[str, ...] = ()
    long: tuple[str, ...] = ("--long",)
    needs_photographs: bool = False
    short_is_a_result: bool = True
    """Whether the short form's figures may be compared with their targets."""


def benchmarks(on_gpu: bool) -> tuple[Benchmark, ...]:
    """All benchmarks, in the order in which they run."""
    device = ("--device", "cuda") if on_gpu else ()
    return (
        Benchmark(name="cli", long=()),
        Benchmark(name="kernels"),
        Benchmark(name="store"),
        Benchmark(name="scale"),
        Benchmark(name="loaders"),
        *([Benchmark(name="loaders_gpu", module="loaders.gpu", long=())] if on_gpu else []),
        Benchmark(name="precompute"),
        Benchmark(name="training", short=device, long=(*device, "--long")),
        Benchmark(
            name="consolidation", module="experiments.consolidation", short=("--short",),
            long=("--long",) if on_gpu else (), needs_photographs=True,
            short_is_a_result=False,
        ),
        Benchmark(name="topk_quality", needs_photographs=True, short_is_a_result=False),
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="Every benchmark, and a report over all of them.")
    parser.add_argument("--data", default=os.environ.get("REPCON_DATA", ""), help="folder of tars of photographs")
    parser.add_argument("--long", action="store_true", help="their long forms: hours on two cores")
    parser.add_argument("--record", action="store_true", help="each adds a folder to benchmarks/records")
    parser.add_argument("--only", default="", help="some of them, for example store,loaders")
    parser.add_argument("--out", default="bench-run", help="folder for the figures, the logs and the report")
    arguments = parser.parse_args()
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    started, failed, written = time.perf_counter(), [], []
    for benchmark in chosen(arguments.only):
        if benchmark.needs_photographs and not arguments.data:
            console.print(f"[yellow]{benchmark.name}[/]: left out: needs photographs (--data FOLDER or REPCON_DATA)")
        elif run(benchmark, arguments, out):
            written.append(out / f"{benchmark.name}.json")
        else:
            failed.append(benchmark.name)
    if written:
        report.write([str(path) for path in written], str(out / "report"))
    console.print(f"all in {_minutes(time.perf_counter() - started)}")
    if failed:
        raise UserError(f"failed: {', '.join(failed)}; their output is in {out}")


def chosen(only: str) -> list[Benchmark]:
    """The benchmarks that `--only` names, or all. Raises UserError for an unknown name."""
    known = {benchmark.name: benchmark for benchmark in benchmarks(torch.cuda.is_available())}
    names = only.split(",") if only else list(known)
    if unknown := [name for name in names if name not in known]:
        raise UserError(f"--only: {', '.join(unknown)} unknown; there are {', '.join(known)}")
    return [known[name] for name in names]


def run(benchmark: Benchmark, arguments: argparse.Namespace, out: Path) -> bool:
    """Run one benchmark and print its line; its output goes to NAME.log. False where it failed."""
    figures_file, log = out / f"{benchmark.name}.json", out / f"{benchmark.name}.log"
    figures_file.unlink(missing_ok=True)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as fresh, log.open("w") as file, console.status(f"{benchmark.name} ..."):
        options = [*(benchmark.long if arguments.long else benchmark.short), "--json", str(figures_file)]
        options += ["--record"] * arguments.record
        if benchmark.needs_photographs and not arguments.long:  # they would resume in an existing work folder
            options += ["--work", fresh]
        command = [sys.executable, "-m", f"{PACKAGE}.{benchmark.module or benchmark.name}", *options]
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        data = os.environ | {"REPCON_DATA": arguments.data, "PYTHONPATH": path}
        done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=data)
    taken = _minutes(time.perf_counter() - started)
    if done.returncode or not figures_file.is_file():
        console.print(
            f"[bold red]{benchmark.name}[/] failed after {taken} (exit code {done.returncode}); end of {log}:"
        )
        console.print("\n".join(log.read_text(errors="replace").splitlines()[-8:]), markup=False, highlight=False)
        return False
    judged = arguments.long or benchmark.short_is_a_result
    line = headline(benchmark.name, json.loads(figures_file.read_text())) if judged else "it runs; no result"
    console.print(f"[bold]{benchmark.name}[/] {taken}: {line}", highlight=False)
    return True


def headline(name: str, figures: Mapping[str, Any]) -> str:
    """The figures that have a target, and whether they reach it."""
    found = []
    for figure, target in targets(name, figures["environment"]["device"]).items():
        if figure in figures:
            reached = met(target, figures[figure])
            colour, word = ("green", "") if reached else ("red", ", missed")
            found.append(f"{escape(figure)} [{colour}]{number(figures[figure])}[/] ({escape(target)}{word})")
    return ", ".join(found) or "no figure of it has a target here"


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.0f} s"
