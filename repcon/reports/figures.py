"""Typed figures: what a report shows as one value, with its name, unit and format.

The sources are JSON of any origin, so a value may be anything that JSON holds.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, TypeGuard

from repcon.runtime.text import format_bytes, format_duration

LONGEST_LIST = 8
"""Items of a list that are shown."""
_INTERVAL_KEYS = (("mean", "low", "high"), ("median", "low", "high"), ("median", "q20", "q80"))
_HASH = re.compile("[0-9a-f]{32,}")


class Unit(Enum):
    """The unit of a figure's number. The value is the symbol that follows it, where one does."""

    NONE = ""
    BYTES = "B"
    BYTES_PER_SECOND = "B/s"
    SECONDS = "s"
    FRACTION = "of 1"
    """A number from 0 to 1, shown in per cent."""
    PERCENT = "%"
    MICROSECONDS = "µs"
    MILLISECONDS = "ms"
    MEGABYTES = "MB"
    GIGABYTES = "GB"
    POINTS = "points"
    NAT = "nat"


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A measured value with its bounds."""

    mean: float
    low: float
    high: float
    repeats: int = 0
    """Number of measurements, 0 where it is not known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One figure of a source."""

    name: str
    """As the file has it; parts of nested figures are joined by ` / `."""
    label: str
    """As people read it."""
    value: Any
    """A number, an Interval, or anything else that JSON holds."""
    unit: Unit = Unit.NONE

    @property
    def text(self) -> str:
        """The value with its unit."""
        return format_value(self.value, self.unit)


Figures = Mapping[str, Figure]
"""Figures by name."""


def is_number(value: Any) -> TypeGuard[int | float]:
    """Whether JSON gave a number; true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def as_mapping(value: Any) -> Mapping[str, Any]:
    """The object that JSON gave; an empty one where it gave anything else."""
    return value if isinstance(value, Mapping) else {}


def as_interval(value: Any) -> Interval | None:
    """`{"mean": ..., "low": ..., "high": ...}` or `{"median": ..., "q20": ..., "q80": ...}` as an interval."""
    if not isinstance(value, Mapping):
        return None
    return next((found for keys in _INTERVAL_KEYS if (found := interval_of([value.get(key) for key in keys]))), None)


def interval_of(values: Sequence[Any]) -> Interval | None:
    """[mean, low, high] as an interval; None unless all three are numbers."""
    numbers = [float(value) for value in values if is_number(value)]
    return Interval(mean=numbers[0], low=numbers[1], high=numbers[2]) if len(numbers) == 3 else None


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values under one name each, `outer / inner`; an interval stays one value, a list stays whole."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        key = f"{prefix}{name}"
        if not isinstance(value, Mapping):
            found[key] = value
        elif interval := as_interval(value):
            found[key] = interval
        else:
            found |= flatten(value, f"{key} / ")
    return found


def format_value(value: Any, unit: Unit = Unit.NONE) -> str:
    """A value of any kind; an interval as `1 (0.5 to 1.5)`, a long list by its first items."""
    if isinstance(value, Interval):
        mean, low, high = (format_number(number, unit) for number in (value.mean, value.low, value.high))
        if value.repeats == 1:
            return f"{mean} (measured once)"
        return f"{mean} ({low} to {high}{f', {value.repeats} repeats' if value.repeats else ''})"
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    if is_number(value):
        return format_number(value, unit)
    if isinstance(value, list | tuple):
        separator = "; " if any(isinstance(item, Mapping) for item in value) else ", "
        shown = separator.join(format_value(item, unit) for item in value[:LONGEST_LIST])
        return shown + (f", … ({len(value):,} in all)" if len(value) > LONGEST_LIST else "")
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {format_value(item, unit)}" for key, item in value.items())
    text = str(value)
    return f"{text[:16]}…" if _HASH.fullmatch(text) else text or "-"


def format_number(value: float, unit: Unit = Unit.NONE) -> str:
    """A number with its unit, in about four digits."""
    if not math.isfinite(value):
        return "-" if math.isnan(value) else "∞" if value > 0 else "-∞"
    match unit:
        case Unit.BYTES:
            return format_bytes(value)
        case Unit.BYTES_PER_SECOND:
            return f"{format_bytes(value)}/s"
        case Unit.SECONDS:
            return format_duration(value)
        case Unit.FRACTION if 0 <= value <= 1:
            return f"{100 * value:.1f} %"
        case Unit.PERCENT:
            return f"{value:.1f} %"
        case Unit.NONE | Unit.FRACTION:
            return _plain_number(value)
        case _:
            digits = f"{value:,.4g}" if abs(value) < 10_000 else f"{value:,.0f}"
            return f"{digits} {unit.value}"


def _plain_number(value: float) -> str:
    if isinstance(value, int) or (value == int(value) and abs(value) >= 1000):
        return f"{int(value):,}"
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"


def format_loss(value: float | None) -> str:
    """A loss in nat without the unit: `1.3e-05`, a plain `0`, `unknown` for None."""
    return "unknown" if value is None else "0" if value == 0 else f"{value:.1e}"
