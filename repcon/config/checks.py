"""Checks that every setting goes through, from a recipe, from flags or from Python."""

import dataclasses
import math
import os
import re
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from repcon.runtime.errors import UserError

PATHS = {
    "source", "out", "pack", "store", "records", "html", "data", "proxy", "knn", "cache", "backbone", "backbones",
    "model", "models", "paths", "teachers", "teach", "evaluate", "init_students",
}  # fmt: skip
"""Fields that name files and folders, also as `NAME=PATH` or several joined by ` + `."""
_HOME = re.compile(r"(^|=|local-dir:|\+ )(~[^/]*)(?=/|$)")
LARGEST = {
    "seed": 2**64 - 1, "size": 16_384, "max_side": 65_535, "epochs": 100_000, "teacher_epochs": 100_000,
    "batch_size": 2**20, "crops": 65_535, "num_workers": 1024, "processes": 1024, "projection": 2**16,
    "fewshot_trials": 100_000, "max_kl": math.inf, "checkpoint_minutes": math.inf,
}  # fmt: skip
"""By field; whole numbers that are not listed may reach `MOST`, others `MOST_REAL`."""
MOST, MOST_REAL = 2**31 - 1, 1e100


class Checked:
    """Base of the configurations: expands `~` in paths, and refuses numbers that nothing can be done with."""

    __slots__ = ()

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):  # pyright: ignore[reportArgumentType]
            value = getattr(self, field.name)
            if field.name in PATHS:
                object.__setattr__(self, field.name, at_home(value))
            parts = value.values() if isinstance(value, dict) else value if isinstance(value, tuple) else (value,)
            for part in parts:
                if isinstance(part, int | float) and not isinstance(part, bool):
                    _require_possible(field.name, part)


def at_home(value: Any) -> Any:
    """The path, or a tuple of them, with `~` and `~user` as the shell would have it; anything else as it is."""
    if isinstance(value, tuple):
        return tuple(at_home(part) for part in value)
    if not isinstance(value, str) or "~" not in value:
        return value
    return _HOME.sub(lambda found: found[1] + os.path.expanduser(found[2]), value)


def named_values(field: str, entries: Iterable[str], form: str, known: Collection[str] | None = None) -> dict[str, str]:
    """["NAME=VALUE"] as {name: value}, in the order given.

    form: what each is to look like, for the message. known: the names that may be given; None allows any. Raises
    UserError for another form or name, and for a name that is there twice.
    """
    found: dict[str, str] = {}
    for entry in entries:
        name, _, value = entry.partition("=")
        if not name or not value or (known is not None and name not in known):
            names = f", with a NAME of {', '.join(known)}" if known is not None else ""
            raise UserError(f"{field}: {entry!r} must be {form}{names}")
        if name in found:
            raise UserError(f"{field}: two are called {name!r}; each needs a name of its own")
        found[name] = value
    return found


def split_name(entry: str) -> tuple[str, str]:
    """`NAME=PATH` as (name, path); a path or URL without a name is called by its end.

    What exists as a path, or has a slash before its first `=`, is a path with a `=` of its own.
    """
    name, equals, path = entry.partition("=")
    if not equals or "/" in name or Path(entry).exists():
        return Path(entry).name or Path(entry).resolve().name, entry
    return name, path


def _require_possible(field: str, value: float) -> None:
    most = LARGEST.get(field, MOST if isinstance(value, int) else MOST_REAL)
    if isinstance(value, float) and (math.isnan(value) or math.isinf(value) > math.isinf(most)):
        raise UserError(f"{field}: {value} is no number to reckon with; give a finite one")
    if abs(value) > most:
        shown = value if abs(value) < 2**128 else "so large a number"
        raise UserError(f"{field}: {shown} makes no sense; it must be {most} or less")
