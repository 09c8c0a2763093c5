"""A command's output folder: its config, environment, metrics and results."""

import errno
import fcntl
import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

from repcon.runtime.atomic_files import write_atomic
from repcon.runtime.errors import UserError
from repcon.runtime.local_files import open_regular
from repcon.runtime.system import environment
from repcon.runtime.untrusted import UnreadableError, parse_json, read_text

MARKER = "command"
"""The file of an output folder that names the command that made it."""
RESULTS = "results.json"
"""The file of final results, written last: a run without it has not ended."""


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8 text atomically and durably, as `write_atomic`.

    Lone surrogates, as in file names that are not UTF-8, become the original bytes; `untrusted.read_text` gives the
    same text back.
    """
    write_atomic(path, text.encode("utf-8", "surrogateescape"))


def read_results(folder: str | Path) -> dict[str, Any]:
    """The results of the run that ended in this folder; {} where none has, or its file is damaged."""
    return read_object(Path(folder, RESULTS))


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file of this process's or an earlier one; {} where there is none, or it is damaged."""
    try:
        held = parse_json(read_text(path))
    except UnreadableError:
        return {}
    return held if isinstance(held, dict) else {}


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes JSON with `json_text` and `write_text`."""
    write_text(path, json_text(value))


def json_text(value: Mapping[str, Any]) -> str:
    """Indented JSON, with null in place of NaN and infinity, which JSON does not have."""
    return json.dumps(finite(value), indent=2, default=_plain, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    """Converts values that JSON has no type for: numpy's numbers to numbers, anything else to text."""
    try:
        return finite(float(value))
    except (TypeError, ValueError):
        return str(value)


def finite(value: Any) -> Any:
    """The value with None in place of NaN and infinite numbers, at any depth."""
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(held) for key, held in value.items()}
    return [finite(held) for held in value] if isinstance(value, list | tuple) else value


def require_free(out: str | Path, command: str) -> None:
    """Raises UserError where the folder cannot be the output of this command, new or resumed; writes nothing."""
    if "://" in str(out):
        raise UserError(f"{out}: `repcon {command}` writes to a local folder; copy it there afterwards")
    path = Path(out)
    marker = path / MARKER
    if path.exists() and not path.is_dir():
        raise UserError(f"{path} is a file; name a folder for the output of `repcon {command}`")
    if path.exists() and any(path.iterdir()):
        held = marker.read_text(encoding="utf-8", errors="replace").strip() if marker.is_file() else None
        if held != command:
            what = f"the output of `repcon {held[:20]}`" if held else "other files"
            raise UserError(f"{path} holds {what}; name an empty or new folder for `repcon {command}`")


class RunDir:
    """One command's output folder: `config.toml`, `env.json`, `metrics.jsonl`, `results.json`.

    The folder may be empty, or hold an earlier run of the same command, which is then continued. Any other folder is
    refused, so that no file of the user is overwritten.
    """

    def __init__(
        self,
        out: str | Path,
        command: str,
        config_toml: str,
        *,
        overwrite: bool = False,
        exclusive: bool = False,
        trim: Callable[[Path], None] | None = None,
    ) -> None:
        """overwrite: replace `metrics.jsonl` instead of appending to it. exclusive: refuse a folder in which another
        process is running. trim: called with the path of `metrics.jsonl` before lines are appended.
        """
        require_free(out, command)
        self.path = Path(out)
        marker = self.path / MARKER
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = open_regular(self.path / ".lock", "w", follow_links=False, encoding="ascii") if exclusive else None
        if self._lock is not None and _is_locked(self._lock):
            raise UserError(f"{self.path}: another process is at work there; wait for it, or name another folder")
        write_text(marker, command + "\n")
        write_text(self.path / "config.toml", config_toml)
        write_json(self.path / "env.json", environment())
        metrics = self.path / "metrics.jsonl"
        if trim is not None:
            trim(metrics)
        mode = "w" if overwrite else "a"
        self._metrics: TextIO = open_regular(metrics, mode, follow_links=False, buffering=1, encoding="utf-8")
        self._started = time.monotonic()

    def earlier(self) -> dict[str, Any]:
        """The results of an earlier run that ended here; {} where none has."""
        return read_results(self.path)

    def log(self, event: str, **figures: Any) -> None:
        """Appends a line to `metrics.jsonl`: the event, the seconds since the start, and its figures."""
        line = {"event": event, "seconds": round(time.monotonic() - self._started, 3), **figures}
        try:
            self._metrics.write(json.dumps(finite(line), default=_plain, allow_nan=False) + "\n")
        except OSError as error:
            raise UserError(
                f"{self._metrics.name}: cannot write ({error.strerror}); make room: what was finished is kept, "
                "the same command goes on from there"
            ) from error

    def finish(self, results: Mapping[str, Any]) -> dict[str, Any]:
        """Writes `results.json` and closes `metrics.jsonl`; gives the results back."""
        write_json(self.path / RESULTS, results)
        self._metrics.close()
        if self._lock is not None:
            self._lock.close()
        return dict(results)


def _is_locked(file: TextIO) -> bool:
    """Whether another process holds the lock; else this one takes it until `file` is closed or the process ends.

    Not `atomic_files.lock`: this lock belongs to the process, so that a failed run in a notebook does not lock out the
    next one.
    """
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in (errno.EACCES, errno.EAGAIN)  # any other: a file system without locks
    return False
