"""Text for people: safe to print, short, with units."""

import re
from collections.abc import Sequence

_UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # C0 without tab and line feed, DEL, C1
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # directions of writing
    "\u2028\u2029\ufeff\U000e0000-\U000e007f"  # separators, byte order mark, tags
    "\ud800-\udfff]"  # bytes of a name that are not UTF-8
)


def printable(text: str) -> str:
    """The text with control characters, changes of direction and lone surrogates written out, as in `\\x1b`.

    Tab and line feed stay.
    """
    return _UNPRINTABLE.sub(_escape, text)


def one_line(text: str) -> str:
    """`printable` text on one line."""
    return printable(" ".join(text.split("\n")))


def _escape(found: re.Match[str]) -> str:
    code = ord(found[0])
    if 0xDC80 <= code <= 0xDCFF:  # surrogateescape's: one byte
        code -= 0xDC00
    return f"\\x{code:02x}" if code <= 0xFF else f"\\u{code:04x}" if code <= 0xFFFF else f"\\U{code:08x}"


def abbreviate(names: Sequence[str]) -> str:
    """The first three names, for a line in which there is no room for all."""
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


def shorten(text: str, length: int) -> str:
    """The text, or its beginning and an ellipsis, `length` characters together."""
    return text if len(text) <= length else f"{text[: length - 1]}…"


def format_bytes(count: float) -> str:
    """A number of bytes as `13.2 MB`, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def format_duration(seconds: float) -> str:
    """Seconds as `41 ms`, `3.2 s`, `4 min 10 s`, `2 h 5 min`."""
    if seconds < 0.9995:
        return f"{1000 * seconds:.3g} ms"
    if seconds < 59.95:
        return f"{seconds:.3g} s"
    rounded = round(seconds)
    if rounded < 3600:
        return f"{rounded // 60} min {rounded % 60} s"
    return f"{rounded // 3600} h {rounded % 3600 // 60} min"
