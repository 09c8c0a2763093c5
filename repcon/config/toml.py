"""Recipes: read from TOML, checked against a configuration, written back."""

import math
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

import cattrs
import tomli_w
from cattrs.v import format_exception, transform_error

from repcon.config.checks import at_home
from repcon.config.schema import AutoBool
from repcon.runtime.errors import UserError
from repcon.runtime.text import printable
from repcon.runtime.untrusted import UnreadableError, parse_toml

Config = TypeVar("Config")


MOST_BYTES = 16 * 2**20
"""Of a recipe."""


def read_toml(path: str | Path) -> dict[str, Any]:
    """The recipe's plain values, before they are checked against a configuration.

    UTF-8, also with a byte order mark, or UTF-16 with one, as some editors of Windows write. Raises UserError.
    """
    place = at_home(str(path))
    try:
        with open(place, "rb") as file:
            held = file.read(MOST_BYTES + 1)
        if len(held) > MOST_BYTES:
            raise UserError(f"{path}: cannot read the recipe (larger than {MOST_BYTES // 2**20} MiB)")
        marked = held.startswith((b"\xff\xfe", b"\xfe\xff"))
        text = held.decode("utf-16" if marked else "utf-8-sig")
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not text in UTF-8"
        raise UserError(f"{path}: cannot read the recipe ({reason})") from error
    except ValueError as error:  # a zero byte in the name
        raise UserError(f"{path}: cannot read the recipe ({error})") from error
    try:
        return parse_toml(text)
    except UnreadableError as error:
        raise UserError(f"{path}: {error}") from error


def parse(kind: type[Config], values: Mapping[str, Any], origin: str) -> Config:
    """Builds `kind` from plain values; `origin` is the file named in errors.

    Raises UserError naming it and each unknown key, missing key or wrong type.
    """
    try:
        return _converter().structure(_completed(values, kind), kind)
    except RecursionError as error:
        raise UserError(f"{origin}: nested too deeply") from error
    except cattrs.BaseValidationError as error:
        problems = "; ".join(transform_error(error, format_exception=_describe))
        problems = problems.replace("$.", "").replace(" @ $", "")
        raise UserError(f"{origin}: {printable(problems)}") from error


def dump(config: Any) -> str:
    """The configuration as TOML, which `load` reads back equal."""
    return tomli_w.dumps(_converter().unstructure(config))


def _completed(values: Mapping[str, Any], kind: type) -> dict[str, Any]:
    """A table that is given in part keeps the rest of its field's default, which may differ from its type's."""
    result = dict(values)
    for each in fields(kind):
        given = result.get(each.name)
        if isinstance(given, Mapping) and each.default is not MISSING and is_dataclass(each.default):
            result[each.name] = _merged(_converter().unstructure(each.default), given)
    return result


def _merged(default: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """`given` over `default`, tables within tables as well."""
    result = dict(default)
    for name, value in given.items():
        held = result.get(name)
        result[name] = _merged(held, value) if isinstance(held, Mapping) and isinstance(value, Mapping) else value
    return result


@cache
def _converter() -> cattrs.Converter:
    """Made once: making one, and what it compiles for each kind, takes a hundred times as long as using it."""
    converter = cattrs.Converter(forbid_extra_keys=True)
    for scalar in (bool, int, float, str):
        converter.register_structure_hook(scalar, _exact)
    inside = converter._structure_tuple  # pyright: ignore[reportPrivateUsage]

    def listed(value: Any, kind: Any) -> Any:
        """A text is no list of its letters."""
        if isinstance(value, Mapping):
            raise TypeError("a list of tables is written with double brackets, as in [[teachers]] and [[heads]]")
        if not isinstance(value, list | tuple):
            raise TypeError(f"expected a list, not {_short(value)}")
        return inside(value, kind)

    converter.register_structure_hook_func(lambda kind: get_origin(kind) is tuple, listed)
    one_or_several = str | tuple[str, ...]

    def texts(value: Any, _: Any) -> Any:
        return value if isinstance(value, str) else listed(value, tuple[str, ...])

    converter.register_structure_hook_func(lambda kind: kind == one_or_several, texts)
    converter.register_structure_hook_func(lambda kind: kind == AutoBool, _bool_or_auto)
    return converter


def _exact(value: Any, kind: type) -> Any:
    """No coercion: `epochs = "3"` is a mistake to report, not a three."""
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value) if abs(value) < 2**1000 else math.copysign(math.inf, value)
    if type(value) is not kind:
        raise TypeError(f"expected {kind.__name__}, not {_short(value)}")
    return value


def _bool_or_auto(value: Any, kind: Any) -> bool | str:
    if value != "auto" and not isinstance(value, bool):
        raise TypeError(f"expected true, false or 'auto', not {_short(value)}")
    return value


def _short(value: Any) -> str:
    """What was found, for a message."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:199]}…"


def _describe(error: BaseException, kind: type | None) -> str:
    if isinstance(error, cattrs.ForbiddenExtraKeysError):
        keys = ", ".join(sorted(error.extra_fields))
        known = ", ".join(sorted(error.cl.__dataclass_fields__)) if is_dataclass(error.cl) else ""
        return f"unknown key {keys} (known: {known})"
    if isinstance(error, KeyError):
        return f"missing key {error}"
    if isinstance(error, TypeError | UserError):
        return str(error)
    if get_origin(kind) is Literal:
        return f"expected one of {', '.join(map(str, get_args(kind)))}"
    return format_exception(error, kind)
