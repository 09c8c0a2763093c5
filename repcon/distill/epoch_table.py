"""The table that a training run prints: a row per epoch, heads as columns, from the start before any step."""

from collections.abc import Mapping
from typing import Any

from repcon.runtime.console import console

CELL = 15
"""Characters of one head's figures."""
WORSE_NAT = 0.01
"""A head ends worse than it began where its KL has risen by more than this."""


class EpochTable:
    """Prints rows as they come; of more heads than the terminal has room for, in blocks below one another."""

    def __init__(self) -> None:
        self._columns: tuple[str, ...] = ()

    def row(self, epoch: int, figures: Mapping[str, Any]) -> None:
        """figures: as `Validation.measure` gives them."""
        cells = {name: f"{held['kl']:.3f} {100 * held['agreement']:5.1f} %" for name, held in figures["heads"].items()}
        if "knn" in figures:
            cells["kNN"] = f"{100 * figures['knn']:.1f} %"
        if not cells:
            return
        fitting = max(1, (console.width - 5) // (CELL + 2))
        names = tuple(cells)
        if names != self._columns:
            what = f"KL in nat, same class as its teacher, on {figures['images']:,} held-out images"
            _print(f"epoch 0 is the start; {what if figures['heads'] else 'kNN accuracy'}")
        for first in range(0, len(names), fitting):
            block = names[first : first + fitting]
            if names != self._columns or len(names) > fitting:
                _print("epoch" + "".join(f"  {_cut(name):>{CELL}}" for name in block))
            _print(f"{epoch:>5}" + "".join(f"  {cells[name]:>{CELL}}" for name in block))
        self._columns = names


def _cut(name: str) -> str:
    return name if len(name) <= CELL else name[: CELL - 1] + "…"


def _print(line: str) -> None:
    console.print(line, highlight=False, markup=False, soft_wrap=True)


def warn_where_worse(start: Mapping[str, Any], end: Mapping[str, Any]) -> list[str]:
    """Prints a line for each head whose KL has risen since the start; gives their names. Both as the rows' figures."""
    worse = []
    for name, held in end.get("heads", {}).items():
        begun = start.get("heads", {}).get(name)
        if begun is None or not held["kl"] > begun["kl"] + WORSE_NAT:
            continue
        worse.append(name)
        what = f"head {name} ends worse than it began: KL {held['kl']:.3f} nat, {begun['kl']:.3f} at the start"
        hint = "a lower optim.lr, more images, or a higher weight of this head"
        console.print(
            f"warning: {what}; {hint} may help", style="yellow", highlight=False, markup=False, soft_wrap=True
        )
    return worse
