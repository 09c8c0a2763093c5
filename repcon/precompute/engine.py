"""From images to stored labels: images > crops > teachers > top-k > store.

`work` is what every process runs, alone or with others; `UnitLabeller.label` is the main path.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from repcon.config import CropConfig, PrecomputeConfig
from repcon.crops.plan import plan_crops
from repcon.decode.base import CropRequest
from repcon.decode.factory import decode_threads, open_loader
from repcon.images.pack import ImagePack
from repcon.labels.store import LabelStore, LostClaimError, Unit
from repcon.labels.writer import UnitClaim
from repcon.precompute.compilation import compile_teachers
from repcon.precompute.context import PrecomputeContext, set_up
from repcon.precompute.decoding import Decoded, Decoding
from repcon.precompute.ensemble import LabelsInFlight, TeacherEnsemble
from repcon.precompute.launch_local import WorkerSlot
from repcon.precompute.output_store import crops_of, lease_folder
from repcon.precompute.progress import Event
from repcon.precompute.work_queue import Leases
from repcon.runtime.device import choose
from repcon.runtime.errors import UserError
from repcon.runtime.memory import keep_freed_memory
from repcon.runtime.prefetch import BackgroundWriter, Prefetcher

PREFETCHED_BATCHES, PENDING_UNITS = 2, 1
"""Decoded batches that wait for the teachers, and finished units that wait to be written: memory stays flat."""
WAIT_SECONDS = 1.0
REPORT_SECONDS = 3.0
"""A wait for other processes is reported once it has taken so long, then at four times the interval."""
STALL_SECONDS = 60.0
"""Long enough for a run that was started at the same time to load its teachers."""
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
        wait_monitor = WaitMonitor(context, leases, on_event)
        while remaining:
            labelled = labeller.label(_claimed(context, remaining, leases))
            if not labelled:
                time.sleep(WAIT_SECONDS)  # Other processes have claimed all that is left.
            remaining = [unit for unit in remaining if not context.store.completion.is_done(unit)]
            wait_monitor.update(labelled > 0, remaining)
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


class WaitMonitor:
    """Reports the wait for units that other processes have claimed, and ends it where their boxes will never come."""

    def __init__(self, context: PrecomputeContext, leases: Leases, on_event: OnEvent) -> None:
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


class WorkUnit:
    """A unit's boxes and its labels so far; m crops by r images."""

    def __init__(self, unit: Unit, store: LabelStore, pack: ImagePack, recipe: CropConfig) -> None:
        self.unit, self._store, self._pack = unit, store, pack
        rows = slice(unit.rows.start, unit.rows.stop)
        if unit.writes_boxes:
            planned = plan_crops(recipe, pack.hashes[rows], pack.sizes[rows], list(unit.crops))
            self.boxes, self.flips = planned.boxes, planned.flips
        else:
            self.boxes, self.flips = store.reader.boxes(unit.crops, unit.rows)
        shape = (len(unit.crops), len(unit.rows))
        self.missing: dict[int, str] = {}
        """Rows of the pack whose image could not be decoded, with the reason."""
        self._labels = {}
        for name in unit.heads:
            head = store.heads[name]
            ids = np.zeros((*shape, head.k), np.int32)
            self._labels[name] = ids, np.full((*shape, head.k + len(head.temperatures)), np.nan, np.float16)

    def requests(self, images_per_batch: int) -> Iterator[CropRequest]:
        """All images of the unit, each once with all its crops."""
        rows = np.arange(self.unit.rows.start, self.unit.rows.stop)
        return CropRequest.of_images(rows, self.unit.crops, self.boxes, self.flips).split(images_per_batch)

    def add_labels(self, images: np.ndarray, labels: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> None:
        """Adds the labels of some images: per head ids (n * m, k) and logp (n * m, k + T), image by image.

        Raises UserError naming teacher, image and crop where an answer is not a number.
        """
        columns, crops = images - self.unit.rows.start, len(self.unit.crops)
        for name, (ids, logp) in labels.items():
            self._require_finite(name, images, logp)
            held_ids, held_logp = self._labels[name]
            held_ids[:, columns] = ids.reshape(len(columns), crops, -1).swapaxes(0, 1)
            held_logp[:, columns] = logp.reshape(len(columns), crops, -1).swapaxes(0, 1)

    def _require_finite(self, name: str, images: np.ndarray, logp: np.ndarray) -> None:
        top = self._store.heads[name].k
        wrong = np.isnan(logp).any(1) | np.isinf(logp[:, :top]).any(1)  # a masked class has topk.MIN_LOGP
        if wrong.any():
            place, crop = divmod(int(wrong.argmax()), len(self.unit.crops))
            where = f"image {self._pack.keys[int(images[place])]}, crop {self.unit.crops[crop]}"
            remedy = "try precision fp32, or look at its weights"
            raise UserError(f"teacher {name}: its answer is not a number (NaN or infinite) for {where}; {remedy}")

    def write(self, claim: UnitClaim) -> int:
        """Writes the finished unit into the store; returns its bytes. Raises LostClaimError, as `LabelWriter.write`."""
        return self._store.writer.write(self.unit, self.boxes, self.flips, self._labels, self.missing, claim)


_Step = tuple[WorkUnit, Decoded, bool]
"""Some decoded images of a unit, and whether they are its last ones."""


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
        crops = context.store.images * context.store.crops
        compile_teachers(teachers, config, context.device, crops=crops, on_note=self._note)
        self._ensemble = TeacherEnsemble(
            teachers,
            config.k,
            config.temperatures,
            device=context.device,
            batch_size=config.batch_size,
            on_warning=self._note,
        )

    def _note(self, message: str) -> None:
        self._on_event(Event(note=message))

    def __enter__(self) -> "UnitLabeller":
        return self

    def __exit__(self, *exception: object) -> None:
        self._loader.close()

    def label(self, units: Iterator[Unit]) -> int:
        """The main path. Returns the number of units; each one's claim is released when it is in the store."""
        context, count = self._context, 0
        works = (WorkUnit(unit, context.store, context.pack, context.config.crop) for unit in units)
        in_flight: deque[tuple[WorkUnit, Decoded, LabelsInFlight]] = deque()
        with Prefetcher(self._steps(works), PREFETCHED_BATCHES) as steps, BackgroundWriter(PENDING_UNITS) as writer:
            reported, waited = time.perf_counter(), 0.0
            for work, decoded, is_last in steps:  # images > crops: decoded and cut in the loader's threads
                if len(decoded.images):
                    labels = self._ensemble(decoded.pixels, work.unit.heads)  # > teachers > top-k
                    in_flight.append((work, decoded, labels))
                while in_flight and (is_last or len(in_flight) > 1):
                    earlier, labelled, labels = in_flight.popleft()
                    earlier.add_labels(labelled.images, labels.wait())
                if is_last:
                    writer.put(partial(self._write, work))  # > store: encoded in a thread
                    count += 1
                # For the display and the log: what was done, and how long the teachers waited, since the last step.
                images, now = len(decoded.images), time.perf_counter()
                seconds, waiting = now - reported, steps.waited_seconds + writer.waited_seconds - waited
                crops = images * len(work.unit.crops)
                self._on_event(Event(images=images, crops=crops, seconds=seconds, waited_seconds=waiting))
                reported, waited = now, waited + waiting
        self._ensemble.finish()
        return count

    def _steps(self, works: Iterator[WorkUnit]) -> Iterator[_Step]:
        """The units' images in order, decoded."""
        sent: deque[tuple[WorkUnit, bool]] = deque()

        def requests() -> Iterator[CropRequest]:
            for work in works:
                for request in work.requests(max(1, self._context.config.batch_size // len(work.unit.crops))):
                    sent.append((work, int(request.images[-1]) == work.unit.rows[-1]))
                    yield request

        for decoded in Decoding(self._loader, self._context.pack).run(requests()):
            work, is_last = sent.popleft()
            work.missing |= decoded.missing
            yield work, decoded, is_last

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
