"""The console: any text, any encoding, and a stream that cannot be written."""

import errno
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.markup import escape
from rich.table import Table

from repcon.runtime.console import Terminal
from repcon.runtime.text import format_bytes, format_duration, one_line, printable

TITLE = "\x1b]0;OWNED\x07\x1b[2J"


def printed(*parts: object, encoding: str = "utf-8") -> str:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding)
    console = Terminal(file=stream, width=60)
    for part in parts:
        console.print(part)
    stream.flush()
    return raw.getvalue().decode(encoding)


def table(text: str) -> Table:
    grid = Table(title=escape(text))
    grid.add_column(escape(text))
    grid.add_row(escape(text))
    return grid


@given(st.text(st.characters(), max_size=40))
def test_no_text_steers_the_terminal(text: str):
    for shown in (printed(escape(text)), printed(table(text))):
        assert not set(shown) & {chr(code) for code in (*range(9), *range(11, 32), *range(127, 160))}
        assert not any("\u202a" <= letter <= "\u202e" or "\ud800" <= letter <= "\udfff" for letter in shown)


def test_what_is_not_shown_is_written_out():
    assert printable(TITLE) == r"\x1b]0;OWNED\x07\x1b[2J"
    assert printable("caf\udce9") == r"caf\xe9"
    assert printable("a\u202eb\U000e0041") == r"a\u202eb\U000e0041"
    assert printable("as it is: é ± 猫\n\tnext") == "as it is: é ± 猫\n\tnext"
    assert one_line("first\nerror: second") == "first error: second"


def test_styles_and_progress_still_steer():
    stream = io.StringIO()
    console = Terminal(file=stream, force_terminal=True, color_system="standard")
    console.print("[bold]loud[/]")
    console.show_cursor(False)
    assert stream.getvalue() == "\x1b[1mloud\x1b[0m\n\x1b[?25l"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8", "cp1252", "shift-jis"])
def test_every_encoding_can_show_everything(encoding: str):
    shown = printed("87.5 ± 1.6 ✓ 猫 \udce9", table("✓"), encoding=encoding)
    assert "87.5" in shown
    assert "87.5 +- 1.6 *" in printed("87.5 ± 1.6 ✓", encoding="ascii")


class Full(io.StringIO):
    def write(self, text: str) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_stream_that_cannot_be_written_is_given_up():
    console = Terminal(file=Full())
    console.print("one")
    console.print(table("two"))
    assert console.lost is not None
    assert console.lost.errno == errno.ENOSPC
    closed = io.StringIO()
    closed.close()
    console = Terminal(file=closed)
    console.print("one")
    assert console.lost is not None


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_standard_output_ends_nothing():
    script = (
        "from repcon.runtime.console import Terminal\nimport sys\nconsole = Terminal()\n"
        "for _ in range(3): console.print('x' * 9000)\nprint('late')\nsys.stderr.write('done')\n"
    )
    with open("/dev/full", "w") as full:
        ran = subprocess.run(
            [sys.executable, "-c", script], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert (ran.returncode, ran.stderr) == (0, "done")


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (999.6, "1 kB"), (13_240_000, "13.2 MB"), (999_600_000, "1 GB"), (5e12, "5 TB")],
)
def test_bytes_have_three_digits_and_a_unit(count: float, text: str) -> None:
    assert format_bytes(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.041, "41 ms"),
        (0.9999, "1 s"),
        (3.21, "3.21 s"),
        (59.99, "1 min 0 s"),
        (250, "4 min 10 s"),
        (7500, "2 h 5 min"),
    ],
)
def test_durations_have_the_units_of_their_size(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text
