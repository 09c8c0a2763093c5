"""The table that a training run prints: a row per epoch, a column per head; epoch 0 is before the first step."""

from collections.abc import Mapping
from typing import Any

from repcon.runtime.console import console, print_plain

COLUMN_WIDTH = 15
"""Characters per head."""
WORSE_KL = 0.01
"""In nat: a head is worse than at the start where its KL has risen by more."""


class EpochTable:
    """Prints each row at once; if the terminal is too narrow for all heads, in blocks below one another."""

    def __init__(self) -> None:
        self._columns: tuple[str, ...] = ()

    def add_row(self, epoch: int, figures: Mapping[str, Any]) -> None:
        """figures: as `Validation.measure` gives them."""
        cells = {name: f"{head['kl']:.3f} {100 * head['agreement']:5.1f} %" for name, head in figures["heads"].items()}
        if "knn" in figures:
            cells["kNN"] = f"{100 * figures['knn']:.1f} %"
        if not cells:
            return
        per_block = max(1, (console.width - 5) // (COLUMN_WIDTH + 2))
        names = tuple(cells)
        if names != self._columns:
            what = f"KL in nat, same class as its teacher, on {figures['images']:,} held-out images"
            print_plain(f"epoch 0 is the start; {what if figures['heads'] else 'kNN accuracy'}")
        for first in range(0, len(names), per_block):
            block = names[first : first + per_block]
            if names != self._columns or len(names) > per_block:
                print_plain("epoch" + "".join(f"  {_shorten(name):>{COLUMN_WIDTH}}" for name in block))
            print_plain(f"{epoch:>5}" + "".join(f"  {cells[name]:>{COLUMN_WIDTH}}" for name in block))
        self._columns = names


def _shorten(name: str) -> str:
    return name if len(name) <= COLUMN_WIDTH else name[: COLUMN_WIDTH - 1] + "…"


def warn_about_worse_heads(start: Mapping[str, Any], end: Mapping[str, Any]) -> list[str]:
    """Warn of each head whose KL has risen since the start; gives their names. Figures as for `EpochTable.add_row`."""
    worse = []
    for name, last in end.get("heads", {}).items():
        first = start.get("heads", {}).get(name)
        if first is None or not last["kl"] > first["kl"] + WORSE_KL:
            continue
        worse.append(name)
        what = f"head {name} ends worse than it began: KL {last['kl']:.3f} nat, {first['kl']:.3f} at the start"
        hint = "a lower optim.lr, more images, or a higher weight of this head"
        print_plain(f"warning: {what}; {hint} may help", "yellow")
    return worse
