"""What a command leaves behind: its output folder, its environment, its metrics, and its progress on screen."""

import errno
import fcntl
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.progress import Progress, Task
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from repcon.environment import environment
from repcon.errors import UserError

console = Console()

MARKER = "command"
"""The file of an output folder that says which command made it."""
RESULTS = "results.json"
"""Its final figures: written last, so that a folder without them is of a run that has not ended."""
LEAST_BAR, MOST_BAR = 10, 30
"""Columns that a progress bar takes."""
SPINNER = Spinner("dots")


def few(names: Sequence[str]) -> str:
    """The first three names, for a line in which there is no room for all."""
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8 so that a reader sees the old file or the new one, never half of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """As `write_text`."""
    write_text(path, json_text(value))


def json_text(value: Mapping[str, Any]) -> str:
    """Indented JSON, with null for what is no finite number: JSON has no NaN, and other readers refuse it."""
    return json.dumps(finite(value), indent=2, default=_plain, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    """What JSON has no type for: numpy's numbers as numbers, anything else as text."""
    try:
        return finite(float(value))
    except (TypeError, ValueError):
        return str(value)


def finite(value: Any) -> Any:
    """The value with None in the place of numbers that are not finite, however deep."""
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(held) for key, held in value.items()}
    return [finite(held) for held in value] if isinstance(value, list | tuple) else value


class Run:
    """One command's output folder: `config.toml`, `env.json`, `metrics.jsonl`, `results.json`.

    The folder may be empty, or hold an earlier run of the SAME command (which is then continued); anything
    else is refused, so that nothing of the user's is overwritten.
    """

    def __init__(
        self,
        out: str | Path,
        command: str,
        config_toml: str,
        *,
        afresh: bool = False,
        alone: bool = False,
        trim: Callable[[Path], None] | None = None,
    ) -> None:
        """`afresh`: the command starts again where it was stopped, and so do its metrics. `alone`: no other process
        may be at work in the folder. `trim` is given the metrics of the run that is continued, before more are added.
        """
        if "://" in str(out):
            raise UserError(f"{out}: `repcon {command}` writes to a local folder; copy it there afterwards")
        self.path = Path(out)
        marker = self.path / MARKER
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.path} is a file; name a folder for the output of `repcon {command}`")
        if self.path.exists() and any(self.path.iterdir()):
            held = marker.read_text().strip() if marker.is_file() else None
            if held != command:
                what = f"the output of `repcon {held}`" if held else "other files"
                raise UserError(f"{self.path} holds {what}; name an empty or new folder for `repcon {command}`")
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = (self.path / ".lock").open("w") if alone else None
        if self._lock is not None and _is_locked(self._lock):
            raise UserError(f"{self.path}: another process is at work there; wait for it, or name another folder")
        marker.write_text(command + "\n")
        (self.path / "config.toml").write_text(config_toml)
        write_json(self.path / "env.json", environment())
        metrics = self.path / "metrics.jsonl"
        if trim is not None:
            trim(metrics)
        self._metrics: TextIO = metrics.open("w" if afresh else "a", buffering=1)
        self._started = time.monotonic()

    def earlier(self) -> dict[str, Any]:
        """The results of a run that ended here; {} where none did."""
        try:
            return json.loads((self.path / RESULTS).read_text())
        except (OSError, ValueError):
            return {}

    def log(self, event: str, **figures: Any) -> None:
        """Appends one line to `metrics.jsonl`: the event, seconds since the start, and its figures."""
        line = {"event": event, "seconds": round(time.monotonic() - self._started, 3), **figures}
        self._metrics.write(json.dumps(finite(line), default=_plain, allow_nan=False) + "\n")

    def finish(self, results: Mapping[str, Any]) -> dict[str, Any]:
        """Writes `results.json` and closes the metrics; gives the results back."""
        write_json(self.path / RESULTS, results)
        self._metrics.close()
        if self._lock is not None:
            self._lock.close()
        return dict(results)


def _is_locked(file: TextIO) -> bool:
    """Whether another process has the lock; else it is this one's, until `file` is closed or the process ends.

    A lock of the process, not of the open file: a run that failed in a notebook must not keep the next one away.
    """
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in (errno.EACCES, errno.EAGAIN)  # any other: a file system without locks
    return False


class Lines:
    """A line per task that never exceeds the terminal: the bar gives way first, then the note goes to its own line."""

    def __init__(self, tasks: Sequence[Task]) -> None:
        self._tasks = [task for task in tasks if task.visible]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        facts = [_facts(task) for task in self._tasks]
        notes = [_line(task.fields.get("note", ""), "cyan") for task in self._tasks]
        room = options.max_width - 4 - max(map(cell_len, facts), default=0)
        name_width = min(max((cell_len(task.description) for task in self._tasks), default=0), max(room - LEAST_BAR, 8))
        left = [options.max_width - 4 - name_width - cell_len(text) for text in facts]
        beside = [space - note.cell_len > LEAST_BAR for space, note in zip(left, notes, strict=True)]
        spaces = [space - (note.cell_len + 1) * held for space, note, held in zip(left, notes, beside, strict=True)]
        bar_width = max(min(MOST_BAR, *spaces), 1) if spaces else MOST_BAR
        for task, text, note, held in zip(self._tasks, facts, notes, beside, strict=True):
            line = Table.grid(padding=(0, 1, 0, 0))
            line.add_column(width=1)
            line.add_column(width=name_width)
            line.add_row(
                _line("\N{CHECK MARK}", "green") if task.finished else SPINNER.render(task.get_time()),
                _line(task.description, "bold"),
                ProgressBar(total=task.total, completed=task.completed, width=bar_width),
                _line(text),
                *([note] if held else []),
            )
            yield line
            if note and not held:
                yield _line("  ") + note


def _line(text: str, style: str = "") -> Text:
    """Text that is cut rather than wrapped."""
    return Text(text, style=style, no_wrap=True, overflow="ellipsis")


class _Display(Progress):
    def get_renderables(self) -> Iterable[RenderableType]:
        yield Lines(self.tasks)


def _facts(task: Task) -> str:
    """`120/480 images  95/s  0:04 left`, without what is not known yet."""
    unit = task.fields.get("unit", "")
    total = "" if task.total is None else f"/{int(task.total):,}"
    speed = task.finished_speed or task.speed
    rate = "" if speed is None else f"{speed:,.0f}/s" if speed >= 10 else f"{speed:.2g}/s"
    taken, left = task.finished_time, task.time_remaining
    clock = f"in {_clock(taken)}" if taken is not None else f"{_clock(left)} left" if left is not None else ""
    return "  ".join(part for part in (f"{int(task.completed):,}{total} {unit}".strip(), rate, clock) if part)


def _clock(seconds: float) -> str:
    """`0:07`, `12:30`, `3:05:00`."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"


def progress() -> Progress:
    """A rich progress display with rate and time left; tasks take the fields `unit=` and `note=`."""
    return _Display(console=console)
