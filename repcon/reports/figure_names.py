"""Figures from the JSON of runs and records, typed by their names.

Runs and environments have the names that repcon's own commands give them (`run_figures`). Names in benchmark records
and other JSON files, which are flat, follow a convention (`record_figures`). A name is words joined by `_`; `bytes`,
`seconds`, `share`, `accuracy`, `kl` and `loss` among them give the unit, and so does a last word `us`, `ms`, `mb`,
`gb`, `points` or `nat`. Ratios (`this_over_that`) and growths have no unit. The bounds of NAME are NAME_low and
NAME_high (95 % interval) or NAME_20 and NAME_80 (quantiles of NAME_repeats measurements).
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from repcon.reports.figures import Figure, Unit, flatten, interval_of

_FIELDS: Mapping[str, tuple[str, Unit]] = {
    "seconds": ("time", Unit.SECONDS),
    "memory_bytes": ("memory", Unit.BYTES),
    "gpu_memory_bytes": ("GPU memory", Unit.BYTES),
    "written_bytes": ("written", Unit.BYTES),
    "megabytes": ("size", Unit.MEGABYTES),
    "data_share": ("waiting for data", Unit.FRACTION),
    "waited_share": ("teachers waiting", Unit.FRACTION),
    "agreement": ("agreement", Unit.FRACTION),
    "knn": ("kNN", Unit.FRACTION),
    "kl": ("KL", Unit.NAT),
    "train_loss": ("training loss", Unit.NAT),
    "validation_loss": ("validation loss", Unit.NAT),
    "validation_accuracy": ("validation accuracy", Unit.PERCENT),
    "power_limit_watts": ("power limit (W)", Unit.NONE),
}
"""By the last part of a figure's name: its label and unit."""
_GROUPS = ("heads", "metrics", "versions")
"""Parts of a nested figure's name that say nothing to a reader."""


def run_figures(results: Mapping[str, Any]) -> dict[str, Figure]:
    """Figures of a run's results or environment by name. A name that is not known is shown as it is, without a unit."""
    return {name: _figure(name, value) for name, value in flatten(results).items()}


def _figure(name: str, value: Any) -> Figure:
    *outer, last = name.split(" / ")
    if "loss" in (name, *outer[:1]):
        label, unit = plain_label(last), Unit.NAT
    else:
        label, unit = _FIELDS.get(last, (plain_label(last), Unit.NONE))
    parts = [*(plain_label(part) for part in outer if part not in _GROUPS), label]
    return Figure(name=name, label=" / ".join(parts), value=value, unit=unit)


def plain_label(name: str) -> str:
    """A program's name in words; names of people's data, such as `American_Goldfinch`, stay."""
    return name.replace("_", " ") if name == name.lower() else name


_BOUNDS = (("_low", "_high"), ("_20", "_80"))
_LAST_WORDS = {
    "us": Unit.MICROSECONDS, "ms": Unit.MILLISECONDS, "mb": Unit.MEGABYTES, "gb": Unit.GIGABYTES,
    "points": Unit.POINTS, "nat": Unit.NAT,
}  # fmt: skip
_WORDS = {
    "bytes": Unit.BYTES, "seconds": Unit.SECONDS, "share": Unit.FRACTION, "agreement": Unit.FRACTION,
    "mass": Unit.FRACTION, "accuracy": Unit.PERCENT, "kl": Unit.NAT, "loss": Unit.NAT,
}  # fmt: skip


def record_figures(values: Mapping[str, Any]) -> dict[str, Figure]:
    """Figures of a record by name; a figure with bounds is one interval. `targets` are left out."""
    shown = {name: value for name, value in values.items() if name != "targets"}
    return {name: record_figure(name, value) for name, value in _with_intervals(flatten(shown)).items()}


def record_figure(name: str, value: Any) -> Figure:
    """One figure of a record."""
    return Figure(name=name, label=label_of(name), value=value, unit=unit_of(name))


def unit_of(name: str) -> Unit:
    """The unit that the name tells."""
    outer, _, last = name.rpartition(" / ")
    words = last.split("_")
    if "over" in words or words[-1] == "growth":
        return Unit.NONE
    if words[-1] in _LAST_WORDS:
        return _LAST_WORDS[words[-1]]
    if "bytes" in words and last.endswith("per_second"):
        return Unit.BYTES_PER_SECOND
    if "per" in words and "bytes" not in words:
        return Unit.NONE
    if outer.rpartition(" / ")[2] == "loss":
        return Unit.NAT
    return next((_WORDS[word] for word in words if word in _WORDS), Unit.NONE)


def label_of(name: str) -> str:
    """The name in words, without the unit that is shown with the value."""
    *outer, last = name.split(" / ")
    words = last.split("_")
    if last == last.lower() and (words[-1] in _LAST_WORDS or words[-1] == "bytes") and len(words) > 1:
        words.pop()
    elif words[-1] == "seconds":
        words[-1] = "time"
    return " / ".join(map(plain_label, (*outer, "_".join(words))))


def _with_intervals(values: Mapping[str, Any]) -> dict[str, Any]:
    """Each figure that has bounds as one interval; the bounds are left out."""
    found, taken = dict(values), set[str]()
    for name, value in values.items():
        for low, high in _BOUNDS:
            if interval := interval_of([value, values.get(name + low), values.get(name + high)]):
                repeats = values.get(f"{name}_repeats")
                found[name] = replace(interval, repeats=repeats) if isinstance(repeats, int) else interval
                taken |= {name + low, name + high, f"{name}_repeats"}
                break
    return {name: value for name, value in found.items() if name not in taken}
