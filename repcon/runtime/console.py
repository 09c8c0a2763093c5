"""The terminal: one console for all, and progress displays that fit its width."""

from collections.abc import Iterable, Sequence
from typing import Any

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.markup import escape
from rich.progress import Progress, Task
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from repcon.runtime.terminal import Terminal

console = Terminal()

FIRST_LINE, LAST_LINE = 5.0, 60.0
"""Seconds to the first line of progress where the output is no terminal, and between lines at most."""
LEAST_BAR, MOST_BAR = 10, 30
"""Columns that a progress bar takes."""
SPINNER = Spinner("dots")


def few(names: Sequence[str]) -> str:
    """The first three names, for a line in which there is no room for all."""
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


def careful(message: str) -> None:
    """Print a warning about what is most likely a mistake, and is not refused."""
    console.print(f"[yellow]careful[/]: {escape(message)}", highlight=False, soft_wrap=True)


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
    """A display that moves on a terminal; into a file or a pipe, a line now and then."""

    def __init__(self, console: Console) -> None:
        super().__init__(console=console)
        self._moves = console.is_terminal and not console.is_dumb_terminal
        self._wait, self._last_line = FIRST_LINE, self.get_time()

    def get_renderables(self) -> Iterable[RenderableType]:
        yield Lines(self.tasks)

    def update(self, *arguments: Any, **fields: Any) -> None:
        """As Progress has it."""
        super().update(*arguments, **fields)
        self._say()

    def advance(self, *arguments: Any, **fields: Any) -> None:
        """As Progress has it."""
        super().advance(*arguments, **fields)
        self._say()

    def _say(self) -> None:
        """A line per task that goes on, ever more seldom."""
        with self._lock:
            now = self.get_time()
            if self._moves or not self.live.is_started or now - self._last_line < self._wait:
                return
            self._last_line, self._wait = now, min(2 * self._wait, LAST_LINE)
            going = [task for task in self.tasks if task.visible and not task.finished]
        for task in going:
            note = f"  {task.fields['note']}" if task.fields.get("note") else ""
            text = Text(f"{task.description}  {_facts(task)}{note}")
            self.console.print(text, highlight=False, soft_wrap=True)


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
