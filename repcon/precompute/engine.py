"""From images to stored labels: images > crops > teachers > top-k > store.

`work` is what every process runs, alone or with others; `UnitLabeller.label` is the main path.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch

from repcon.config import PrecomputeConfig
from repcon.decode.factory import decode_threads, open_loader
from repcon.labels.store import LostClaimError, Unit
from repcon.precompute.context import PrecomputeContext, set_up
from repcon.precompute.decoding import Decoding, Step
from repcon.precompute.ensemble import Answers, TeacherEnsemble
from repcon.precompute.launch_local import WorkerSlot
from repcon.precompute.output_store import crops_of, lease_folder
from repcon.precompute.progress import Event
from repcon.precompute.stall_detector import StallDetector
from repcon.precompute.work_queue import Leases
from repcon.precompute.work_unit import WorkUnit
from repcon.runtime.device import choose
from repcon.runtime.memory import keep_freed_memory
from repcon.runtime.prefetch import BackgroundWriter, Prefetcher

PREFETCHED_BATCHES, PENDING_UNITS = 2, 1
"""Decoded batches that wait for the teachers, and finished units that wait to be written: memory stays flat."""
WAIT_SECONDS = 1.0
OnEvent = Callable[[Event], None]


def work(context: PrecomputeContext, on_event: OnEvent) -> None:
    """Labels units until none is left, together with any number of processes that do the same."""
    remaining = context.todo()
    if not remaining:
        return
    with (
        Leases(lease_folder(context.config.out)) as leases,
        UnitLabeller(context, remaining, leases, on_event) as labeller,
    ):
        stall_detector = StallDetector(context, leases, on_event)
        while remaining:
            labelled = labeller.label(_claimed(context, remaining, leases))
            if not labelled:
                time.sleep(WAIT_SECONDS)  # Other processes have claimed all that is left.
            remaining = context.unfinished(remaining)
            stall_detector.update(labelled > 0, remaining)
            on_event(Event(remaining_crops=sum(map(crops_of, remaining))))


def run_worker(config: PrecomputeConfig, slot: WorkerSlot, on_event: OnEvent) -> None:
    """Runs `work` in a process of its own, on this machine or on a node of a cluster."""
    keep_freed_memory()
    torch.set_num_threads(slot.threads)
    device = slot.device if slot.gpu is not None else str(choose(config.device))
    num_workers = config.num_workers or decode_threads(slot.threads, device)
    work(set_up(replace(config, num_workers=num_workers), device), on_event)


def _claimed(context: PrecomputeContext, units: list[Unit], leases: Leases) -> Iterator[Unit]:
    """Claims and yields one unit after the other, skipping those that other processes have."""
    is_done = context.store.completion.is_done
    for unit in units:
        if is_done(unit) or not leases.claim(unit.name):
            continue
        if is_done(unit) or not context.has_boxes(unit):
            leases.release(unit.name)
        else:
            yield unit


class UnitLabeller:
    """Labels units on one device: three stages that overlap, with bounded queues between them."""

    def __init__(self, context: PrecomputeContext, units: list[Unit], leases: Leases, on_event: OnEvent) -> None:
        """`units` determine which teachers are needed."""
        heads = {name for unit in units for name in unit.heads}
        teachers = [teacher for teacher in context.teachers if teacher.name in heads]
        self._context, self._leases, self._on_event = context, leases, on_event
        config = context.config
        self._loader = open_loader(
            config.loader,
            context.pack,
            [teacher.preprocessing.size for teacher in teachers],
            num_workers=config.num_workers,
            device=str(context.device),
        )
        self._ensemble = TeacherEnsemble(
            teachers,
            config.k,
            config.temperatures,
            device=context.device,
            batch_size=config.batch_size,
            on_warning=lambda message: on_event(Event(note=message)),
        )

    def __enter__(self) -> "UnitLabeller":
        return self

    def __exit__(self, *exception: object) -> None:
        self._loader.close()

    def label(self, units: Iterator[Unit]) -> int:
        """The main path. Returns the number of units; each one's claim is released when it is in the store."""
        context, count = self._context, 0
        works = (WorkUnit(unit, context.store, context.pack, context.config.crop) for unit in units)
        decoding = Decoding(self._loader, context.pack, context.config.batch_size)
        in_flight: deque[tuple[Step, Answers]] = deque()
        with Prefetcher(decoding.steps(works), PREFETCHED_BATCHES) as steps, BackgroundWriter(PENDING_UNITS) as writer:
            meter = _Meter(self._on_event, steps, writer)
            for step in steps:  # images > crops: decoded and cut in the loader's threads
                if len(step.images):
                    in_flight.append((step, self._ensemble(step.pixels, step.work.unit.heads)))  # > teachers > top-k
                while in_flight and (step.is_last or len(in_flight) > 1):
                    earlier, answers = in_flight.popleft()
                    earlier.work.add_labels(earlier.images, answers.wait())
                if step.is_last:
                    writer.put(partial(self._write, step.work))  # > store: encoded in a thread
                    count += 1
                meter.record(step)
        self._ensemble.finish()
        return count

    def _write(self, work: WorkUnit) -> None:
        unit, keys = work.unit, self._context.pack.keys
        try:
            # A process that was suspended may find its unit finished, or claimed, by another.
            is_done = self._context.store.completion.is_done(unit)
            written_bytes = 0 if is_done else work.write(self._leases.get(unit.name))
        except LostClaimError:
            what = "another process took it over while this one stood still; what this one made of it is dropped"
            self._on_event(Event(note=f"unit {unit.name}: {what}"))
            return
        finally:
            self._leases.release(unit.name)
        missing = tuple((keys[row], reason) for row, reason in sorted(work.missing.items()))
        missing_crops = len(missing) * len(unit.crops)
        self._on_event(Event(unit=unit.name, missing=missing, missing_crops=missing_crops, written_bytes=written_bytes))


class _Meter:
    """Reports crops, time and the teachers' waiting time since the last step."""

    def __init__(self, on_event: OnEvent, steps: Prefetcher[Step], writer: BackgroundWriter) -> None:
        self._on_event, self._steps, self._writer = on_event, steps, writer
        self._time, self._waited = time.perf_counter(), 0.0

    def record(self, step: Step) -> None:
        now, waited = time.perf_counter(), self._steps.waited_seconds + self._writer.waited_seconds
        self._on_event(
            Event(
                images=len(step.images),
                crops=len(step.images) * len(step.work.unit.crops),
                seconds=now - self._time,
                waited_seconds=waited - self._waited,
            )
        )
        self._time, self._waited = now, waited
