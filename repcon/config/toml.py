"""Read recipes from TOML, convert them to settings, and write settings as TOML.

cattrs and tomli_w are imported where they are used: `repcon --help` and a command without a recipe need neither.
"""

import math
import os
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args, get_origin

from repcon.config.base import expand_home
from repcon.config.types import AutoBool
from repcon.runtime.errors import UserError
from repcon.runtime.text import printable, shorten
from repcon.runtime.untrusted import MAX_TOML_BYTES, UnreadableError, parse_toml

if TYPE_CHECKING:
    import cattrs

Config = TypeVar("Config")


_MOST_PROBLEMS = 20
"""How many problems a message names; a damaged manifest may have one for every class."""
_LONGEST_PROBLEM = 2_000
"""Characters of a problem; a damaged manifest's may name any number of unknown keys, of any length."""


def read_toml(path: str | Path) -> dict[str, Any]:
    """Read a recipe as plain values, which `parse` converts to settings.

    UTF-8, or UTF-16 with a byte order mark, as some editors on Windows write. Raises UserError naming the file.
    """
    try:
        with open(expand_home(str(path)), "rb") as file:
            content = file.read(MAX_TOML_BYTES + 1)
        if len(content) > MAX_TOML_BYTES:
            raise UserError(f"{path}: cannot read the recipe (larger than {MAX_TOML_BYTES // 2**20} MiB)")
        is_utf16 = content.startswith((b"\xff\xfe", b"\xfe\xff"))
        text = content.decode("utf-16" if is_utf16 else "utf-8-sig")
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
    """Convert plain values to settings of class `kind`; `origin` is the file named in errors.

    Raises UserError naming it and each unknown key, missing key or wrong type.
    """
    import cattrs
    from cattrs.v import transform_error

    try:
        return _converter().structure(_fill_defaults(values, kind), kind)
    except RecursionError as error:
        raise UserError(f"{origin}: nested too deeply") from error
    except cattrs.BaseValidationError as error:
        found = transform_error(error, format_exception=_describe)
        problems = "; ".join(shorten(problem, _LONGEST_PROBLEM) for problem in found[:_MOST_PROBLEMS])
        problems = problems.replace("$.", "").replace(" @ $", "")
        more = f"; and {len(found) - _MOST_PROBLEMS:,} more" if len(found) > _MOST_PROBLEMS else ""
        raise UserError(f"{origin}: {printable(problems)}{more}") from error


def dump(config: Any) -> str:
    """The settings as TOML, from which `parse` gives equal settings."""
    import tomli_w

    return tomli_w.dumps(to_plain(config))


def to_plain(value: Any) -> Any:
    """As a recipe has it: settings as tables, paths as text, at any depth."""
    return _converter().unstructure(value)


def _fill_defaults(values: Mapping[str, Any], kind: type) -> dict[str, Any]:
    """Complete partial tables from their field's default, which may differ from the defaults of its class."""
    result = dict(values)
    for each in fields(kind):
        given = result.get(each.name)
        if isinstance(given, Mapping) and each.default is not MISSING and is_dataclass(each.default):
            result[each.name] = _merge(to_plain(each.default), given)
    return result


def _merge(default: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """`given` over `default`, also within nested tables."""
    result = dict(default)
    for name, value in given.items():
        old = result.get(name)
        result[name] = _merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return result


@cache
def _converter() -> "cattrs.Converter":
    """Cached: building a converter, with the code that it generates per class, takes 100 times as long as using it."""
    import cattrs

    converter = cattrs.Converter(forbid_extra_keys=True)
    for text in (str, os.PathLike):  # str: a field of settings that are given as a dataclass may hold a path as well
        converter.register_unstructure_hook(text, _path_as_text)
    for scalar in (bool, int, float, str):
        converter.register_structure_hook(scalar, _structure_scalar)
    structure_tuple = converter._structure_tuple  # pyright: ignore[reportPrivateUsage]

    def structure_list(value: Any, kind: Any) -> Any:
        """Refuse a string, which cattrs would take as a list of its letters."""
        if isinstance(value, Mapping):
            raise TypeError("a list of tables is written with double brackets, as in [[teachers]] and [[heads]]")
        if not isinstance(value, list | tuple):
            raise TypeError(f"expected a list, not {_abbreviate(value)}")
        return structure_tuple(value, kind)

    converter.register_structure_hook_func(lambda kind: get_origin(kind) is tuple, structure_list)
    str_or_list = str | tuple[str, ...]

    def structure_str_or_list(value: Any, _: Any) -> Any:
        return value if isinstance(value, str) else structure_list(value, tuple[str, ...])

    converter.register_structure_hook_func(lambda kind: kind == str_or_list, structure_str_or_list)
    converter.register_structure_hook_func(lambda kind: kind == AutoBool, _bool_or_auto)
    return converter


def _path_as_text(value: Any) -> Any:
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _structure_scalar(value: Any, kind: type) -> Any:
    """Refuse other types instead of converting them: `epochs = "3"` is an error."""
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value) if abs(value) < 2**1000 else math.copysign(math.inf, value)
    if type(value) is not kind:
        raise TypeError(f"expected {kind.__name__}, not {_abbreviate(value)}")
    return value


def _bool_or_auto(value: Any, kind: Any) -> bool | str:
    if value != "auto" and not isinstance(value, bool):
        raise TypeError(f"expected true, false or 'auto', not {_abbreviate(value)}")
    return value


def _abbreviate(value: Any) -> str:
    """The value for a message, at most 200 characters."""
    return shorten(repr(value), 200)


def _describe(error: BaseException, kind: type | None) -> str:
    """One problem of a recipe, for a message."""
    import cattrs
    from cattrs.v import format_exception

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
