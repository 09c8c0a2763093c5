"""Read text, JSON and TOML of unknown origin, with limits and one kind of error."""

import json
import math
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from repcon.runtime.local_files import read_file
from repcon.runtime.text import printable, shorten

MAX_BYTES = 64 * 2**20
MAX_TOML_BYTES = 16 * 2**20
"""Python parses 2 MB of TOML a second, and JSON 20 times as fast."""
MAX_DEPTH, MAX_VALUES = 24, 200_000
MAX_TEXT, MAX_KEY = 20_000, 300
MAX_NUMBER = 1e100
"""Larger numbers are shown as text, and not plotted or computed with."""

_KEY_PART = r"""(?:[\w-]++|"(?:[^"\\\n]|\\.)*+"?|'[^'\n]*+'?)"""
_DOT = r"[ \t]*+\.[ \t]*+"
_TOKEN = re.compile(
    r'#[^\n]*+|"{3}(?:[^\\]|\\.)*?(?:"{3,5}+|\Z)|'  # comments, and texts of several lines
    r"'{3}.*?(?:'{3,5}+|\Z)|"
    rf"(?P<deep>{_KEY_PART}(?:{_DOT}{_KEY_PART}){{{MAX_DEPTH}}})|{_KEY_PART}(?:{_DOT}{_KEY_PART})*+",
    re.DOTALL,
)
"""What of TOML may hold dots: comments, texts, numbers, keys. `deep` is a dotted key that nests too deeply: the time
that one takes to parse grows with the square of its parts."""


class UnreadableError(ValueError):
    """The reason why a file or text cannot be read, without the file's name."""


def read_text(path: str | Path, max_bytes: int = MAX_BYTES) -> str:
    """A regular file's UTF-8 text without byte order mark. Bytes that are not UTF-8 become lone surrogates.

    Raises UnreadableError for a file that is not regular, is larger than `max_bytes`, or cannot be read.
    """
    try:
        held = read_file(path, max_bytes + 1)
    except OSError as error:
        raise UnreadableError(error.strerror or str(error)) from error
    except ValueError as error:  # a zero byte in the name
        raise UnreadableError(str(error)) from error
    if len(held) > max_bytes:
        raise UnreadableError(f"larger than {max_bytes // 2**20} MiB")
    return held.decode("utf-8", "surrogateescape").removeprefix("\ufeff")


def parse_json(text: str) -> Any:
    """Parses JSON. Raises UnreadableError for invalid or too deeply nested text, and numbers with too many digits."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise UnreadableError("nested too deeply") from error
    except ValueError as error:
        raise UnreadableError(f"not JSON: {error}") from error


def read_json(path: str | Path) -> Any:
    """The value in a regular file. Raises UnreadableError as `read_text` and `parse_json`, and for other than UTF-8."""
    text = read_text(path)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UnreadableError("not UTF-8") from error
    return parse_json(text)


def parse_toml(text: str) -> dict[str, Any]:
    """Parses TOML. Raises UnreadableError as `parse_json`, and for text above `MAX_TOML_BYTES`."""
    if len(text) > MAX_TOML_BYTES:
        raise UnreadableError(f"larger than {MAX_TOML_BYTES // 2**20} MiB")
    if any(found["deep"] for found in _TOKEN.finditer(text)):
        raise UnreadableError("nested too deeply")
    try:
        return tomllib.loads(text)
    except RecursionError as error:
        raise UnreadableError("nested too deeply") from error
    except ValueError as error:
        raise UnreadableError(f"not valid TOML: {error}") from error


def showable(value: Any) -> Any:
    """Parsed JSON or TOML as values that can be shown and plotted: `printable`, truncated text and finite numbers.

    Raises UnreadableError for more than `MAX_DEPTH` levels or `MAX_VALUES` values.
    """
    return _showable(value, 0, [MAX_VALUES])


def _showable(value: Any, depth: int, left: list[int]) -> Any:
    left[0] -= 1
    if depth > MAX_DEPTH:
        raise UnreadableError("nested too deeply")
    if left[0] < 0:
        raise UnreadableError(f"more than {MAX_VALUES:,} values")
    if isinstance(value, Mapping):
        return {_truncate(str(key), MAX_KEY): _showable(held, depth + 1, left) for key, held in value.items()}
    if isinstance(value, list | tuple):
        return [_showable(held, depth + 1, left) for held in value]
    if value is None or isinstance(value, bool):
        return value
    return _number(value) if isinstance(value, int | float) else _truncate(str(value), MAX_TEXT)


def _number(value: int | float) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if abs(value) <= MAX_NUMBER:
        return value
    return f"{value:.6g}" if isinstance(value, float) else _truncate(str(value), 24)


def _truncate(text: str, max_length: int) -> str:
    return printable(shorten(text, max_length))
