"""`repcon precompute`, the first main path: images > crops > teachers > top-k > store.

`run` sets up and shows; `work` is what every process does, alone or beside others; `Labeller.label` is the path.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.markup import escape

from repcon.config import PrecomputeConfig, dump
from repcon.device import choose
from repcon.errors import UserError
from repcon.labelling import cluster, crew
from repcon.labelling.bench import Bench, absolute, check, crops_of, load, set_up
from repcon.labelling.decoding import Decoding, Step
from repcon.labelling.display import Display, Event, merged, show
from repcon.labelling.estimate import estimate
from repcon.labelling.leases import Leases
from repcon.labelling.orphans import Patience
from repcon.labelling.panel import Answers, Panel
from repcon.labelling.passes import find_batch_size
from repcon.labelling.recall import require_same_answers
from repcon.labelling.target import lease_folder, run_folder, spec_of
from repcon.labelling.unitwork import UnitWork
from repcon.loaders import decoders, open_loader
from repcon.memory import keep_freed_memory
from repcon.overlap import Ahead, Behind
from repcon.record import RESULTS, Run, console
from repcon.storage.manifest import manifest_of
from repcon.store import Unit

AHEAD_BATCHES, UNITS_BEHIND = 2, 1
"""Decoded batches that wait for the teachers, and finished units that wait to be written: memory stays flat."""
WAIT_SECONDS = 1.0
Report = Callable[[Event], None]


def run(config: PrecomputeConfig) -> dict[str, Any]:
    """Labels all crops that the store lacks; gives the figures. What was finished is kept, whatever happens."""
    check(config)
    with crew.terminable():
        return _estimate(config) if config.estimate else _label(config)


def _estimate(config: PrecomputeConfig) -> dict[str, Any]:
    pack, loaded, device = load(config)
    sections = [teacher.section for teacher in loaded]
    manifest_of(spec_of(config, pack, sections), config.out)  # refuses what the store would refuse
    config = replace(config, batch_size=config.batch_size or find_batch_size(loaded, device))
    return estimate(config, pack, loaded, device)


def _label(config: PrecomputeConfig) -> dict[str, Any]:
    gpus = torch.cuda.device_count() if choose(config.device).type == "cuda" else 0
    places = crew.posts(config.processes or max(1, gpus), gpus)
    shared = config.ray or len(places) > 1  # Then this process only hands out and shows.
    bench = set_up(config, "cpu" if shared else "")
    todo = bench.todo()
    folder = Path(config.records or run_folder(config.out))
    if not todo and (folder / RESULTS).is_file():
        return _nothing_done(config, bench)
    require_same_answers(bench, todo)
    record = Run(folder, "precompute", dump(config))
    display = Display(record, total_crops=bench.total_crops(), remaining_crops=sum(map(crops_of, todo)))
    try:
        with display:
            _distribute(config, bench, todo, places, display)
    except KeyboardInterrupt:
        left, units = len(bench.todo()), len(bench.store.units())
        what = "no unit was finished yet" if left == units else f"{left} of {units} units are left"
        console.print(f"stopped: {what}; the same command goes on there")
        raise
    if not display.units and record.earlier():  # others were faster
        return _nothing_done(config, bench)
    figures = display.figures() | _figures(bench)
    show(figures, config.out)
    return _complain_of_missing(config, bench, record.finish(figures))


def _nothing_done(config: PrecomputeConfig, bench: Bench) -> dict[str, Any]:
    """The record stays that of the run that did the work."""
    console.print(f"{escape(config.out)}: all labels are there already", highlight=False, soft_wrap=True)
    return _complain_of_missing(config, bench, {"images": 0, "crops": 0, "units": 0} | _figures(bench))


def _distribute(
    config: PrecomputeConfig, bench: Bench, todo: list[Unit], places: list[crew.Post], display: Display
) -> None:
    """The units to this process, to several on this machine, or to a cluster."""
    if config.ray and todo:
        cluster.run(
            config.ray, UnitWorker, (absolute(config),), store=bench.store, units=todo, device=config.device,
            per_node=config.processes or 1, take=display.take,
        )  # fmt: skip
        if left := bench.left(todo):
            what = f"{len(left)} units were labelled, but not into this store"
            raise UserError(f"{config.out}: {what}; every node has to see the same folder under this name")
    elif len(places) > 1 and todo:
        crew.run(serve, (config,), places, display.take)
    else:
        work(bench, display.take)


def work(bench: Bench, report: Report) -> None:
    """Labels units until none is left, beside any number of processes that do the same."""
    left = bench.todo()
    if not left:
        return
    with Leases(lease_folder(bench.config.out)) as leases, Labeller(bench, report, left) as labeller:
        patience = Patience(bench, leases)
        while left:
            done = labeller.label(claimed(bench, left, leases), lambda unit: leases.release(unit.name))
            if not done:
                time.sleep(WAIT_SECONDS)  # All that is left is in other processes' hands.
            left = bench.left(left)
            patience.note(done > 0, partial(bench.left, left))
            report(Event(remaining_crops=sum(map(crops_of, left))))


def serve(config: PrecomputeConfig, post: crew.Post, report: Report) -> None:
    """What a further process on this machine does."""
    keep_freed_memory()
    work(set_up(replace(config, workers=config.workers or decoders(post.threads, post.device)), post.device), report)


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
        done = labeller.label(claim, lambda unit: self._leases.release(unit.name))
        self._patience.note(done > 0, self._bench.todo)
        return merged(self._events) if done else None


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
        # Whoever was taken for dead, and is not, finds the unit done: two that write it at once might mix their shards.
        written_bytes = 0 if self._bench.store.is_done(work.unit) else work.write()
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


def _figures(bench: Bench) -> dict[str, Any]:
    """What the store holds by now."""
    return {
        "total_crops": bench.store.images * bench.store.crops,
        "teachers": [teacher.name for teacher in bench.teachers],
        "missing": len(bench.store.missing),
        "fingerprint": bench.store.fingerprint,
    }


def _complain_of_missing(config: PrecomputeConfig, bench: Bench, figures: dict[str, Any]) -> dict[str, Any]:
    """Gives the figures back. Raises UserError where images are missing and that was not said to be tolerated."""
    if figures["missing"] and not config.tolerate_missing:
        some = ", ".join(bench.pack.keys[row] for row in bench.store.missing[:3].tolist())
        hint = "their rows are marked and loaders skip them; set tolerate_missing to accept that"
        what = f"{figures['missing']} images could not be decoded ({some})"
        raise UserError(f"{config.out}: {what}; {hint}", figures=figures)
    return figures
