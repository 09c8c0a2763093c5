"""Figures with their spread, and records: the folders in benchmarks/records.

A figure that was timed is its median under its own name, with the 20 and 80 % quantiles in `NAME_20` and `NAME_80` and
the number of repeats in `NAME_repeats`. Needs numpy and nothing else, as the kernels' benchmark does.
"""

import json
import re
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import count
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

Result = TypeVar("Result")
RECORDS = Path(__file__).parents[1] / "records"
SPREAD = ("_20", "_80", "_repeats")
"""Suffixes of the names that hold another figure's quantiles and repeats."""


def put(figures: dict[str, Any], name: str, samples: Sequence[float] | np.ndarray) -> None:
    """Add the median of `samples` to the figures, with its quantiles and the number of samples."""
    low, middle, high = (float(value) for value in np.quantile(samples, (0.2, 0.5, 0.8)))
    figures |= {name: middle, f"{name}_20": low, f"{name}_80": high, f"{name}_repeats": len(samples)}


def cells(figures: Mapping[str, Any], name: str) -> tuple[str, str, str]:
    """A figure as table cells: value, quantiles, repeats; empty where it was not measured or not repeated."""
    if name not in figures:
        return "", "", ""
    if f"{name}_20" not in figures:
        return number(figures[name]), "", ""
    spread = f"{number(figures[f'{name}_20'])} to {number(figures[f'{name}_80'])}"
    return number(figures[name]), spread, str(figures[f"{name}_repeats"])


def number(value: float) -> str:
    """Four digits, and no powers of ten where whole numbers are short enough."""
    return f"{value:,.0f}" if isinstance(value, int) or 1000 <= abs(value) < 1e9 else f"{value:.4g}"


def table_rows(figures: Mapping[str, Any]) -> list[tuple[str, str, str, str, str]]:
    """The numbers of a flat object of figures as rows (`TITLES`); its `"targets"` fill the last column."""
    targets: Mapping[str, str] = figures.get("targets", {})
    names = [
        name
        for name, value in figures.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and not name.endswith(SPREAD)
    ]
    return [(name, *cells(figures, name), targets.get(name, "")) for name in names]


def in_new_process(work: Callable[..., Result], *arguments: object) -> Result:
    """Run `work(*arguments)` in a fresh process, so that its peak memory is its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(work, *arguments).result()


def peak_memory_bytes() -> int:
    """Peak resident memory of this process. (`getrusage` would include that of the process before `exec`.)"""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


TITLES = ("figure", "median", "20 to 80 %", "repeats", "to reach")
"""Column titles of `table_rows`."""


def markdown(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(line)} |" for line in (titles, ["---"] * len(titles), *rows)) + "\n"


def write_record(
    benchmark: str, figures: Mapping[str, Any], table_markdown: str, files: Iterable[str | Path] = ()
) -> Path:
    """A new folder `<date>-<benchmark>-<device>` in benchmarks/records: results.json, env.json, table.md, `files`.

    `figures` hold the environment as `"environment"`. Nothing is overwritten: another record of the same day, benchmark
    and device gets a number at its end.
    """
    environment = figures["environment"] | {"command": _portable(figures["environment"]["command"])}
    figures = {**figures, "environment": environment}
    folder = _new_folder(f"{time.strftime('%Y-%m-%d')}-{benchmark}-{_device(environment)}")
    for name, value in (("results.json", figures), ("env.json", environment)):
        (folder / name).write_text(json.dumps(value, indent=2, default=str) + "\n")
    (folder / "table.md").write_text(f"{table_markdown.rstrip()}\n\n{_footer(environment)}\n")
    for file in files:
        shutil.copy(file, folder)
    return folder


def _portable(command: str) -> str:
    """The command with absolute paths cut to their last part, since folders of this machine say nothing elsewhere."""
    return re.sub(r"(?<=[\s=])/(?:[^\s/]+/)*([^\s/]+)/?", r"\1", command)


def _new_folder(name: str) -> Path:
    for number in count(1):
        folder = RECORDS / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            continue
    raise AssertionError


def _device(environment: Mapping[str, Any]) -> str:
    """For a file name: `nvidia-h100-80gb-hbm3`, or `cpu-2-cores`."""
    if environment["device"] == "cpu":
        return f"cpu-{environment['cores']}-cores"
    return re.sub("[^a-z0-9]+", "-", environment["device"].lower()).strip("-")


def _footer(environment: Mapping[str, Any]) -> str:
    """The line under a table: command, commit, device and versions."""
    facts = {
        "command": f"`{environment['command']}`",
        "commit": environment.get("commit"),
        "device": f"{environment['device']}, {environment['cores']} cores of {environment['processor']}",
        "power limit": f"{environment['power_limit_watts']:g} W" if "power_limit_watts" in environment else "",
        "versions": ", ".join(f"{name} {version}" for name, version in environment["versions"].items()),
        "started": environment["started"],
    }
    return "; ".join(f"{name}: {value}" for name, value in facts.items() if value)
