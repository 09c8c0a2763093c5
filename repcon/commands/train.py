"""`repcon train`: the loader's crops, the student's answers, the loss against what the teachers said.

Started by torchrun, the processes share every batch. A run that was stopped goes on from its last checkpoint when
the same command is given again: same batches, and on the CPU the same losses to the last bit.
"""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

from rich.markup import escape

from repcon import config
from repcon.config import TrainConfig
from repcon.distill import defaults, start
from repcon.distill.checkpoint import Checkpoints, decisive
from repcon.distill.distributed import Stop, Team, join
from repcon.distill.loader import Feed
from repcon.distill.metrics import Totals, TrainingLog, trim_metrics
from repcon.distill.optim import resolve
from repcon.distill.trackers import Trackers, require_trackers
from repcon.distill.trainer import Trainer
from repcon.images.pack import Pack
from repcon.labels.store import LabelStore
from repcon.models import student
from repcon.runtime.console import console
from repcon.runtime.errors import UserError
from repcon.runtime.run_dir import Run, read_results
from repcon.runtime.system import environment

# What may change between the parts of a run: where things are, how fast, and what is shown.
FREE = (
    "pack",
    "store",
    "out",
    "models",
    "workers",
    "device",
    "knn",
    "keep_checkpoints",
    "checkpoint_minutes",
    "trackers",
)


def run(settings: TrainConfig) -> dict[str, Any]:
    """Trains, validates, writes `out/student`; gives the final figures. KeyboardInterrupt once a stop is saved."""
    check(settings)
    pack, store = Pack.open(settings.pack), LabelStore.open(settings.store)
    settings = defaults.resolve(settings, store)
    with join(settings.device) as team, Stop() as stop:
        settings = dataclasses.replace(settings, precision=resolve(settings.precision, team.device))
        checkpoints = Checkpoints(
            Path(settings.out) / "checkpoints", _identity(settings, pack, store), settings.keep_checkpoints
        )
        state = checkpoints.newest()
        results = read_results(settings.out)
        if state is None and results:
            what = "holds a finished run, whose checkpoints are gone"
            raise UserError(f"{settings.out}: {what}; name another `out`, or remove it")
        feed = _feed(settings, pack, store, team)
        try:
            if state is not None and state["place"][0] == len(feed.passes) and results:
                console.print(f"{escape(settings.out)}: this run is finished", soft_wrap=True)
                return results
            folder = _run_folder(settings, state, team)
            with _trackers(settings, state, team) as trackers:
                log = TrainingLog(folder, _totals(feed, settings), team, trackers)
                trainer = Trainer(settings, store, feed, team, resumed=state is not None)
                if team.leads:
                    card = _card(settings, pack, store, trainer)
                    student.rehearse(trainer.kept, _folder(settings), preprocessing=trainer.preprocessing, card=card)
                with log:
                    trainer.run(state, checkpoints, log, stop, Path(settings.out))
                return _finish(settings, pack, store, trainer, log)
        finally:
            feed.close()


def check(settings: TrainConfig) -> None:
    """Raises UserError for settings that make no sense, before anything is opened."""
    config.require_least(
        settings, size=0, epochs=1, batch_size=0, crops_per_decode=1, accumulate=1, mix_window=0, label_memory=0,
        projection=0, freeze_blocks=0, workers=0, seed=0, keep_checkpoints=1, checkpoint_minutes=0, holdout=0,
        head_warmup_steps=0,
    )  # fmt: skip
    config.require_sane(settings.optim)
    if settings.holdout >= 1:
        raise UserError(f"holdout: {settings.holdout} leaves no image to train on; 0.02 is usual, 0 keeps none")
    if settings.mix_window and settings.crops_per_decode == 1:
        raise UserError(f"mix_window: {settings.mix_window} has nothing to spread where crops_per_decode is 1")
    if settings.freeze_blocks and not settings.pretrained:
        raise UserError(f"freeze_blocks: {settings.freeze_blocks} would keep random weights where pretrained is false")
    start.check(settings)
    require_trackers(settings.trackers)
    for head in settings.heads:
        if not head.weight >= 0:
            raise UserError(f"heads: {head.name}: weight {head.weight} makes no sense; it must be 0 or more")
    if settings.heads and not any(head.weight for head in settings.heads):
        raise UserError("heads: all weights are 0, so that nothing would be learnt")


def _identity(settings: TrainConfig, pack: Pack, store: LabelStore) -> dict[str, Any]:
    """What decides about batches and losses; a resume must agree in all of it."""
    # What can be added to a store is named by itself too: two hashes that differ tell nobody what to do.
    grown = {"the store's crops": store.crops, "store": store.identity(head.name for head in settings.heads)}
    return decisive(settings, FREE) | grown | {"pack": pack.fingerprint}


def _feed(settings: TrainConfig, pack: Pack, store: LabelStore, team: Team) -> Feed:
    return Feed(
        pack,
        store,
        size=settings.size,
        batch_size=settings.batch_size,
        epochs=settings.epochs,
        heads=[head.name for head in settings.heads],
        crops_per_decode=settings.crops_per_decode,
        mix_window=settings.mix_window,
        label_memory=settings.label_memory,
        holdout=settings.holdout,
        seed=settings.seed,
        loader=settings.loader,
        workers=settings.workers,
        device=team.device,
        rank=team.rank,
        world=team.world,
    )


def _totals(feed: Feed, settings: TrainConfig) -> Totals:
    images = sum(len(feed.rows) * len(part.crops) for part in feed.passes)
    return Totals(steps=feed.steps, images=images, heads=tuple(head.name for head in settings.heads))


def _run_folder(settings: TrainConfig, state: dict[str, Any] | None, team: Team) -> Run | None:
    """The leader's output folder; its metrics end where the checkpoint was taken, or begin anew without one."""
    if not team.leads:
        return None
    trim = None if state is None else partial(trim_metrics, step=state["step"])
    return Run(settings.out, "train", config.dump(settings), afresh=state is None, alone=True, trim=trim)


def _trackers(settings: TrainConfig, state: dict[str, Any] | None, team: Team) -> Trackers:
    """The leader's trackers, which go on with their runs of before where there is a checkpoint."""
    if not team.leads:
        return Trackers()
    step = 0 if state is None else state["step"]
    return Trackers(settings.trackers, settings.out, dataclasses.asdict(settings), step)


def _finish(settings: TrainConfig, pack: Pack, store: LabelStore, trainer: Trainer, log: TrainingLog) -> dict[str, Any]:
    """Writes the student with its card, and the results."""
    results: dict[str, Any] = {**log.results(), "heads_worse_than_at_the_start": log.compared()}
    folder = _folder(settings)
    if trainer.team.leads:
        card = _card(settings, pack, store, trainer) | {"metrics": results["validation"].get("heads", {})}
        student.save(trainer.kept, folder, preprocessing=trainer.preprocessing, card=card)
        console.print(f"student: [bold]{escape(str(folder))}[/]", soft_wrap=True)
        made_of = {"store_fingerprint": store.fingerprint, "pack_fingerprint": pack.fingerprint}
        results = log.finish(results | made_of | {"student": str(folder), "init": trainer.start})
    trainer.team.wait()
    return results


def _folder(settings: TrainConfig) -> Path:
    return Path(settings.out) / "student"


def _card(settings: TrainConfig, pack: Pack, store: LabelStore, trainer: Trainer) -> dict[str, Any]:
    """What is known of the student before it is trained."""
    sections = [store.heads[head.name].section for head in settings.heads]
    return {
        "name": Path(settings.out).name,
        "trunk": settings.trunk,
        "store": store.fingerprint,
        "pack": pack.fingerprint,
        "images": len(trainer.feed.rows),
        "epochs": settings.epochs,
        "teachers": [dataclasses.asdict(section) for section in sections],
        "classes": {section.name: list(section.classes) for section in sections},
        "start": trainer.start,
        "held_out": len(trainer.feed.held),
        "versions": environment()["versions"],
        "recipe": config.dump(settings),
    }
