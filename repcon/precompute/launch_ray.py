"""Units as tasks on Ray actors that hold the teachers; those that die, or whose node does, are replaced.

The driver only hands out names of units. Claims (`repcon.precompute.work_queue`) keep two actors off one unit, so that
the driver may die and be started again, and processes started by hand may help.
"""

import logging
import socket
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from repcon.labels.store import LabelStore, Unit
from repcon.runtime.errors import UserError

REPLACEMENTS = 3
"""How many times each actor may die, with no unit finished in between, before the run gives up."""
_ROUND_SECONDS = 1.0
_GROW_SECONDS = 15.0
_CONNECT_SECONDS = 10.0


class Worker(Protocol):
    """What an actor holds."""

    def label(self, unit: Unit) -> Any:
        """Labels a unit and gives what is to be reported; None where another process has it now."""
        ...


def run(
    address: str,
    make: Callable[..., Worker],
    arguments: Sequence[Any],
    *,
    store: LabelStore,
    units: Sequence[Unit],
    device: str,
    per_node: int,
    take: Callable[[Any], None],
) -> None:
    """Labels the units on the cluster at `address` (`auto`: the one that runs here).

    `make(*arguments, threads)` builds a worker inside its actor. One actor per GPU, or `per_node` on each node
    without. Raises UserError where there is no cluster, and with a worker's own UserError.
    """
    ray = _connect(address)
    try:
        _Driver(ray, make, arguments, store, units, device, per_node, take).run()
    finally:
        ray.shutdown()


def _connect(address: str) -> Any:
    try:
        import ray
    except ImportError as error:
        raise UserError("ray: Ray is not installed: pip install 'repcon[ray]'") from error
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        if host and port.isdigit():  # Ray itself would go on asking an address where nobody listens for minutes.
            socket.create_connection((host.strip("[]"), int(port)), _CONNECT_SECONDS).close()
        ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False)
    except (OSError, RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"ray {address}: no cluster answers ({reason}); start one with `ray start --head`") from error
    return ray


class _Driver:
    """Hands out units until the store has them all."""

    def __init__(
        self,
        ray: Any,
        make: Callable[..., Worker],
        arguments: Sequence[Any],
        store: LabelStore,
        units: Sequence[Unit],
        device: str,
        per_node: int,
        take: Callable[[Any], None],
    ) -> None:
        self._ray, self._make, self._arguments, self._store, self._take = ray, make, arguments, store, take
        self._device, self._per_node = device, per_node
        self._left = {unit.name: unit for unit in units}
        self._pending = deque(self._left)
        self._actors: list[Any] = []
        self._running: dict[Any, tuple[Any, str]] = {}
        self._grown = float("-inf")
        self._places = 1
        self._deaths = 0

    def run(self) -> None:
        while self._left:
            self._grow()
            self._hand_out()
            ready, _ = self._ray.wait(list(self._running), timeout=_ROUND_SECONDS)
            if not [ref for ref in ready if self._finish(ref)]:
                time.sleep(_ROUND_SECONDS if ready else 0)
                self._look()
        # A unit may be seen in the store before its own task has answered; a lost node's task never will.
        ready, _ = self._ray.wait(list(self._running), num_returns=len(self._running) or 1, timeout=_ROUND_SECONDS)
        for ref in ready:
            self._finish(ref)

    def _grow(self) -> None:
        """An actor for every place that the cluster has by now: nodes may join at any time."""
        if time.monotonic() - self._grown < _GROW_SECONDS:
            return
        self._grown = time.monotonic()
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        gpus = [int(node.get("GPU", 0)) for node in nodes] if self._device != "cpu" else [0]
        cores = int(min((node["CPU"] for node in nodes if node.get("CPU")), default=1))
        share = max(1, cores // (max(gpus, default=0) or self._per_node))
        wanted = sum(gpus) or self._per_node * sum(1 for node in nodes if node.get("CPU"))
        self._places = min(max(wanted, 1), len(self._left))
        # Not restarted by Ray, which would go on for ever with a unit that kills its process.
        needs = {"num_gpus": 1, "num_cpus": 1} if any(gpus) else {"num_cpus": share}
        kind = self._ray.remote(_Actor).options(**needs, max_restarts=0, max_task_retries=0)
        for _ in range(len(self._actors), self._places):
            self._actors.append(kind.remote(self._make, self._arguments, share))

    def _hand_out(self) -> None:
        """Gives each idle actor a unit; when none is pending, one that is under way elsewhere.

        Its claim keeps the actor off as long as its owner lives. So a unit does not wait for a node that is lost.
        """
        busy = {id(actor) for actor, _ in self._running.values()}
        for actor in self._actors:
            if id(actor) not in busy and (name := self._next()) is not None:
                self._running[actor.label.remote(self._left[name])] = actor, name

    def _next(self) -> str | None:
        while self._pending:
            name = self._pending.popleft()
            if name in self._left:
                return name
        running = [name for _, name in self._running.values()]
        return min((name for name in running if name in self._left), key=running.count, default=None)

    def _finish(self, ref: Any) -> bool:
        """Takes a task's answer; False where its unit is in another's hands, or its actor has died."""
        actor, name = self._running.pop(ref)
        try:
            answer = self._ray.get(ref)
        except self._ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, UserError):
                raise UserError(str(error.cause)) from error
            raise
        except self._ray.exceptions.RayError as error:
            self._replace(actor, error)
            answer = None
        if answer is None:
            if name in self._left and not any(name == other for _, other in self._running.values()):
                self._pending.append(name)
            return False
        self._deaths = 0
        self._left.pop(name, None)
        self._take(answer)
        return True

    def _replace(self, dead: Any, error: Exception) -> None:
        """Has another actor take the dead one's place. Raises UserError where nothing else happens any more."""
        self._actors = [actor for actor in self._actors if actor is not dead]
        self._deaths += 1
        if self._deaths > REPLACEMENTS * self._places:
            reason = " ".join(str(error).split())
            hint = "what was finished is kept; mend that, or start fewer per node (processes)"
            raise UserError(
                f"ray: {self._deaths} workers died one after the other, the last: {reason}; {hint}"
            ) from error
        self._grown = float("-inf")

    def _look(self) -> None:
        """Drops units whose task is out but which others (by hand, or an actor of a lost node) have finished.

        Those that nobody is on yet are looked at when their turn comes: a look at all would cost more with each.
        """
        for _, name in self._running.values():
            if name in self._left and self._store.is_done(self._left[name]):
                del self._left[name]


class _Actor:
    """A process of the cluster."""

    def __init__(self, make: Callable[..., Worker], arguments: Sequence[Any], threads: int) -> None:
        self._worker: Worker | None = None
        try:
            self._worker = make(*arguments, threads)
        except UserError as error:  # Ray would bury it in the story of an actor that died; a task's it hands on.
            self._failed = error

    def label(self, unit: Unit) -> Any:
        if self._worker is None:
            raise self._failed
        return self._worker.label(unit)
