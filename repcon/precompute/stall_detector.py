"""Detects stalls: reports the claims that a process waits for, and ends it when their owners have died."""

import time
from collections.abc import Callable

from repcon.labels.store import Unit
from repcon.precompute.context import PrecomputeContext
from repcon.precompute.progress import Event
from repcon.precompute.work_queue import Leases
from repcon.runtime.errors import UserError

REPORT_SECONDS = 3.0
"""A wait is reported once it has taken so long, then at four times the interval."""
STALL_SECONDS = 60.0
"""Long enough for a run that was started at the same time to load its teachers."""


class StallDetector:
    """How long a process has waited for units that other processes have to finish."""

    def __init__(self, context: PrecomputeContext, leases: Leases, on_event: Callable[[Event], None]) -> None:
        self._context, self._leases, self._on_event = context, leases, on_event
        self._waiting_since = self._checked = time.monotonic()
        self._report_after = REPORT_SECONDS

    def update(self, progress: bool, remaining: list[Unit]) -> None:
        """To be called after each round, with the units that are not finished.

        Raises UserError where all of them need boxes that another run has to write and no process is working on. A
        run labels one unit after the other, so most of the units that it still has to do are always unclaimed.
        """
        now = time.monotonic()
        if progress or not remaining:
            self._waiting_since = self._checked = now
            self._report_after = REPORT_SECONDS
            return
        if now - self._waiting_since > self._report_after:
            self._report_after *= 4
            first = remaining[0].name
            what = f"waiting for {len(remaining)} units that others have claimed"
            self._on_event(Event(note=f"{what}; {first}: {self._leases.holder(first)}"))
        if now - self._checked > STALL_SECONDS:
            self._checked = now
            self._require_owner(self._context.units_of_missing_boxes(remaining))

    def _require_owner(self, units: list[Unit]) -> None:
        if units and all(self._leases.is_free(unit.name) for unit in units):
            teachers = ", ".join(sorted({name for unit in units for name in unit.heads}))
            what = f"{len(units)} units that hold the boxes were never finished, and nobody is at work on them"
            hint = f"run the recipe of {teachers} first: it goes on where it stopped"
            raise UserError(f"{self._context.store.url}: {what}; {hint}")
