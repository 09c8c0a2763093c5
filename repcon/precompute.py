"""`repcon precompute`, the first main path: images > crops > teachers > top-k > store.

`run` sets up and shows; `work` is what every process does, alone or beside others; `Labeller.label` is the path.
"""

import contextlib
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from repcon import teachers
from repcon.config import PrecomputeConfig, dump
from repcon.decoding import Decoding, Step
from repcon.errors import UserError
from repcon.images import Pack
from repcon.leases import Leases
from repcon.loaders import open_loader
from repcon.overlap import Ahead, Behind
from repcon.panel import Answers, Panel, find_batch_size
from repcon.precompute_show import Display, Event, show
from repcon.record import Run, console
from repcon.store import LabelStore, Unit
from repcon.target import lease_folder, open_target, run_folder
from repcon.teachers import Teacher
from repcon.unitwork import UnitWork

AHEAD_BATCHES, UNITS_BEHIND = 2, 1
"""Decoded batches that wait for the teachers, and finished units that wait to be written: memory stays flat."""
WAIT_SECONDS = 1.0
Report = Callable[[Event], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """What one process labels with."""

    config: PrecomputeConfig
    pack: Pack
    store: LabelStore
    teachers: tuple[Teacher, ...]
    device: torch.device


def run(config: PrecomputeConfig) -> dict[str, Any]:
    """Labels all crops that the store lacks; gives the figures. What was finished is kept, whatever happens."""
    check(config)
    if config.estimate:
        from repcon.estimate import estimate

        return estimate(config)
    record = Run(run_folder(config.out), "precompute", dump(config))
    bench = set_up(config)
    todo = unfinished(bench)
    total = sum(_crops(unit) for unit in bench.store.units() if set(unit.heads) <= _names(bench))
    display = Display(record, total_crops=total, remaining_crops=sum(map(_crops, todo)))
    try:
        with _terminable(), display:
            work(bench, display.take)
    except KeyboardInterrupt:
        left = len(unfinished(bench))
        console.print(f"stopped: {left} of {len(bench.store.units())} units are left; the same command goes on there")
        raise
    return _finish(config, record, display, bench, total)


def check(config: PrecomputeConfig) -> None:
    """Refuses what can be seen to be wrong before anything is loaded."""
    names = [teacher.name for teacher in config.teachers]
    if not names:
        raise UserError("teachers: none named; a recipe needs at least one [[teachers]] with name and model")
    if len(set(names)) < len(names):
        raise UserError(f"teachers: {', '.join(names)}: each needs a name of its own")
    for field in ("crops", "k", "processes"):
        if getattr(config, field) < 1:
            raise UserError(f"{field}: {getattr(config, field)} makes no sense; it must be 1 or more")
    for field in ("batch_size", "workers", "rows_per_shard"):
        if getattr(config, field) < 0:
            raise UserError(f"{field}: {getattr(config, field)} makes no sense; 0 chooses by itself")


def set_up(config: PrecomputeConfig, device: str = "") -> Bench:
    """Pack, teachers and store; the store is made, or compared with the recipe and extended."""
    pack = Pack.open(config.pack)
    if not len(pack):
        raise UserError(f"{config.pack}: the pack holds no images")
    place = torch.device(device or choose_device(config))
    loaded = tuple(teachers.load(teacher, place) for teacher in config.teachers)
    store = open_target(config, pack, [teacher.section for teacher in loaded])
    size = config.batch_size or find_batch_size(loaded, place)
    return Bench(config=replace(config, batch_size=size), pack=pack, store=store, teachers=loaded, device=place)


def choose_device(config: PrecomputeConfig) -> str:
    """`auto` takes CUDA where there is any."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("device cuda: torch sees no CUDA device here; use device = 'cpu' or 'auto'")
    return config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"


def unfinished(bench: Bench) -> list[Unit]:
    """The units still to do that this recipe's teachers can do."""
    return [unit for unit in bench.store.unfinished() if set(unit.heads) <= _names(bench)]


def work(bench: Bench, report: Report) -> None:
    """Labels units until none is left, beside any number of processes that do the same."""
    left = unfinished(bench)
    if not left:
        return
    with Leases(lease_folder(bench.config.out)) as leases, Labeller(bench, report, left) as labeller:
        while left:
            if not labeller.label(claimed(bench.store, left, leases), lambda unit: leases.release(unit.name)):
                time.sleep(WAIT_SECONDS)  # All that is left is in other processes' hands.
            left = unfinished(bench)
            report(Event(remaining_crops=sum(map(_crops, left))))


def claimed(store: LabelStore, units: list[Unit], leases: Leases) -> Iterator[Unit]:
    """Those units that nobody else has, as they are asked for."""
    for unit in units:
        if not leases.claim(unit.name):
            continue
        if store.is_done(unit) or not _boxes_are_there(store, unit):
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

    def label(self, units: Iterator[Unit], finished: Callable[[Unit], None]) -> int:
        """The main path. Gives the number of units; `finished` is called when a unit is in the store."""
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
                    writer.put(partial(self._write, step.work, finished))  # > store: encoded in a thread
                    done += 1
                watch.note(step)
        return done

    def _write(self, work: UnitWork, finished: Callable[[Unit], None]) -> None:
        written_bytes = work.write()
        finished(work.unit)
        keys = self._bench.pack.keys
        missing = tuple((keys[row], reason) for row, reason in sorted(work.missing.items()))
        self._report(Event(unit=work.unit.name, missing=missing, written_bytes=written_bytes))

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


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM, which clusters send before they kill, ends the run as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _finish(config: PrecomputeConfig, record: Run, display: Display, bench: Bench, total: int) -> dict[str, Any]:
    missing = bench.store.missing
    figures = {
        **display.figures(),
        "total_crops": total,
        "teachers": [teacher.name for teacher in bench.teachers],
        "batch_size": bench.config.batch_size,
        "missing": len(missing),
        "fingerprint": bench.store.fingerprint,
    }
    show(figures, config.out)
    record.finish(figures)
    if len(missing) and not config.tolerate_missing:
        some = ", ".join(bench.pack.keys[row] for row in missing[:3].tolist())
        hint = "their rows are marked and loaders skip them; set tolerate_missing to accept that"
        raise UserError(f"{config.out}: {len(missing)} images could not be decoded ({some}); {hint}", figures=figures)
    return figures


def _crops(unit: Unit) -> int:
    return len(unit.crops) * len(unit.rows)


def _names(bench: Bench) -> set[str]:
    return {teacher.name for teacher in bench.teachers}


def _boxes_are_there(store: LabelStore, unit: Unit) -> bool:
    """Whether the unit draws its boxes itself, or the unit that did is finished."""
    if unit.writes_boxes:
        return True
    return all(
        store.is_done(other)
        for other in store.units()
        if other.writes_boxes and other.crops == unit.crops and other.rows == unit.rows
    )
