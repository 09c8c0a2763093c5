"""Send a tracker's figures from a thread of its own, so that a slow server does not hold up training."""

import threading
import time
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Protocol

from repcon.runtime.console import print_plain, warn
from repcon.runtime.errors import first_line

MAX_PENDING = 1000
"""Calls of `log` that wait for a slow tracker; the oldest are left out above that."""
FINISH_SECONDS = 60.0
"""How long the end of a run waits for its trackers, all together."""
QUIET_SECONDS = 1.0
"""After which the wait is announced."""


class Tracker(Protocol):
    """One tracker's run. `id`: its name there; `place`: where to look at it.

    `log` and `finish` are called from one thread, which is not the one that made it. They may take any time, and may
    raise anything: a tracker that fails is dropped, and training continues.
    """

    id: str
    place: str

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Log figures by name, after `step` batches of the run."""
        ...

    def finish(self, completed: bool) -> None:
        """End the run; if not `completed`, it was stopped or failed and may be resumed."""
        ...


class BackgroundTracker:
    """Calls a tracker from a thread, in order. Its methods do not raise; each fault is one warning."""

    def __init__(self, kind: str, tracker: Tracker) -> None:
        self.kind, self._tracker = kind, tracker
        self._pending: deque[tuple[dict[str, float], int]] = deque()
        self._changed = threading.Condition()
        self._logged = self._sent = 0
        self._overflowed = False
        self._failed = False
        self._completed: bool | None = None  # as `finish` was told
        # A daemon, since a server that does not answer must not keep the process.
        self._thread = threading.Thread(target=self._run, name=f"tracker {kind}", daemon=True)
        self._thread.start()

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Queue figures by name; of more than MAX_PENDING the oldest are left out, with a warning at the first."""
        with self._changed:
            if self._failed:
                return
            is_full = len(self._pending) == MAX_PENDING
            if is_full:
                self._pending.popleft()
            self._pending.append((dict(metrics), step))
            self._logged += 1
            self._changed.notify()
            is_news, self._overflowed = is_full and not self._overflowed, self._overflowed or is_full
        if is_news:
            warn(f"{self.kind} is slower than training; some of the run's figures are left out there")

    def finish(self, completed: bool) -> None:
        """Ask for the run's end, after what is queued; `join` waits for it."""
        with self._changed:
            self._completed = completed
            self._changed.notify()

    def join(self, deadline: float) -> None:
        """Wait for the run's end, until `time.monotonic()` is at the deadline; warn of what was not sent."""
        self._thread.join(QUIET_SECONDS)
        if self._thread.is_alive():
            limit = f"waiting up to {FINISH_SECONDS:.0f} s (Ctrl-C twice: leave)"
            print_plain(f"{self.kind} has figures left to send; {limit}")
            self._thread.join(max(deadline - time.monotonic(), 0.0))
        with self._changed:
            unsent = self._logged - self._sent
            if self._failed:
                return
            # The thread may be inside a call; after it nothing more is sent, since a resumed run may be open by then.
            self._failed = True
            self._pending.clear()
        if self._thread.is_alive():
            rest = f"{unsent:,} of the run's lines are not there" if unsent else "the run's end may not be there"
            warn(f"{self.kind} did not answer in time; {rest}, and metrics.jsonl has all")
        elif unsent:
            warn(f"{self.kind} was too slow; {unsent:,} of the run's lines are not there, and metrics.jsonl has all")

    def _run(self) -> None:
        try:
            while (line := self._next()) is not None:
                self._tracker.log(*line)
                self._sent += 1
            if not self._failed:
                self._tracker.finish(bool(self._completed))
        except BaseException as error:  # of the tracker's own libraries, which may also call sys.exit
            with self._changed:
                is_news, self._failed = not self._failed, True
                self._pending.clear()
            if is_news:
                warn(f"{self.kind} failed ({first_line(error)[:200]}); training goes on without it")

    def _next(self) -> tuple[dict[str, float], int] | None:
        """The oldest line; None once there is none left and the run has ended."""
        with self._changed:
            self._changed.wait_for(lambda: self._pending or self._completed is not None)
            return self._pending.popleft() if self._pending else None


def join_all(trackers: Iterable[BackgroundTracker]) -> None:
    """Wait for the ends of several runs, FINISH_SECONDS all together."""
    deadline = time.monotonic() + FINISH_SECONDS
    for tracker in trackers:
        tracker.join(deadline)
