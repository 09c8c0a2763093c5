"""Worker processes on a Ray cluster: one actor per slot, which does what a local worker process does.

Claims (`repcon.precompute.work_queue`) divide the units among the actors, so the driver only starts them, replaces
those that die and passes their events on. It may die and be started again, and processes started by hand may help.
"""

import logging
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from repcon.precompute.launch_local import WorkerSlot
from repcon.precompute.progress import Event
from repcon.runtime.console import console
from repcon.runtime.errors import UserError, first_line

REPLACEMENTS = 3
"""How many times each actor may die, with no unit finished in between, before the run gives up."""
_POLL_SECONDS = 1.0
_GROW_SECONDS = 15.0
_CONNECT_SECONDS = 10.0
_DRAIN_SECONDS = 10.0
"""How long the driver waits for the last events once all units are in the store."""

Worker = Callable[..., None]
"""`worker(*arguments, slot, on_event)`, which returns when no unit is left to do anywhere."""


def run(
    address: str,
    worker: Worker,
    arguments: Sequence[Any],
    *,
    units: int,
    device: str,
    per_node: int,
    on_event: Callable[[Event], None],
) -> None:
    """Runs the worker on the cluster at `address` (`auto`: the one on this machine) until no unit is left.

    One actor per GPU, or `per_node` on each node without, and at most one per unit. Raises UserError where there is
    no cluster, and with a worker's own UserError.
    """
    ray = _connect(address)
    try:
        _Driver(ray, worker, arguments, units, device, per_node, on_event).run()
    finally:
        ray.shutdown()


def _connect(address: str) -> Any:
    try:
        import ray
    except ImportError as error:
        raise UserError("ray: Ray is not installed: pip install 'repcon[ray]'") from error
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        if host and port.isdigit():  # Ray itself retries an address where nobody listens for minutes.
            socket.create_connection((host.strip("[]"), int(port)), _CONNECT_SECONDS).close()
        ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False)
    except (OSError, RuntimeError, ValueError) as error:
        hint = "start one with `ray start --head`"
        raise UserError(f"ray {address}: no cluster answers ({first_line(error)}); {hint}") from error
    return ray


@dataclass
class _Driver:
    """Keeps an actor on every slot of the cluster until one of them finds that nothing is left to do."""

    ray: Any
    worker: Worker
    arguments: Sequence[Any]
    units: int
    device: str
    per_node: int
    on_event: Callable[[Event], None]
    runs: dict[Any, Any] = field(default_factory=dict)
    """The actor of each running task."""
    polls: dict[Any, Any] = field(default_factory=dict)
    """The actor of each pending request for events."""
    grown: float = float("-inf")
    slots: int = 1
    deaths: int = 0

    def run(self) -> None:
        finished = False
        while not finished:
            self._start_actors()
            pending = [*self.runs, *self.polls]
            ready, _ = self.ray.wait(pending, num_returns=len(pending), timeout=_POLL_SECONDS)
            for ref in ready:
                finished = self._collect(ref) or finished
        # All units are in the store. The task of a lost node will never end.
        deadline = time.monotonic() + _DRAIN_SECONDS
        while (pending := [*self.runs, *self.polls]) and time.monotonic() < deadline:
            ready, _ = self.ray.wait(pending, timeout=_POLL_SECONDS)
            for ref in ready:
                self._collect(ref)

    def _start_actors(self) -> None:
        """Starts an actor on every free slot of the cluster; nodes may join at any time."""
        if time.monotonic() - self.grown < _GROW_SECONDS:
            return
        self.grown = time.monotonic()
        nodes = [node["Resources"] for node in self.ray.nodes() if node["Alive"]]
        gpus = [int(node.get("GPU", 0)) for node in nodes] if self.device != "cpu" else [0]
        cores = int(min((node["CPU"] for node in nodes if node.get("CPU")), default=1))
        threads = max(1, cores // (max(gpus, default=0) or self.per_node))
        slots = sum(gpus) or self.per_node * sum(1 for node in nodes if node.get("CPU"))
        self.slots = min(max(slots, 1), self.units)
        # Not restarted by Ray, which would repeat a unit that kills its process for ever.
        needs = {"num_gpus": 1, "num_cpus": 1} if any(gpus) else {"num_cpus": threads}
        kind = self.ray.remote(_Actor).options(**needs, max_concurrency=2, max_restarts=0, max_task_retries=0)
        slot = WorkerSlot(gpu=0 if any(gpus) else None, threads=threads)
        for _ in range(len(self.runs), self.slots):
            actor = kind.remote()
            self.runs[actor.run.remote(self.worker, self.arguments, slot)] = actor
            self.polls[actor.poll.remote()] = actor

    def _collect(self, ref: Any) -> bool:
        """Passes on what the task gave; True where it is a worker that has found nothing left to do."""
        is_poll = ref in self.polls
        actor = self.polls.pop(ref) if is_poll else self.runs.pop(ref)
        try:
            events = self.ray.get(ref)
        except self.ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, UserError):
                raise UserError(str(error.cause)) from error
            raise
        except self.ray.exceptions.RayError as error:
            if not is_poll:  # the actor's run reports its death
                self._count_death(error)
            return False
        for event in events:
            self.deaths = 0 if event.unit else self.deaths
            self.on_event(event)
        if is_poll and actor in self.runs.values():
            self.polls[actor.poll.remote()] = actor
        return not is_poll

    def _count_death(self, error: Exception) -> None:
        """Lets another actor be started. Raises UserError where nothing else happens any more."""
        self.deaths += 1
        if self.deaths > REPLACEMENTS * self.slots:
            reason = " ".join(str(error).split())
            hint = "what was finished is kept; fix that, or start fewer per node (processes)"
            raise UserError(
                f"ray: {self.deaths} workers died one after the other, the last: {reason}; {hint}"
            ) from error
        self.grown = float("-inf")


class _Actor:
    """A worker process of the cluster: `run` works in one thread, `poll` gives its events in another."""

    def __init__(self) -> None:
        self._events: list[Event] = []

    def run(self, worker: Worker, arguments: Sequence[Any], slot: WorkerSlot) -> list[Event]:
        """Runs the worker; returns the events that `poll` has not given."""
        console.quiet = True
        worker(*arguments, slot, self._events.append)
        return self._take_events()

    def poll(self) -> list[Event]:
        """The events since the last call, after a second."""
        time.sleep(_POLL_SECONDS)
        return self._take_events()

    def _take_events(self) -> list[Event]:
        taken = self._events[:]
        del self._events[: len(taken)]
        return taken
