"""Start-up cost of the command line, each time in a fresh process. One minute on two cores.

    python -m benchmarks.cli [--json FILE] [--record]

NAME_seconds      from the start of the process to its end; NAME: python (an interpreter that does nothing), import
                  (`import repcon`), help (`repcon --help`), help_train (`repcon train --help`), inspect (`repcon
                  inspect` on a store of 2,000 images, 8 crops and 3 teachers)
NAME_modules      imported modules, those of the interpreter's own start included
NAME_heaviest     not a figure but a text: the packages that take the most time to import, in milliseconds of their own
                  modules, from one run of `-X importtime`

The commands take turns. Files are in the page cache and bytecode is compiled: a first run tells nothing.
"""

import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import script
from benchmarks.harness.records import put
from benchmarks.harness.tables import Grid, of_figures
from benchmarks.harness.targets import targets
from benchmarks.store.benchmark import fill
from benchmarks.store.labels import make_labels, spec_of
from repcon.labels.store import LabelStore
from repcon.runtime.console import progress
from repcon.runtime.system import environment

IMAGES, ROWS_PER_SHARD, ROUNDS = 2000, 1000, 20
HEAVIEST = 6


def main() -> None:
    arguments = script.parser("Start-up cost of the command line.").parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(Path(folder), IMAGES, ROUNDS)
    facts = environment()
    figures |= {"environment": facts, "targets": targets("cli", facts["device"])}
    script.finish("cli", figures, grids(figures), arguments)


def measure(folder: Path, images: int, rounds: int) -> dict[str, Any]:
    """All figures."""
    store = folder / "labels.zarr"
    labels = make_labels(images)
    fill(LabelStore.create(str(store), spec_of(labels, "zstd", "float16", ROWS_PER_SHARD)), labels)
    figures: dict[str, Any] = {"inspect_images": images}
    seconds: dict[str, list[float]] = {}
    with progress() as bar:
        task = bar.add_task("command line", total=rounds + 1, unit="rounds", note="")
        for name, words in commands(store).items():
            figures |= imported(name, words)  # also warms up
            seconds[name] = []
        bar.advance(task)
        for _ in range(rounds):
            for name, words in commands(store).items():
                started = time.perf_counter()
                run(words)
                seconds[name].append(time.perf_counter() - started)
            bar.advance(task)
    for name, samples in seconds.items():
        put(figures, f"{name}_seconds", samples)
    return figures


def commands(store: Path) -> dict[str, list[str]]:
    """The words after `python`."""
    return {
        "python": ["-c", "pass"],
        "import": ["-c", "import repcon"],
        "help": ["-m", "repcon", "--help"],
        "help_train": ["-m", "repcon", "train", "--help"],
        "inspect": ["-m", "repcon", "inspect", str(store)],
    }


def run(words: Sequence[str]) -> str:
    """Run Python with these words and give its standard error. Raises CalledProcessError where it fails."""
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, check=True).stderr


def imported(name: str, words: Sequence[str]) -> dict[str, Any]:
    """The number of modules that a command imports, and the heaviest packages."""
    rows = [line.split("|") for line in run(["-X", "importtime", *words]).splitlines() if "|" in line]
    modules = [(row[2].strip(), row[0].rpartition(":")[2].strip()) for row in rows]
    packages: Counter[str] = Counter()
    count = 0
    for module, microseconds in modules:
        if microseconds.isdigit():  # not the line of titles
            packages[module.partition(".")[0]] += int(microseconds)
            count += 1
    heaviest = ", ".join(f"{package} {taken / 1000:.0f}" for package, taken in packages.most_common(HEAVIEST))
    return {f"{name}_modules": count, f"{name}_heaviest": heaviest}


def grids(figures: Mapping[str, Any]) -> list[Grid]:
    """The table of figures, and the heaviest imports."""
    names = [name for name in commands(Path()) if f"{name}_heaviest" in figures]
    rows = [(name, str(figures[f"{name}_modules"]), figures[f"{name}_heaviest"]) for name in names]
    return [
        of_figures("Command line, fresh processes", figures),
        Grid(title="What is imported", titles=("command", "modules", "heaviest packages, ms"), rows=rows),
    ]
