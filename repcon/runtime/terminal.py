"""A console that shows any text safely, in any encoding, and whose failure stops no work."""

import contextlib
import errno
import os
import re
from collections.abc import Iterable
from typing import IO, Any, cast

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

_UNSHOWN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # C0 without tab and line feed, DEL, C1
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # directions of writing
    "\u2028\u2029\ufeff\U000e0000-\U000e007f"  # separators, byte order mark, tags
    "\ud800-\udfff]"  # bytes of a name that are not UTF-8
)
_PLAIN = str.maketrans({"±": "+-", "…": "...", "✓": "*", "µ": "u", "×": "x", "–": "-", "•": "*"})  # noqa: RUF001
"""What stands for a character where the terminal's encoding lacks it; `?` for all others."""


def printable(text: str) -> str:
    """The text with control characters, changes of direction and lone surrogates written out, as in `\\x1b`.

    Tab and line feed stay.
    """
    return _UNSHOWN.sub(_written_out, text)


def one_line(text: str) -> str:
    """`printable` text on one line."""
    return printable(" ".join(text.split("\n")))


def _written_out(found: re.Match[str]) -> str:
    code = ord(found[0])
    if 0xDC80 <= code <= 0xDCFF:  # surrogateescape's: one byte
        code -= 0xDC00
    return f"\\x{code:02x}" if code <= 0xFF else f"\\u{code:04x}" if code <= 0xFFFF else f"\\U{code:08x}"


class Terminal(Console):
    """rich's console for text of any origin.

    Control characters in what is printed are written out, so that a class or file name cannot steer the terminal. What
    the stream's encoding lacks is replaced. A stream that cannot be written (a full disk, a closed pipe) is given up:
    `lost` says why, and the work goes on.
    """

    lost: OSError | None = None

    @property
    def file(self) -> IO[str]:
        """Where the console writes, as a stream that does not raise."""
        return cast(IO[str], _Stream(super().file, self))

    @file.setter
    def file(self, new_file: IO[str]) -> None:
        self._file = new_file

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """rich's segments, their text `printable`."""
        for segment in super().render(renderable, options):
            plain = segment.text if segment.control else printable(segment.text)
            yield segment if plain is segment.text else Segment(plain, segment.style)

    def render_str(self, text: str, **how: Any) -> Text:
        """rich's, of `printable` text: so that cells are as wide as what they show."""
        return super().render_str(printable(text), **how)

    def give_up(self, stream: Any, error: OSError) -> None:
        """Sends what is still to come to nowhere; also what Python flushes at its end."""
        self.lost = self.lost or error
        with contextlib.suppress(OSError, ValueError, AttributeError):
            if stream.fileno() in (1, 2):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, stream.fileno())
                os.close(nowhere)
                stream.flush()


class _Stream:
    """A text stream whose `write` and `flush` do not raise."""

    def __init__(self, stream: Any, console: Terminal) -> None:
        self._stream, self._console = stream, console

    def write(self, text: str) -> int:
        """Writes what the encoding has, and replaces the rest."""
        if self._console.lost is None:
            try:
                self._stream.write(_encodable(text, getattr(self._stream, "encoding", None) or "utf-8"))
            except OSError as error:
                self._console.give_up(self._stream, error)
            except ValueError as error:  # closed
                self._console.give_up(self._stream, OSError(errno.EBADF, str(error)))
        return len(text)

    def flush(self) -> None:
        """Of what was written."""
        if self._console.lost is None:
            try:
                self._stream.flush()
            except OSError as error:
                self._console.give_up(self._stream, error)
            except ValueError as error:
                self._console.give_up(self._stream, OSError(errno.EBADF, str(error)))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _encodable(text: str, encoding: str) -> str:
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return text.translate(_PLAIN).encode(encoding, "replace").decode(encoding)
    return text
