"""Fine-tunes a generalist on labelled images into a task teacher: a folder that timm and `precompute` open."""

import hashlib
import json
import math
import shutil
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch import nn

from repcon.config import TeachConfig, check_minimum, check_optim_config, dump
from repcon.distill.checkpoint import CheckpointManager, require_same_settings, settings_identity
from repcon.distill.finetune import EpochResult, LabelledRows, finetune
from repcon.distill.metrics import trim_metrics
from repcon.distill.optim import resolve_precision
from repcon.evaluation.probes import split_classes
from repcon.images.pack import ImagePack, select_classes
from repcon.images.packing import open_or_pack
from repcon.models.factory import create_model
from repcon.models.identity import weight_hash
from repcon.models.preprocessing import preprocessing_of
from repcon.models.saved_model import WEIGHTS, save_model
from repcon.runtime.console import console, progress
from repcon.runtime.device import choose
from repcon.runtime.errors import UserError
from repcon.runtime.run_dir import RunDir, finite, read_results

FREE = {"data", "out", "num_workers", "device"}
"""What may differ where a teacher is asked for again: where it is, and how fast it is made."""
CHECKPOINTS = "checkpoints"


def run(config: TeachConfig) -> dict[str, Any]:
    """Writes the teacher of the best epoch, with what it is made of, into `config.out`; gives its figures."""
    check(config)
    device = choose(config.device)
    config = replace(config, precision=resolve_precision(config.precision, device))
    results = read_results(config.out)
    if results and Path(config.out, WEIGHTS).is_file():
        require_same_settings(config, "teach", FREE)
        _open_images(config, results, "holds a teacher of")
        console.print("this teacher is finished already")
        return results
    checkpoints = CheckpointManager(Path(config.out) / CHECKPOINTS, settings_identity(config, FREE), keep=1)
    state = checkpoints.load_latest()
    trim = None if state is None else partial(trim_metrics, epoch=state["epochs"])
    output = RunDir(config.out, "teach", dump(config), overwrite=state is None, exclusive=True, trim=trim)
    results = output.finish(_teach(config, device, output, checkpoints, state))
    shutil.rmtree(checkpoints.folder, ignore_errors=True)
    return results


def _teach(
    config: TeachConfig,
    device: torch.device,
    output: RunDir,
    checkpoints: CheckpointManager,
    state: dict[str, Any] | None,
) -> dict[str, Any]:
    """The epochs that are left, and the figures of all of them."""
    images = _open_images(config, state, "was begun on")
    torch.manual_seed(config.seed)  # the new classifier's start
    made_of = {
        "start": config.model,
        "start_weight_hash": weight_hash(create_model(config.model)),
        **images.fingerprints,
        "train_images": len(images.train.rows),
        "validation_images": len(images.validation.rows),
        "license": config.license,
    }
    model = create_model(config.model, num_classes=len(images.classes), size=config.size)
    preprocessing = preprocessing_of(model, config.size)
    epochs = [] if state is None else [EpochResult(**epoch) for epoch in state["reported"]]
    if epochs:
        console.print(f"going on after epoch {len(epochs)}")

    def on_epoch(epoch: EpochResult, best: nn.Module) -> None:
        epochs.append(epoch)
        output.log("epoch", **asdict(epoch))
        if epoch.best:
            about = {"epoch": epoch.epoch, "validation_accuracy": finite(epoch.held_accuracy)}
            extra = made_of | {"recipe": tomllib.loads(dump(config))} | about
            save_model(best, output.path, classes=images.classes, preprocessing=preprocessing, extra=extra)

    def save(state: dict[str, Any]) -> None:
        reported = [asdict(epoch) for epoch in epochs]
        checkpoints.save(state | {"reported": reported} | images.fingerprints, len(epochs), best=False)

    with progress() as bars:
        finetune(
            model, images.pack, images.train, images.validation, config, device=device, bars=bars, on_epoch=on_epoch,
            save=save, state=state,
        )  # fmt: skip
    best = next(epoch for epoch in reversed(epochs) if epoch.best)
    _show(epochs, best, len(images.classes))
    results = {"classes": len(images.classes), "class_names": list(images.classes), "best_epoch": best.epoch}
    figures = {"validation_accuracy": best.held_accuracy, "validation_loss": best.held_loss, "train_loss": best.loss}
    return results | figures | made_of


@dataclass(frozen=True, slots=True, kw_only=True)
class _Images:
    """What a teacher learns from."""

    pack: ImagePack
    classes: tuple[str, ...]
    train: LabelledRows
    validation: LabelledRows
    fingerprints: dict[str, str]
    """The pack's, which is of its images alone, and a sha256 (hex) of which image has which label."""


def _open_images(config: TeachConfig, earlier: Mapping[str, Any] | None, what: str) -> _Images:
    """Raises UserError where an earlier run recorded other images or labels; `what` the message says of it."""
    pack = open_or_pack(config.data, Path(config.out) / "pack")
    rows, labels, classes = select_classes(pack, config.classes)
    digest = hashlib.sha256(json.dumps(list(classes)).encode())
    for numbers in (rows, labels):
        digest.update(np.ascontiguousarray(numbers, "<i8").tobytes())
    fingerprints = {"data_fingerprint": pack.fingerprint, "labels_fingerprint": digest.hexdigest()}
    for field, name in (("data_fingerprint", "other images"), ("labels_fingerprint", "other labels of these images")):
        if earlier is not None and earlier.get(field) != fingerprints[field]:
            raise UserError(f"{config.out}: {what} {name}; name another folder, or remove it")
    train, validation = (
        LabelledRows(rows=rows[part], labels=labels[part])
        for part in split_classes(labels, config.val_fraction, config.seed)
    )
    return _Images(pack=pack, classes=classes, train=train, validation=validation, fingerprints=fingerprints)


def check(config: TeachConfig) -> None:
    """Raises UserError for settings that make no sense, before anything is opened."""
    if not 0 <= config.val_fraction < 1:
        raise UserError(f"val_fraction: {config.val_fraction} is no share of the images; 0.15 is usual, 0 keeps none")
    if not 0 <= config.label_smoothing < 1:
        raise UserError(f"label_smoothing: {config.label_smoothing} makes no sense; 0.1 is usual, 0 leaves labels hard")
    check_optim_config(config.optim)
    check_minimum(config, epochs=1, size=1, batch_size=1, freeze_blocks=0, num_workers=0, seed=0)


def _show(epochs: list[EpochResult], best: EpochResult, classes: int) -> None:
    table = Table(title=f"Task teacher, {classes} classes", title_justify="left", caption="* the epoch that is kept")
    for column in ("epoch", "loss", "crops right %", "held-out loss", "held out right %"):
        table.add_column(column, justify="right")
    for epoch in epochs:
        shown = ((epoch.loss, 2), (epoch.accuracy, 1), (epoch.held_loss, 2), (epoch.held_accuracy, 1))
        # With nothing held out there is no figure.
        cells = ["-" if math.isnan(value) else f"{value:.{digits}f}" for value, digits in shown]
        mark = "* " if epoch is best else ""
        table.add_row(f"{mark}{epoch.epoch}", *cells, style="bold green" if mark else "")
    console.print(table)
