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
from repcon.precompute.context import Bench, crops_of, set_up
from repcon.precompute.decoding import Decoding, Step
from repcon.precompute.ensemble import Answers, Panel
from repcon.precompute.output_store import lease_folder
from repcon.precompute.progress import Event, merged
from repcon.precompute.stall_detector import Patience
from repcon.precompute.work_queue import Leases
from repcon.precompute.work_unit import UnitWork
from repcon.runtime.console import console
from repcon.runtime.device import choose
from repcon.runtime.memory import keep_freed_memory
from repcon.runtime.prefetch import Ahead, Behind

AHEAD_BATCHES, UNITS_BEHIND = 2, 1
"""Decoded batches that wait for the teachers, and finished units that wait to be written: memory stays flat."""
WAIT_SECONDS = 1.0
TOLD_AFTER_SECONDS = 3.0
"""A process that can do nothing for so long says whom it waits for; then ever more rarely."""
Report = Callable[[Event], None]


def work(bench: Bench, report: Report) -> None:
    """Labels units until none is left, beside any number of processes that do the same."""
    left = bench.todo()
    if not left:
        return
    with Leases(lease_folder(bench.config.out)) as leases, Labeller(bench, report, left) as labeller:
        patience, waiting = Patience(bench, leases), Waiting(leases, report)
        while left:
            done = labeller.label(claimed(bench, left, leases), leases)
            if not done:
                time.sleep(WAIT_SECONDS)  # All that is left is in other processes' hands.
            left = bench.left(left)
            waiting.note(done > 0, left)
            patience.note(done > 0, partial(bench.left, left))
            report(Event(remaining_crops=sum(map(crops_of, left))))


def serve(config: PrecomputeConfig, post: launch_local.Post, report: Report) -> None:
    """What a further process on this machine does."""
    keep_freed_memory()
    work(set_up(replace(config, workers=config.workers or decoders(post.threads, post.device)), post.device), report)


class Waiting:
    """Tells whom a process waits for, once a while has passed in which it could do nothing."""

    def __init__(self, leases: Leases, report: Report) -> None:
        self._leases, self._report = leases, report
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
        workers = config.workers or decoders(threads, choose(config.device).type)
        self._bench = set_up(replace(config, workers=workers))
        self._leases = Leases(lease_folder(config.out)).__enter__()
        self._patience = Patience(self._bench, self._leases)
        self._labellers: dict[tuple[str, ...], Labeller] = {}
        self._events: list[Event] = []

    def label(self, unit: Unit) -> Event | None:
        """Labels the unit; None where another process has it, or its boxes are still to come."""
        if self._bench.store.is_done(unit):
            return Event()
        labeller = self._labellers.get(unit.heads)
        if labeller is None:
            labeller = self._labellers[unit.heads] = Labeller(self._bench, self._events.append, [unit])
        self._events.clear()
        claim = claimed(self._bench, [unit], self._leases)
        done = labeller.label(claim, self._leases)
        self._patience.note(done > 0, self._bench.todo)
        # Not where another process took it over while this one stood still.
        return merged(self._events) if done and self._bench.store.is_done(unit) else None


def claimed(bench: Bench, units: list[Unit], leases: Leases) -> Iterator[Unit]:
    """Those units that nobody else has, as they are asked for."""
    for unit in units:
        if bench.store.is_done(unit) or not leases.claim(unit.name):
            continue
        if bench.store.is_done(unit) or not bench.boxes_are_there(unit):
            leases.release(unit.name)
        else:
            yield unit


class Labeller:
    """Labels units on one device: three stages that overlap, with bounded queues between them."""

    def __init__(self, bench: Bench, report: Report, units: list[Unit]) -> None:
        """`units` tell which teachers are needed."""
        needed = {name for unit in units for name in unit.heads}
        chosen = [teacher for teacher in bench.teachers if teacher.name in needed]
        self._bench, self._report, config = bench, report, bench.config
        self._loader = open_loader(
            config.loader,
            bench.pack,
            [teacher.preprocessing.size for teacher in chosen],
            workers=config.workers,
            device=str(bench.device),
        )
        self._panel = Panel(
            chosen, config.k, config.temperatures, device=bench.device, batch_size=config.batch_size, say=self._say
        )

    def __enter__(self) -> "Labeller":
        return self

    def __exit__(self, *exception: object) -> None:
        self._loader.close()

    def label(self, units: Iterator[Unit], leases: Leases) -> int:
        """The main path. Gives the number of units; the claim on each is given back when it is in the store."""
        bench, done = self._bench, 0
        works = (UnitWork(unit, bench.store, bench.pack, bench.config.crop) for unit in units)
        decoding = Decoding(self._loader, bench.pack, bench.config.batch_size)
        on_their_way: deque[tuple[Step, Answers]] = deque()
        with Ahead(decoding.steps(works), AHEAD_BATCHES) as steps, Behind(UNITS_BEHIND) as writer:
            watch = _Watch(self._report, steps, writer)
            for step in steps:  # images > crops: decoded and cut in the loader's threads
                if len(step.images):
                    on_their_way.append((step, self._panel(step.pixels, step.work.unit.heads)))  # > teachers > top-k
                while on_their_way and (step.completes or len(on_their_way) > 1):
                    earlier, answers = on_their_way.popleft()
                    earlier.work.keep(earlier.images, answers.wait())
                if step.completes:
                    writer.put(partial(self._write, step.work, leases))  # > store: encoded in a thread
                    done += 1
                watch.note(step)
        self._panel.finish()
        return done

    def _write(self, work: UnitWork, leases: Leases) -> None:
        name = work.unit.name
        # Whoever was taken for dead, and is not, finds the unit done or in another's hands.
        try:
            written_bytes = 0 if self._bench.store.is_done(work.unit) else work.write(leases.get(name))
        except LostClaimError:
            what = "another process took it over while this one stood still; what this one made of it is dropped"
            self._report(Event(note=f"unit {name}: {what}"))
            return
        finally:
            leases.release(name)
        keys = self._bench.pack.keys
        missing = tuple((keys[row], reason) for row, reason in sorted(work.missing.items()))
        self._report(Event(unit=name, missing=missing, written_bytes=written_bytes))

    def _say(self, message: str) -> None:
        self._report(Event(note=message))


class _Watch:
    """Tells the display what passed since the last step, and how long the teachers stood still."""

    def __init__(self, report: Report, steps: Ahead[Step], writer: Behind) -> None:
        self._report, self._steps, self._writer = report, steps, writer
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
