"""What a command leaves behind: its output folder, its environment, its metrics, and its progress on screen."""

import json
import os
import platform
import sys
import time
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from repcon.errors import UserError

console = Console()

PACKAGES = (
    "repcon", "torch", "torchvision", "timm", "triton", "numpy", "zarr", "numcodecs", "nvidia-dali-cuda130",
    "nvidia-dali-cuda120", "ffcv", "ray", "scikit-learn",
)  # fmt: skip


def environment() -> dict[str, Any]:
    """The facts that a figure cannot be believed without: versions, processor, device, command."""
    import torch

    versions: dict[str, str] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "versions": versions,
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes `value` to `path` so that a reader sees the old file or the new one, never half of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(value, indent=2, default=str, allow_nan=True) + "\n")
    os.replace(temporary, path)


class Run:
    """One command's output folder: `config.toml`, `env.json`, `metrics.jsonl`, `results.json`.

    The folder may be empty, or hold an earlier run of the SAME command (which is then continued); anything
    else is refused, so that nothing of the user's is overwritten.
    """

    def __init__(self, out: str | Path, command: str, config_toml: str) -> None:
        self.path = Path(out)
        marker = self.path / "command"
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.path} is a file; name a folder for the output of `repcon {command}`")
        if self.path.exists() and any(self.path.iterdir()):
            held = marker.read_text().strip() if marker.is_file() else None
            if held != command:
                what = f"the output of `repcon {held}`" if held else "other files"
                raise UserError(f"{self.path} holds {what}; name an empty or new folder for `repcon {command}`")
        self.path.mkdir(parents=True, exist_ok=True)
        marker.write_text(command + "\n")
        (self.path / "config.toml").write_text(config_toml)
        write_json(self.path / "env.json", environment())
        self._metrics: TextIO = (self.path / "metrics.jsonl").open("a", buffering=1)
        self._started = time.time()

    def log(self, event: str, **figures: Any) -> None:
        """Appends one line to `metrics.jsonl`: the event, seconds since the start, and its figures."""
        line = {"event": event, "seconds": round(time.time() - self._started, 3), **figures}
        self._metrics.write(json.dumps(line, default=float) + "\n")

    def finish(self, results: Mapping[str, Any]) -> dict[str, Any]:
        """Writes `results.json` and closes the metrics; gives the results back."""
        write_json(self.path / "results.json", results)
        self._metrics.close()
        return dict(results)


class RateColumn(ProgressColumn):
    """Units finished per second, in the task's own unit."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        unit = task.fields.get("unit", "")
        return Text("" if speed is None else f"{speed:,.0f} {unit}/s", style="cyan")


def progress() -> Progress:
    """A rich progress display with rate and time left; tasks take the fields `unit=` and `note=`."""
    return Progress(
        SpinnerColumn(),
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        RateColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
    )
