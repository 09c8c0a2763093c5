"""`repcon precompute`, the first main path: images > crops > teachers > top-k > store.

Sets up, distributes the work and shows it; `repcon.precompute.engine` does it.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from repcon.config import PrecomputeConfig, dump
from repcon.labels.manifest import manifest_of
from repcon.labels.store import Unit
from repcon.precompute import launch_local, launch_ray
from repcon.precompute.batching import find_batch_size
from repcon.precompute.context import PrecomputeContext, absolute, check, load, resolve, set_up
from repcon.precompute.engine import run_worker, work
from repcon.precompute.estimate import estimate
from repcon.precompute.output_store import crops_of, run_folder, spec_of, unlabelled_crops
from repcon.precompute.progress import Display, show
from repcon.precompute.recompute import check_teacher_consistency
from repcon.runtime.console import console, print_plain
from repcon.runtime.device import choose
from repcon.runtime.errors import UserError
from repcon.runtime.run_dir import RESULTS, RunDir


def run(config: PrecomputeConfig) -> dict[str, Any]:
    """Labels all crops that the store lacks; returns the figures. Finished units are kept, whatever happens."""
    check(config)
    with launch_local.terminable():
        return _estimate(config) if config.estimate else _label(config)


def _estimate(config: PrecomputeConfig) -> dict[str, Any]:
    config = resolve(config)
    pack, teachers, device = load(config)
    spec = spec_of(config, pack, [teacher.metadata for teacher in teachers])
    manifest_of(spec, config.out)  # refuses what the store would refuse
    unlabelled = unlabelled_crops(config, spec)
    teachers = [teacher for teacher in teachers if unlabelled[teacher.name]]
    if not teachers:
        print_plain(f"{config.out}: all labels are there already")
        return {"total_crops": spec.images * spec.crops, "unlabelled_crops": 0}
    config = replace(config, batch_size=config.batch_size or find_batch_size(teachers, device))
    return estimate(config, spec, pack, teachers, device, unlabelled=max(unlabelled.values()))


def _label(config: PrecomputeConfig) -> dict[str, Any]:
    gpus = torch.cuda.device_count() if choose(config.device).type == "cuda" else 0
    slots = launch_local.worker_slots(config.processes or max(1, gpus), gpus)
    has_workers = config.ray or len(slots) > 1  # then this process only starts them and shows their progress
    context = set_up(config, "cpu" if has_workers else "")
    todo = context.todo()
    folder = Path(config.records or run_folder(config.out))
    if not todo and (folder / RESULTS).is_file():
        return _nothing_done(config, context)
    check_teacher_consistency(context, todo)
    record = RunDir(folder, "precompute", dump(context.config))
    display = Display(record, crops=sum(map(crops_of, todo)))
    try:
        with display:
            _distribute(config, context, todo, slots, display)
    except KeyboardInterrupt:
        left, units = len(context.todo()), len(context.store.units())
        what = "no unit was finished yet" if left == units else f"{left} of {units} units are left"
        console.print(f"stopped: {what}; the same command goes on there")
        raise
    if not display.units and record.earlier():  # others were faster
        return _nothing_done(config, context)
    figures = display.figures() | _figures(context)
    show(figures)
    return _require_no_missing(config, context, record.finish(figures))


def _nothing_done(config: PrecomputeConfig, context: PrecomputeContext) -> dict[str, Any]:
    """Leaves the records of the run that did the work."""
    console.print("all labels are there already")
    return _require_no_missing(config, context, {"images": 0, "crops": 0, "units": 0} | _figures(context))


def _distribute(
    config: PrecomputeConfig,
    context: PrecomputeContext,
    todo: list[Unit],
    slots: list[launch_local.WorkerSlot],
    display: Display,
) -> None:
    """Labels the units in this process, in several on this machine, or on a cluster."""
    if config.ray and todo:
        launch_ray.run(
            config.ray, run_worker, (absolute(config),), units=len(todo), device=config.device,
            per_node=config.processes or 1, on_event=display.on_event,
        )  # fmt: skip
        if left := context.store.completion.unfinished(todo):
            what = f"{len(left)} units were labelled, but not into this store"
            raise UserError(f"{config.out}: {what}; every node has to see the same folder under this name")
    elif len(slots) > 1 and todo:
        launch_local.run(run_worker, (config,), slots, display.on_event)
    else:
        work(context, display.on_event)


def _figures(context: PrecomputeContext) -> dict[str, Any]:
    return {
        "total_crops": context.store.images * context.store.crops,
        "teachers": [teacher.name for teacher in context.teachers],
        "missing": len(context.store.completion.missing_rows()),
        "fingerprint": context.store.fingerprint,
    }


def _require_no_missing(
    config: PrecomputeConfig, context: PrecomputeContext, figures: dict[str, Any]
) -> dict[str, Any]:
    """Returns the figures. Raises UserError where images are missing and `tolerate_missing` is not set."""
    if figures["missing"] and not config.tolerate_missing:
        some = ", ".join(context.pack.keys[row] for row in context.store.completion.missing_rows()[:3].tolist())
        hint = "their rows are marked and loaders skip them; set tolerate_missing to accept that"
        what = f"{figures['missing']} images could not be decoded ({some})"
        raise UserError(f"{config.out}: {what}; {hint}", figures=figures)
    return figures
