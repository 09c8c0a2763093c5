"""The terminal: one console that prints any text safely, warnings, and tables and progress that fit its width."""

import contextlib
import errno
import os
import textwrap
from collections.abc import Callable, Iterable, Sequence
from typing import IO, Any, cast

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.markup import escape
from rich.progress import Progress, Task
from rich.progress_bar import ProgressBar
from rich.segment import Segment
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from repcon.runtime.text import format_duration, printable

_REPLACEMENTS = str.maketrans({"±": "+-", "…": "...", "✓": "*", "µ": "u", "×": "x", "–": "-", "•": "*"})  # noqa: RUF001
"""Replacements for characters that the terminal's encoding lacks; all others become `?`."""
FIRST_LINE_SECONDS, MAX_LINE_SECONDS = 5.0, 60.0
"""Time to the first line of progress where the output is no terminal, and the longest time between lines."""
MIN_BAR, MAX_BAR = 10, 30
"""Width of a progress bar, in columns."""
SPINNER = Spinner("dots")
_NAME_COLUMNS, _LEAST_HEADING = 20, 10
"""Width of a narrow table's first column, and of any heading before it folds."""


class Terminal(Console):
    """A rich console that is safe for untrusted text and survives a broken output stream.

    Control characters are escaped, so that a class or file name cannot steer the terminal. Characters that the stream's
    encoding lacks are replaced. After an error of the stream (a full disk, a closed pipe) output is discarded, `lost`
    holds the error, and the work goes on.
    """

    lost: OSError | None = None

    @property
    def file(self) -> IO[str]:
        """The output stream, wrapped so that writing does not raise."""
        return cast(IO[str], _SafeStream(super().file, self))

    @file.setter
    def file(self, new_file: IO[str]) -> None:
        self._file = new_file

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """As rich's, with `printable` text."""
        for segment in super().render(renderable, options):
            plain = segment.text if segment.control else printable(segment.text)
            yield segment if plain is segment.text else Segment(plain, segment.style)

    def render_str(self, text: str, **how: Any) -> Text:
        """As rich's, of `printable` text, so that table cells are as wide as what they show."""
        return super().render_str(printable(text), **how)

    def discard_output(self, stream: Any, error: OSError) -> None:
        """Redirects further output to the null device, also what Python flushes at exit."""
        self.lost = self.lost or error
        with contextlib.suppress(OSError, ValueError, AttributeError):
            if stream.fileno() in (1, 2):
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, stream.fileno())
                os.close(null)
                stream.flush()


class _SafeStream:
    """A text stream whose `write` and `flush` do not raise."""

    def __init__(self, stream: Any, console: Terminal) -> None:
        self._stream, self._console = stream, console

    def write(self, text: str) -> int:
        """Writes the text, characters that the encoding lacks replaced."""
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        self._unless_lost(lambda: self._stream.write(_encode_replacing(text, encoding)))
        return len(text)

    def flush(self) -> None:
        """Flushes the stream."""
        self._unless_lost(self._stream.flush)

    def _unless_lost(self, act: Callable[[], object]) -> None:
        if self._console.lost is None:
            try:
                act()
            except OSError as error:
                self._console.discard_output(self._stream, error)
            except ValueError as error:  # closed
                self._console.discard_output(self._stream, OSError(errno.EBADF, str(error)))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _encode_replacing(text: str, encoding: str) -> str:
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return text.translate(_REPLACEMENTS).encode(encoding, "replace").decode(encoding)
    return text


console = Terminal()


def print_plain(text: str, style: str = "") -> None:
    """Print text as it is: brackets are no markup, numbers are not coloured, and only the terminal wraps it."""
    console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def warn(message: str, kind: str = "warning") -> None:
    """Print a warning about something that is probably a mistake but not refused; `kind` is its first word."""
    console.print(f"[yellow]{kind}[/]: {escape(message)}", highlight=False, soft_wrap=True)


def narrow_table(title: str, name: str, columns: Sequence[str]) -> Table:
    """A table whose first column, `name`, folds where room is short, and whose figures are never broken.

    title, name and columns are plain text; headings fold at spaces and hyphens.
    """
    table = Table(title=f"\n{escape(title)}", title_justify="left", box=SIMPLE_HEAD, padding=0, show_edge=False)
    table.add_column(escape(name), style="bold", overflow="fold")
    room = max(_LEAST_HEADING, (console.width - _NAME_COLUMNS) // max(len(columns), 1) - 1)
    for column in columns:
        heading = "\n".join(textwrap.wrap(column, room)) or column
        table.add_column(escape(heading), justify="right", no_wrap=True)
    return table


def print_outcome(made: str, where: str, following: str = "") -> None:
    """Print what was made, where it lies, and what usually follows, on one line; parts may be empty."""
    outcome = [f"{escape(made)}: [bold]{escape(where)}[/]"] if made else []
    outcome += [f"[dim]next:[/] {escape(following)}"] if following else []
    if outcome:
        console.print("; ".join(outcome), highlight=False, soft_wrap=True)


class ProgressLines:
    """One line per task that fits the terminal: the bar shrinks first, then the note moves to its own line."""

    def __init__(self, tasks: Sequence[Task]) -> None:
        self._tasks = [task for task in tasks if task.visible]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        summaries = [_task_summary(task) for task in self._tasks]
        notes = [_line(task.fields.get("note", ""), "cyan") for task in self._tasks]
        room = options.max_width - 4 - max(map(cell_len, summaries), default=0)
        name_width = min(max((cell_len(task.description) for task in self._tasks), default=0), max(room - MIN_BAR, 8))
        rooms = [options.max_width - 4 - name_width - cell_len(summary) for summary in summaries]
        inline = [room - note.cell_len > MIN_BAR for room, note in zip(rooms, notes, strict=True)]
        bar_rooms = [room - (note.cell_len + 1) * fits for room, note, fits in zip(rooms, notes, inline, strict=True)]
        bar_width = max(min(MAX_BAR, *bar_rooms), 1) if bar_rooms else MAX_BAR
        for task, summary, note, fits in zip(self._tasks, summaries, notes, inline, strict=True):
            line = Table.grid(padding=(0, 1, 0, 0))
            line.add_column(width=1)
            line.add_column(width=name_width)
            line.add_row(
                _line("\N{CHECK MARK}", "green") if task.finished else SPINNER.render(task.get_time()),
                _line(task.description, "bold"),
                ProgressBar(total=task.total, completed=task.completed, width=bar_width),
                _line(summary),
                *([note] if fits else []),
            )
            yield line
            if note and not fits:
                yield _line("  ") + note


def _line(text: str, style: str = "") -> Text:
    """Text that is truncated rather than wrapped."""
    return Text(text, style=style, no_wrap=True, overflow="ellipsis")


class ProgressDisplay(Progress):
    """Animated progress on a terminal; in a file or a pipe, a plain line at growing intervals."""

    def __init__(self, console: Console) -> None:
        super().__init__(console=console)
        self._animated = console.is_terminal and not console.is_dumb_terminal
        self._interval, self._last_line = FIRST_LINE_SECONDS, self.get_time()

    def get_renderables(self) -> Iterable[RenderableType]:
        yield ProgressLines(self.tasks)

    def update(self, *arguments: Any, **fields: Any) -> None:
        """As `rich.progress.Progress.update`."""
        super().update(*arguments, **fields)
        self._print_lines()

    def advance(self, *arguments: Any, **fields: Any) -> None:
        """As `rich.progress.Progress.advance`."""
        super().advance(*arguments, **fields)
        self._print_lines()

    def _print_lines(self) -> None:
        """Prints a line per unfinished task if the interval is over, and doubles the interval."""
        with self._lock:
            now = self.get_time()
            if self._animated or not self.live.is_started or now - self._last_line < self._interval:
                return
            self._last_line, self._interval = now, min(2 * self._interval, MAX_LINE_SECONDS)
            unfinished = [task for task in self.tasks if task.visible and not task.finished]
        for task in unfinished:
            note = f"  {task.fields['note']}" if task.fields.get("note") else ""
            text = Text(f"{task.description}  {_task_summary(task)}{note}")
            self.console.print(text, highlight=False, soft_wrap=True)


def _task_summary(task: Task) -> str:
    """`120/480 images  95/s  4 s left`, without what is not known yet."""
    unit = task.fields.get("unit", "")
    total = "" if task.total is None else f"/{int(task.total):,}"
    speed = task.finished_speed or task.speed
    rate = "" if speed is None else f"{speed:,.0f}/s" if speed >= 10 else f"{speed:.2g}/s"
    taken, left = task.finished_time, task.time_remaining
    time = f"in {format_duration(taken)}" if taken is not None else f"{format_duration(left)} left" if left else ""
    return "  ".join(part for part in (f"{int(task.completed):,}{total} {unit}".strip(), rate, time) if part)


def progress() -> Progress:
    """A progress display with rate and time left; tasks take the fields `unit=` and `note=`."""
    return ProgressDisplay(console=console)
