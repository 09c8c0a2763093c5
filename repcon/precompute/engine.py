"""From images to stored labels: images > crops > teachers > top-k > store.

`work` is what every process does, alone or beside others; `Labeller.label` is the path.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch

from repcon.config import PrecomputeConfig
from repcon.decode.factory import decoders, open_loader
from repcon.labels.store import LostClaimError, Unit
from repcon.precompute import launch_local
from repcon.precompute.context import PrecomputeContext, crops_of, set_up
from repcon.precompute.decoding import Decoding, Step
from repcon.precompute.ensemble import Answers, TeacherEnsemble
from repcon.precompute.output_store import lease_folder
from repcon.precompute.progress import Event, merged
from repcon.precompute.stall_detector import StallDetector
from repcon.precompute.work_queue import Leases
from repcon.precompute.work_unit import WorkUnit
from repcon.runtime.console import console
from repcon.runtime.device import choose
from repcon.runtime.memory import keep_freed_memory
from repcon.runtime.prefetch import BackgroundWriter, Prefetcher

AHEAD_BATCHES, UNITS_BEHIND = 2, 1
"""Decoded batches that wait for the teachers, and finished units that wait to be written: memory stays flat."""
WAIT_SECONDS = 1.0
TOLD_AFTER_SECONDS = 3.0
"""A process that can do nothing for so long says whom it waits for; then ever more rarely."""
Report = Callable[[Event], None]


def work(context: PrecomputeContext, on_event: Report) -> None:
    """Labels units until none is left, beside any number of processes that do the same."""
    left = context.todo()
    if not left:
        return
    with Leases(lease_folder(context.config.out)) as leases, Labeller(context, on_event, left) as labeller:
        patience, waiting = StallDetector(context, leases), Waiting(leases, on_event)
        while left:
            done = labeller.label(claimed(context, left, leases), leases)
            if not done:
                time.sleep(WAIT_SECONDS)  # All that is left is in other processes' hands.
            left = context.left(left)
            waiting.note(done > 0, left)
            patience.note(done > 0, partial(context.left, left))
            on_event(Event(remaining_crops=sum(map(crops_of, left))))


def serve(config: PrecomputeConfig, slot: launch_local.WorkerSlot, on_event: Report) -> None:
    """What a further process on this machine does."""
    keep_freed_memory()
    work(
        set_up(replace(config, num_workers=config.num_workers or decoders(slot.threads, slot.device)), slot.device),
        on_event,
    )


class Waiting:
    """Tells whom a process waits for, once a while has passed in which it could do nothing."""

    def __init__(self, leases: Leases, on_event: Report) -> None:
        self._leases, self._report = leases, on_event
        self._since, self._pause = time.monotonic(), TOLD_AFTER_SECONDS

    def note(self, progress: bool, left: list[Unit]) -> None:
        """To be told after each round, with the units that are left."""
        now = time.monotonic()
        if progress or not left:
            self._since, self._pause = now, TOLD_AFTER_SECONDS
        elif now - self._since > self._pause:
            self._pause *= 4
            first = left[0].name
            what = f"waiting for {len(left)} units that others have claimed"
            self._report(Event(note=f"{what}; {first}: {self._leases.holder(first)}"))


class UnitWorker:
    """What an actor of a cluster holds: the teachers, and this process's claims."""

    def __init__(self, config: PrecomputeConfig, threads: int) -> None:
        """`threads`: its share of the node's cores, for torch and the loader."""
        console.quiet = True
        keep_freed_memory()
        torch.set_num_threads(threads)
        num_workers = config.num_workers or decoders(threads, choose(config.device).type)
        self._context = set_up(replace(config, num_workers=num_workers))
        self._leases = Leases(lease_folder(config.out)).__enter__()
        self._patience = StallDetector(self._context, self._leases)
        self._labellers: dict[tuple[str, ...], Labeller] = {}
        self._events: list[Event] = []

    def label(self, unit: Unit) -> Event | None:
        """Labels the unit; None where another process has it, or its boxes are still to come."""
        if self._context.store.is_done(unit):
            return Event()
        labeller = self._labellers.get(unit.heads)
        if labeller is None:
            labeller = self._labellers[unit.heads] = Labeller(self._context, self._events.append, [unit])
        self._events.clear()
        claim = claimed(self._context, [unit], self._leases)
        done = labeller.label(claim, self._leases)
        self._patience.note(done > 0, self._context.todo)
        # Not where another process took it over while this one stood still.
        return merged(self._events) if done and self._context.store.is_done(unit) else None


def claimed(context: PrecomputeContext, units: list[Unit], leases: Leases) -> Iterator[Unit]:
    """Those units that nobody else has, as they are asked for."""
    for unit in units:
        if context.store.is_done(unit) or not leases.claim(unit.name):
            continue
        if context.store.is_done(unit) or not context.boxes_are_there(unit):
            leases.release(unit.name)
        else:
            yield unit


class Labeller:
    """Labels units on one device: three stages that overlap, with bounded queues between them."""

    def __init__(self, context: PrecomputeContext, on_event: Report, units: list[Unit]) -> None:
        """`units` tell which teachers are needed."""
        needed = {name for unit in units for name in unit.heads}
        chosen = [teacher for teacher in context.teachers if teacher.name in needed]
        self._context, self._report, config = context, on_event, context.config
        self._loader = open_loader(
            config.loader,
            context.pack,
            [teacher.preprocessing.size for teacher in chosen],
            num_workers=config.num_workers,
            device=str(context.device),
        )
        self._ensemble = TeacherEnsemble(
            chosen,
            config.k,
            config.temperatures,
            device=context.device,
            batch_size=config.batch_size,
            on_warning=self._on_warning,
        )

    def __enter__(self) -> "Labeller":
        return self

    def __exit__(self, *exception: object) -> None:
        self._loader.close()

    def label(self, units: Iterator[Unit], leases: Leases) -> int:
        """The main path. Gives the number of units; the claim on each is given back when it is in the store."""
        context, done = self._context, 0
        works = (WorkUnit(unit, context.store, context.pack, context.config.crop) for unit in units)
        decoding = Decoding(self._loader, context.pack, context.config.batch_size)
        on_their_way: deque[tuple[Step, Answers]] = deque()
        with Prefetcher(decoding.steps(works), AHEAD_BATCHES) as steps, BackgroundWriter(UNITS_BEHIND) as writer:
            watch = _Watch(self._report, steps, writer)
            for step in steps:  # images > crops: decoded and cut in the loader's threads
                if len(step.images):
                    on_their_way.append((step, self._ensemble(step.pixels, step.work.unit.heads)))  # > teachers > top-k
                while on_their_way and (step.completes or len(on_their_way) > 1):
                    earlier, answers = on_their_way.popleft()
                    earlier.work.add_labels(earlier.images, answers.wait())
                if step.completes:
                    writer.put(partial(self._write, step.work, leases))  # > store: encoded in a thread
                    done += 1
                watch.note(step)
        self._ensemble.finish()
        return done

    def _write(self, work: WorkUnit, leases: Leases) -> None:
        name = work.unit.name
        # Whoever was taken for dead, and is not, finds the unit done or in another's hands.
        try:
            written_bytes = 0 if self._context.store.is_done(work.unit) else work.write(leases.get(name))
        except LostClaimError:
            what = "another process took it over while this one stood still; what this one made of it is dropped"
            self._report(Event(note=f"unit {name}: {what}"))
            return
        finally:
            leases.release(name)
        keys = self._context.pack.keys
        missing = tuple((keys[row], reason) for row, reason in sorted(work.missing.items()))
        self._report(Event(unit=name, missing=missing, written_bytes=written_bytes))

    def _on_warning(self, message: str) -> None:
        self._report(Event(note=message))


class _Watch:
    """Tells the display what passed since the last step, and how long the teachers stood still."""

    def __init__(self, on_event: Report, steps: Prefetcher[Step], writer: BackgroundWriter) -> None:
        self._report, self._steps, self._writer = on_event, steps, writer
        self._time, self._waited = time.perf_counter(), 0.0

    def note(self, step: Step) -> None:
        now, waited = time.perf_counter(), self._steps.waited_seconds + self._writer.waited_seconds
        self._report(
            Event(
                images=len(step.images),
                crops=len(step.images) * len(step.work.unit.crops),
                seconds=now - self._time,
                waited_seconds=waited - self._waited,
            )
        )
        self._time, self._waited = now, waited
