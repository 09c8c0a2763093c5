"""The figures of runs and environments, typed by the names that repcon's own commands give them."""

from collections.abc import Mapping
from typing import Any

from repcon.reports.figures import Figure, Unit, flatten

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
