"""`repcon train`: the loader's crops, the student's answers, the loss against what the teachers said.

Started by torchrun, the processes share every batch. A run that was stopped goes on from its last checkpoint when
the same command is given again: same batches, and on the CPU the same losses to the last bit.
"""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

from repcon import config
from repcon.config import TrainConfig
from repcon.distill.auto_settings import resolve_auto_settings
from repcon.distill.checkpoint import CheckpointManager, settings_identity
from repcon.distill.distributed import DistributedContext, GracefulShutdown, init_distributed
from repcon.distill.epoch_table import warn_about_worse_heads
from repcon.distill.initialization import check_init_settings
from repcon.distill.loader import DistillLoader
from repcon.distill.metrics import TrainingLog, trim_metrics
from repcon.distill.optim import resolve_precision
from repcon.distill.trackers import Trackers, require_trackers
from repcon.distill.trainer import Trainer, TrainingLoop
from repcon.images.pack import ImagePack
from repcon.labels.store import LabelStore
from repcon.models.student import check_student_writable, save_student
from repcon.runtime.console import console
from repcon.runtime.errors import UserError
from repcon.runtime.run_dir import RunDir, read_results
from repcon.runtime.system import environment

# What may change between the parts of a run: where things are, how fast, and what is shown.
FREE = (
    "pack",
    "store",
    "out",
    "models",
    "num_workers",
    "device",
    "knn",
    "keep_checkpoints",
    "checkpoint_minutes",
    "trackers",
)


def run(settings: TrainConfig) -> dict[str, Any]:
    """Trains, validates, writes `out/student`; gives the final figures. KeyboardInterrupt once a stop is saved."""
    check(settings)
    pack, store = ImagePack.open(settings.pack), LabelStore.open(settings.store)
    settings = resolve_auto_settings(settings, store)
    with init_distributed(settings.device) as distributed, GracefulShutdown() as shutdown:
        settings = dataclasses.replace(settings, precision=resolve_precision(settings.precision, distributed.device))
        checkpoints = CheckpointManager(
            Path(settings.out) / "checkpoints", _identity(settings, pack, store), settings.keep_checkpoints
        )
        state = checkpoints.load_latest()
        results = read_results(settings.out)
        if state is None and results:
            what = "holds a finished run, whose checkpoints are gone"
            raise UserError(f"{settings.out}: {what}; name another `out`, or remove it")
        loader = _loader(settings, pack, store, distributed)
        try:
            if state is not None and state["position"][0] == len(loader.epoch_groups) and results:
                console.print("this run is finished already")
                return results
            folder = _run_folder(settings, state, distributed)
            images = sum(len(loader.train_rows) * len(group.crops) for group in loader.epoch_groups)
            heads = tuple(head.name for head in settings.heads)
            kinds = settings.trackers if distributed.is_main else ()
            step = 0 if state is None else state["step"]
            with Trackers(kinds, settings.out, dataclasses.asdict(settings), step) as trackers:
                log = TrainingLog(folder, distributed, trackers, steps=loader.steps, images=images, heads=heads)
                trainer = Trainer(settings, store, loader, distributed, resumed=state is not None)
                if distributed.is_main:
                    card, student = _card(settings, pack, store, trainer), trainer.averaged_student
                    check_student_writable(student, _folder(settings), preprocessing=trainer.preprocessing, card=card)
                with log:
                    TrainingLoop(trainer=trainer, checkpoints=checkpoints, log=log, shutdown=shutdown).run(state)
                return _finish(settings, pack, store, trainer, log, folder)
        finally:
            loader.close()


def check(settings: TrainConfig) -> None:
    """Raises UserError for settings that make no sense, before anything is opened."""
    config.check_minimum(
        settings, size=0, epochs=1, batch_size=0, crops_per_decode=1, grad_accum_steps=1, mix_window=0,
        label_cache_gib=0, projection=0, freeze_blocks=0, num_workers=0, seed=0, keep_checkpoints=1,
        checkpoint_minutes=0, val_fraction=0, head_warmup_steps=0,
    )  # fmt: skip
    config.check_optim_config(settings.optim)
    if settings.val_fraction >= 1:
        raise UserError(
            f"val_fraction: {settings.val_fraction} leaves no image to train on; 0.02 is usual, 0 keeps none"
        )
    if settings.mix_window and settings.crops_per_decode == 1:
        raise UserError(f"mix_window: {settings.mix_window} has nothing to spread where crops_per_decode is 1")
    if settings.freeze_blocks and not settings.pretrained:
        raise UserError(f"freeze_blocks: {settings.freeze_blocks} would keep random weights where pretrained is false")
    check_init_settings(settings)
    require_trackers(settings.trackers)
    for head in settings.heads:
        if not head.weight >= 0:
            raise UserError(f"heads: {head.name}: weight {head.weight} makes no sense; it must be 0 or more")
    if settings.heads and not any(head.weight for head in settings.heads):
        raise UserError("heads: all weights are 0, so that nothing would be learnt")


def _identity(settings: TrainConfig, pack: ImagePack, store: LabelStore) -> dict[str, Any]:
    """All that batches and losses depend on; a resumed run must agree in it."""
    # What can be added to a store is named by itself too: two hashes that differ tell nobody what to do.
    grown = {"the store's crops": store.crops, "store": store.identity(head.name for head in settings.heads)}
    return settings_identity(settings, FREE) | grown | {"pack": pack.fingerprint}


def _loader(
    settings: TrainConfig, pack: ImagePack, store: LabelStore, distributed: DistributedContext
) -> DistillLoader:
    return DistillLoader(
        pack,
        store,
        size=settings.size,
        batch_size=settings.batch_size,
        epochs=settings.epochs,
        heads=[head.name for head in settings.heads],
        crops_per_decode=settings.crops_per_decode,
        mix_window=settings.mix_window,
        label_cache_gib=settings.label_cache_gib,
        val_fraction=settings.val_fraction,
        seed=settings.seed,
        loader=settings.loader,
        num_workers=settings.num_workers,
        device=distributed.device,
        rank=distributed.rank,
        world_size=distributed.world_size,
    )


def _run_folder(settings: TrainConfig, state: dict[str, Any] | None, distributed: DistributedContext) -> RunDir | None:
    """The leader's output folder; its metrics end where the checkpoint was taken, or begin anew without one."""
    if not distributed.is_main:
        return None
    trim = None if state is None else partial(trim_metrics, step=state["step"])
    return RunDir(settings.out, "train", config.dump(settings), overwrite=state is None, exclusive=True, trim=trim)


def _finish(
    settings: TrainConfig, pack: ImagePack, store: LabelStore, trainer: Trainer, log: TrainingLog, output: RunDir | None
) -> dict[str, Any]:
    """Writes the student with its card, and the results."""
    results = log.results()
    worse = warn_about_worse_heads(results["validation_start"], results["validation"])
    results["heads_worse_than_at_the_start"] = worse
    if output is not None:
        card = _card(settings, pack, store, trainer) | {"metrics": results["validation"].get("heads", {})}
        save_student(trainer.averaged_student, _folder(settings), preprocessing=trainer.preprocessing, card=card)
        made_of = {"store_fingerprint": store.fingerprint, "pack_fingerprint": pack.fingerprint}
        made = {"student": str(_folder(settings)), "init": trainer.initialization}
        results = output.finish(results | made_of | made)
    trainer.distributed.barrier()
    return results


def _folder(settings: TrainConfig) -> Path:
    return Path(settings.out) / "student"


def _card(settings: TrainConfig, pack: ImagePack, store: LabelStore, trainer: Trainer) -> dict[str, Any]:
    """What is known of the student before it is trained."""
    teacher_metadata = [store.heads[head.name].metadata for head in settings.heads]
    return {
        "name": Path(settings.out).name,
        "backbone": settings.backbone,
        "store": store.fingerprint,
        "pack": pack.fingerprint,
        "images": len(trainer.loader.train_rows),
        "epochs": settings.epochs,
        "teachers": [dataclasses.asdict(metadata) for metadata in teacher_metadata],
        "classes": {metadata.name: list(metadata.classes) for metadata in teacher_metadata},
        "initialization": trainer.initialization,
        "held_out": len(trainer.loader.validation_rows),
        "versions": environment()["versions"],
        "recipe": config.dump(settings),
    }
