"""Figures as tables: flattened, written with their units, and runs side by side."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeGuard

from repcon.reports.plots import Interval

ENDS = (("_low", "_high"), ("_q20", "_q80"), ("_20", "_80"))
"""What a benchmark calls the ends of a figure's interval, or its 20 and 80 % quantiles."""
LONGEST = 8
"""Items of a list that a table shows."""
CONTAINERS = ("heads", "metrics", "versions")
"""Parts of a nested figure's name that say nothing to a reader."""
UNITS = {"_us": "µs", "_ms": "ms", "_mb": "MB", "_gb": "GB", "_points": "points", "_nat": "nat"}
"""What figures are measured in whose names say so at their end."""
IN_NAT = r"(^|.* / )(loss( / .*)?|(.*_)?kl(_\w+)?)"
"""Names of losses, of all heads or of one, and of KL."""
SHARES = ("_share", "agreement", "mass", "validation / knn")
"""Ends of the names of shares."""
MARKED = "Marked where the interval leaves that of the first column; a figure without an interval is never marked."
"""The note under a table whose cells have a `mark` beside the first column."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One cell; `mark` (`better`, `higher`, `reached`, ...) is a word, so that colour is not needed."""

    text: str
    detail: str = ""
    """Shown smaller, on a line of its own."""
    hint: str = ""
    """Shown when pointed at: a figure's name as the file has it."""
    mark: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Rows of cells under column titles; the first cell of a row is its name."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str | Cell]], note: str = "") -> Table:
    """A table from plain words and cells."""
    cells = tuple(tuple(cell if isinstance(cell, Cell) else Cell(text=cell) for cell in row) for row in rows)
    return Table(title=title, columns=tuple(columns), rows=cells, note=note)


def flat(figures: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested figures under one name each, `outer / inner`; an interval stays one figure, a list stays whole."""
    found: dict[str, Any] = {}
    for name, value in figures.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping) and (interval := as_interval(value)):
            found[key] = interval
        elif isinstance(value, Mapping):
            found |= flat(value, f"{key} / ")
        else:
            found[key] = value
    return joined(found)


def joined(figures: Mapping[str, Any]) -> dict[str, Any]:
    """`name`, `name_low` and `name_high` (or quantiles) as one figure with its interval; `time_us` and
    `time_spread_us`, a list of both ends, likewise."""
    found, taken = dict(figures), set[str]()
    for name, value in figures.items():
        stem, _, unit = name.rpartition("_")
        ends = figures.get(f"{stem}_spread_{unit}")
        if isinstance(ends, list | tuple) and (interval := _interval([value, *ends])):
            found[name] = interval
            taken.add(f"{stem}_spread_{unit}")
        for low, high in ENDS:
            if interval := _interval([value, figures.get(name + low), figures.get(name + high)]):
                repeats = figures.get(f"{name}_repeats")
                found[name] = replace(interval, repeats=repeats) if isinstance(repeats, int) else interval
                taken |= {name + low, name + high, f"{name}_repeats"}
                break
    return {name: value for name, value in found.items() if name not in taken}


def as_interval(value: Any) -> Interval | None:
    """`{"mean": ..., "low": ..., "high": ...}` or `{"median": ..., "q20": ..., "q80": ...}` as an interval."""
    if not isinstance(value, Mapping):
        return None
    for keys in (("mean", "low", "high"), ("median", "low", "high"), ("median", "q20", "q80")):
        if interval := _interval([value.get(key) for key in keys]):
            return interval
    return None


def _interval(parts: Sequence[Any]) -> Interval | None:
    numbers = [float(part) for part in parts if is_number(part)]
    return Interval(mean=numbers[0], low=numbers[1], high=numbers[2]) if len(numbers) == 3 else None


def is_number(value: Any) -> TypeGuard[int | float]:
    """A figure, as JSON gives it; true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def words(name: str, value: Any) -> str:
    """The value as it is shown; the name's end tells the unit (`_bytes`, `_seconds`, `_share`, ...)."""
    if isinstance(value, Interval):
        if value.repeats == 1:
            return f"{_number(name, value.mean)} (measured once)"
        repeats = f", {value.repeats} repeats" if value.repeats else ""
        return f"{_number(name, value.mean)} ({_number(name, value.low)} to {_number(name, value.high)}{repeats})"
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    if is_number(value):
        return _number(name, value)
    if isinstance(value, list | tuple):
        between = "; " if any(isinstance(item, Mapping) for item in value) else ", "
        shown = between.join(words(name, item) for item in value[:LONGEST])
        return shown + (f", … ({len(value):,} in all)" if len(value) > LONGEST else "")
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {words(str(key), item)}" for key, item in value.items())
    text = str(value)
    return f"{text[:16]}…" if re.fullmatch("[0-9a-f]{32,}", text) else text or "-"


def _number(name: str, value: float) -> str:
    if not math.isfinite(value):
        return "-" if math.isnan(value) else "∞" if value > 0 else "-∞"
    if re.search(r"(^|_)bytes($|_)", name.rpartition(" / ")[2]) and not name.endswith("_growth"):
        return size(value) + ("/s" if "per_second" in name else "")
    if name.endswith("seconds"):
        return duration(value)
    if name.endswith(SHARES) and 0 <= value <= 1:
        return f"{100 * value:.1f} %"
    if name.endswith("accuracy"):
        return f"{value:.1f} %"
    in_nat = "nat" if re.fullmatch(IN_NAT, name) else ""
    if unit := next((unit for ending, unit in UNITS.items() if name.endswith(ending)), in_nat):
        return f"{value:,.4g} {unit}" if abs(value) < 10_000 else f"{value:,.0f} {unit}"
    if isinstance(value, int) or (value == int(value) and abs(value) >= 1000):
        return f"{int(value):,}"
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"


def nat(value: float | None) -> str:
    """A loss in nat: `1.3e-05`, a plain `0`, and `unknown` where it cannot be told."""
    return "unknown" if value is None else "0" if value == 0 else f"{value:.1e}"


def readable(name: str) -> str:
    """A figure's name in words, without the unit that its value is shown with: `memory_bytes` is `memory`.

    Only names like those of a program are changed; `American_Goldfinch` stays.
    """
    parts = [part for part in name.split(" / ") if part not in CONTAINERS] or [name]
    if re.fullmatch(r"([a-z]\w*)_bytes", parts[-1]):
        parts[-1] = parts[-1].removesuffix("_bytes")
    parts[-1] = re.sub(r"(^|_)seconds$", r"\1time", parts[-1])
    parts[-1] = next((parts[-1].removesuffix(end) for end in UNITS if parts[-1].endswith(end)), parts[-1])
    return " / ".join(part.replace("_", " ") if part == part.lower() else part for part in parts)


def size(value: float) -> str:
    """Bytes for people: `13.2 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(value) < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"


def duration(seconds: float) -> str:
    """Seconds for people: `41 ms`, `3.2 s`, `4 min 10 s`, `2 h 5 min`."""
    if seconds < 1:
        return f"{1000 * seconds:.3g} ms"
    if seconds < 60:
        return f"{seconds:.3g} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def listing(figures: Mapping[str, Any]) -> Table:
    """Every figure of one source, a row each."""
    rows = [(figure(name), words(name, value)) for name, value in flat(figures).items()]
    return table("", ("figure", "value"), rows)


def figure(name: str) -> Cell:
    """The first cell of a figure's row."""
    text = readable(name)
    return Cell(text=text, hint=name if name != text else "")


def settings(title: str, config: Mapping[str, Any]) -> Table:
    """A recipe, a row for each key, as the recipe calls it."""
    return table(
        title, ("setting", "value"), [(_key(name), words(name, value)) for name, value in flat(config).items()]
    )


def _key(name: str) -> str:
    return name.replace(" / ", ".")


def side_by_side(title: str, sources: Mapping[str, Mapping[str, Any]], note: str = "") -> Table:
    """Figures in rows, runs in columns. A run is marked where its interval leaves the first run's out."""
    figures = {name: flat(values) for name, values in sources.items()}
    names = list(dict.fromkeys(name for values in figures.values() for name in values))
    first = next(iter(figures.values()))
    rows: list[list[str | Cell]] = []
    for name in names:
        row: list[str | Cell] = [figure(name)]
        for values in figures.values():
            text = words(name, values[name]) if name in values else ""
            row.append(Cell(text=text, mark=mark(values.get(name), first.get(name))))
        rows.append(row)
    return table(title, ("figure", *figures), rows, note)


def mark(value: Any, other: Any) -> str:
    """`higher` or `lower` where two intervals do not touch; nothing where the noise is not known."""
    if not (isinstance(value, Interval) and isinstance(other, Interval)):
        return ""
    return "higher" if value.low > other.high else "lower" if value.high < other.low else ""


def differing(title: str, sources: Mapping[str, Mapping[str, Any]]) -> Table | None:
    """Only the settings in which the sources differ; None where they agree."""
    held = {name: flat(values) for name, values in sources.items()}
    keys = dict.fromkeys(key for values in held.values() for key in values)
    missing = object()
    rows = [
        [_key(key), *(words(key, values[key]) if key in values else "" for values in held.values())]
        for key in keys
        if any(values.get(key, missing) != next(iter(held.values())).get(key, missing) for values in held.values())
    ]  # fmt: skip
    return table(title, ("setting", *held), rows) if rows else None
