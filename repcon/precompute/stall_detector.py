"""Boxes that nobody will draw: an append that waits for another run's units has to end when that run has."""

import time
from collections.abc import Callable

from repcon.labels.store import Unit
from repcon.precompute.context import PrecomputeContext
from repcon.precompute.work_queue import Leases
from repcon.runtime.errors import UserError

PATIENCE_SECONDS = 60.0
"""Long enough for a run that was started at the same time to load its teachers."""


class StallDetector:
    """How long a process waits for units that are not its own to do."""

    def __init__(self, context: PrecomputeContext, leases: Leases) -> None:
        self._context, self._leases = context, leases
        self._since = time.monotonic()

    def note(self, progress: bool, left: Callable[[], list[Unit]]) -> None:
        """To be told after each round. Raises UserError where all that is `left` waits for boxes that nobody is at
        work on: a living run does one unit after the other, so that most of those it owes are always free."""
        now = time.monotonic()
        if progress:
            self._since = now
        if now - self._since <= PATIENCE_SECONDS:
            return
        self._since = now
        awaited = self._context.awaited(left())
        if awaited and all(self._leases.is_free(unit.name) for unit in awaited):
            teachers = ", ".join(sorted({name for unit in awaited for name in unit.heads}))
            what = f"{len(awaited)} units that hold the boxes were never finished, and nobody is at work on them"
            hint = f"run the recipe of {teachers} first: it goes on where it stopped"
            raise UserError(f"{self._context.store.url}: {what}; {hint}")
