"""`repcon precompute`, the first main path: images > crops > teachers > top-k > store.

Sets up, distributes the work and shows it; `repcon.precompute.engine` does it.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.markup import escape

from repcon.config import PrecomputeConfig, dump
from repcon.labels.manifest import manifest_of
from repcon.labels.store import Unit
from repcon.precompute import launch_local, launch_ray
from repcon.precompute.batching import find_batch_size
from repcon.precompute.consistency import check_teacher_consistency
from repcon.precompute.context import PrecomputeContext, absolute, check, crops_of, load, set_up
from repcon.precompute.engine import UnitWorker, serve, work
from repcon.precompute.estimate import estimate
from repcon.precompute.output_store import run_folder, spec_of
from repcon.precompute.progress import Display, show
from repcon.runtime.console import console
from repcon.runtime.device import choose
from repcon.runtime.errors import UserError
from repcon.runtime.run_dir import RESULTS, RunDir


def run(config: PrecomputeConfig) -> dict[str, Any]:
    """Labels all crops that the store lacks; gives the figures. What was finished is kept, whatever happens."""
    check(config)
    with launch_local.terminable():
        return _estimate(config) if config.estimate else _label(config)


def _estimate(config: PrecomputeConfig) -> dict[str, Any]:
    pack, loaded, device = load(config)
    sections = [teacher.section for teacher in loaded]
    manifest_of(spec_of(config, pack, sections), config.out)  # refuses what the store would refuse
    config = replace(config, batch_size=config.batch_size or find_batch_size(loaded, device))
    return estimate(config, pack, loaded, device)


def _label(config: PrecomputeConfig) -> dict[str, Any]:
    gpus = torch.cuda.device_count() if choose(config.device).type == "cuda" else 0
    places = launch_local.worker_slots(config.processes or max(1, gpus), gpus)
    shared = config.ray or len(places) > 1  # Then this process only hands out and shows.
    context = set_up(config, "cpu" if shared else "")
    todo = context.todo()
    folder = Path(config.records or run_folder(config.out))
    if not todo and (folder / RESULTS).is_file():
        return _nothing_done(config, context)
    check_teacher_consistency(context, todo)
    record = RunDir(folder, "precompute", dump(config))
    display = Display(record, total_crops=context.total_crops(), remaining_crops=sum(map(crops_of, todo)))
    try:
        with display:
            _distribute(config, context, todo, places, display)
    except KeyboardInterrupt:
        left, units = len(context.todo()), len(context.store.units())
        what = "no unit was finished yet" if left == units else f"{left} of {units} units are left"
        console.print(f"stopped: {what}; the same command goes on there")
        raise
    if not display.units and record.earlier():  # others were faster
        return _nothing_done(config, context)
    figures = display.figures() | _figures(context)
    show(figures, config.out)
    return _complain_of_missing(config, context, record.finish(figures))


def _nothing_done(config: PrecomputeConfig, context: PrecomputeContext) -> dict[str, Any]:
    """The record stays that of the run that did the work."""
    console.print(f"{escape(config.out)}: all labels are there already", highlight=False, soft_wrap=True)
    return _complain_of_missing(config, context, {"images": 0, "crops": 0, "units": 0} | _figures(context))


def _distribute(
    config: PrecomputeConfig,
    context: PrecomputeContext,
    todo: list[Unit],
    places: list[launch_local.WorkerSlot],
    display: Display,
) -> None:
    """The units to this process, to several on this machine, or to a cluster."""
    if config.ray and todo:
        launch_ray.run(
            config.ray, UnitWorker, (absolute(config),), store=context.store, units=todo, device=config.device,
            per_node=config.processes or 1, take=display.take,
        )  # fmt: skip
        if left := context.left(todo):
            what = f"{len(left)} units were labelled, but not into this store"
            raise UserError(f"{config.out}: {what}; every node has to see the same folder under this name")
    elif len(places) > 1 and todo:
        launch_local.run(serve, (config,), places, display.take)
    else:
        work(context, display.take)


def _figures(context: PrecomputeContext) -> dict[str, Any]:
    """What the store holds by now."""
    return {
        "total_crops": context.store.images * context.store.crops,
        "teachers": [teacher.name for teacher in context.teachers],
        "missing": len(context.store.missing),
        "fingerprint": context.store.fingerprint,
    }


def _complain_of_missing(
    config: PrecomputeConfig, context: PrecomputeContext, figures: dict[str, Any]
) -> dict[str, Any]:
    """Gives the figures back. Raises UserError where images are missing and that was not said to be tolerated."""
    if figures["missing"] and not config.tolerate_missing:
        some = ", ".join(context.pack.keys[row] for row in context.store.missing[:3].tolist())
        hint = "their rows are marked and loaders skip them; set tolerate_missing to accept that"
        what = f"{figures['missing']} images could not be decoded ({some})"
        raise UserError(f"{config.out}: {what}; {hint}", figures=figures)
    return figures
