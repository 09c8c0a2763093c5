"""The base class of all settings: expands `~` in paths and refuses numbers that are out of range."""

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
"""Fields with paths, also in the forms `NAME=PATH` and `PATH + PATH`."""
_HOME = re.compile(r"(^|=|local-dir:|\+ )(~[^/]*)(?=/|$)")
MAXIMA = {
    "seed": 2**64 - 1, "size": 16_384, "max_side": 65_535, "epochs": 100_000, "teacher_epochs": 100_000,
    "batch_size": 2**20, "crops": 65_535, "num_workers": 1024, "processes": 1024, "projection": 2**16,
    "fewshot_trials": 100_000, "jpeg_quality": 100, "shard_megabytes": 2**20, "max_kl": math.inf,
    "checkpoint_minutes": math.inf,
}  # fmt: skip
"""Largest value by field; of other fields `MAX_INT` for whole numbers and `MAX_FLOAT` for others."""
MAX_INT, MAX_FLOAT = 2**31 - 1, 1e100


class BaseConfig:
    """Base class of all settings, from a recipe, flags or Python. Raises UserError naming the field out of range."""

    __slots__ = ()

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):  # pyright: ignore[reportArgumentType]
            value = getattr(self, field.name)
            if field.name in PATHS:
                object.__setattr__(self, field.name, expand_home(value))
            items = value.values() if isinstance(value, dict) else value if isinstance(value, tuple) else (value,)
            for item in items:
                if isinstance(item, int | float) and not isinstance(item, bool):
                    _check_range(field.name, item)


def expand_home(value: Any) -> Any:
    """A path, or a tuple of paths, with `~` and `~user` expanded; anything else unchanged."""
    if isinstance(value, tuple):
        return tuple(expand_home(item) for item in value)
    if not isinstance(value, str) or "~" not in value:
        return value
    return _HOME.sub(lambda match: match[1] + os.path.expanduser(match[2]), value)


def parse_named_values(
    field: str, entries: Iterable[str], form: str, known: Collection[str] | None = None
) -> dict[str, str]:
    """["NAME=VALUE"] to {name: value}, in the same order.

    form: a description of an entry, for the message. known: the allowed names; None allows any. Raises UserError for
    any other form or name, and for duplicate names.
    """
    values: dict[str, str] = {}
    for entry in entries:
        name, _, value = entry.partition("=")
        if not name or not value or (known is not None and name not in known):
            names = f", with a NAME of {', '.join(known)}" if known is not None else ""
            raise UserError(f"{field}: {entry!r} must be {form}{names}")
        if name in values:
            raise UserError(f"{field}: two are called {name!r}; each needs a name of its own")
        values[name] = value
    return values


def split_name(entry: str) -> tuple[str, str]:
    """`NAME=PATH` as (name, path); the name of a path or URL without one is its last part.

    An entry that exists as a path, or has a slash before its first `=`, is a path that contains `=`.
    """
    name, equals, path = entry.partition("=")
    if not equals or "/" in name or Path(entry).exists():
        return Path(entry).name or Path(entry).resolve().name, entry
    return name, path


def _check_range(field: str, value: float) -> None:
    maximum = MAXIMA.get(field, MAX_INT if isinstance(value, int) else MAX_FLOAT)
    if isinstance(value, float) and (math.isnan(value) or math.isinf(value) > math.isinf(maximum)):
        raise UserError(f"{field}: {value} is not a finite number; give one")
    if abs(value) > maximum:
        shown = value if abs(value) < 2**128 else "so large a number"
        raise UserError(f"{field}: {shown} makes no sense; it must be {maximum} or less")


def check_minimum(config: Any, table: str = "", **minima: float) -> None:
    """Raises UserError naming the first of these fields, and the `table.` it is in, that is below its minimum."""
    for field, value in minima.items():
        if not getattr(config, field) >= value:
            raise UserError(f"{table}{field}: {getattr(config, field)} makes no sense; it must be {value} or more")
