"""Text, JSON and TOML of unknown origin: read within bounds, with one kind of error."""

import errno
import json
import math
import os
import stat
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from repcon.runtime.terminal import printable

MOST_BYTES = 64 * 2**20
MOST_DEPTH, MOST_VALUES = 24, 200_000
LONGEST_TEXT, LONGEST_KEY = 20_000, 300
LARGEST = 1e100
"""Numbers beyond it are shown, but not reckoned or drawn with."""


class UnreadableError(ValueError):
    """The reason why a file or text cannot be taken, without the file's name."""


def read_text(path: str | Path, most: int = MOST_BYTES) -> str:
    """A regular file's UTF-8 text, a byte order mark left out. Bytes that are not UTF-8 become lone surrogates.

    Raises UnreadableError for what is no file, larger than `most` bytes, or cannot be read.
    """
    try:
        with open(path, "rb", opener=_at_once) as file:
            held = file.read(most + 1)
    except OSError as error:
        raise UnreadableError(error.strerror or str(error)) from error
    except ValueError as error:  # a zero byte in the name
        raise UnreadableError(str(error)) from error
    if len(held) > most:
        raise UnreadableError(f"larger than {most // 2**20} MiB")
    return held.decode("utf-8", "surrogateescape").removeprefix("\ufeff")


def _at_once(path: str, flags: int) -> int:
    """Opens without waiting for the writer of a FIFO, and refuses what is no regular file."""
    descriptor = os.open(path, flags | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file")
    return descriptor


def parse_json(text: str) -> Any:
    """The value. Raises UnreadableError for all that Python's reader cannot take, its recursion and digits included."""
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
    """The table. Raises UnreadableError as `parse_json`."""
    try:
        return tomllib.loads(text)
    except RecursionError as error:
        raise UnreadableError("nested too deeply") from error
    except ValueError as error:
        raise UnreadableError(f"not valid TOML: {error}") from error


def showable(value: Any) -> Any:
    """JSON or TOML as plain values that can be shown and drawn: texts `printable` and cut, numbers finite or as text.

    Raises UnreadableError for more than `MOST_DEPTH` levels or `MOST_VALUES` values.
    """
    return _showable(value, 0, [MOST_VALUES])


def _showable(value: Any, depth: int, left: list[int]) -> Any:
    left[0] -= 1
    if depth > MOST_DEPTH:
        raise UnreadableError("nested too deeply")
    if left[0] < 0:
        raise UnreadableError(f"more than {MOST_VALUES:,} values")
    if isinstance(value, Mapping):
        return {_cut(str(key), LONGEST_KEY): _showable(held, depth + 1, left) for key, held in value.items()}
    if isinstance(value, list | tuple):
        return [_showable(held, depth + 1, left) for held in value]
    if value is None or isinstance(value, bool):
        return value
    return _number(value) if isinstance(value, int | float) else _cut(str(value), LONGEST_TEXT)


def _number(value: int | float) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if abs(value) <= LARGEST:
        return value
    return f"{value:.6g}" if isinstance(value, float) else _cut(str(value), 24)


def _cut(text: str, longest: int) -> str:
    return printable(text if len(text) <= longest else text[: longest - 1] + "…")
