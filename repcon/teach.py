"""Fine-tunes a generalist on labelled images into a task teacher: a folder that timm and `precompute` open."""

import math
import tomllib
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.markup import escape
from rich.table import Table
from torch import nn

from repcon import backbones
from repcon.config import TeachConfig, dump, require_least, require_sane
from repcon.device import choose
from repcon.errors import UserError
from repcon.images import Pack, class_rows
from repcon.packing import open_or_pack
from repcon.probing.probes import split_classes
from repcon.record import RESULTS, Run, console, finite, progress
from repcon.training.finetune import Epoch, Labelled, fit
from repcon.training.optim import resolve

FREE = {"data", "out", "workers", "device"}
"""What may differ where a finished teacher is asked for again: where it is, and how fast it was made."""


def run(config: TeachConfig) -> dict[str, Any]:
    """Writes the teacher of the best epoch, with what it is made of, into `config.out`; gives its figures."""
    _check(config)
    device = choose(config.device)
    config = replace(config, precision=resolve(config.precision, device))
    finished = _finished(config)
    output = Run(config.out, "teach", dump(config), afresh=not finished, alone=True)
    pack = open_or_pack(config.data, output.path / "pack")
    if finished:
        return _kept(config, output.earlier(), pack)
    rows, labels, names = class_rows(pack, config.classes)
    fitted, held = split_classes(labels, config.validation, config.seed)
    torch.manual_seed(config.seed)  # The new classifier's start, and dropout.
    start = backbones.create(config.model)
    provenance = {
        "start": config.model,
        "start_weight_hash": backbones.weight_hash(start),
        "data_fingerprint": pack.fingerprint,
        "train_images": len(fitted),
        "validation_images": len(held),
        "licence": config.licence,
        "recipe": tomllib.loads(dump(config)),
    }
    model = backbones.create(config.model, num_classes=len(names), size=config.size)
    preprocessing = backbones.preprocessing(model, config.size)
    epochs: list[Epoch] = []

    def report(epoch: Epoch, best: nn.Module) -> None:
        epochs.append(epoch)
        output.log("epoch", **asdict(epoch))
        if epoch.best:
            extra = provenance | {"epoch": epoch.epoch, "validation_accuracy": finite(epoch.held_accuracy)}
            backbones.save(best, output.path, classes=names, preprocessing=preprocessing, extra=extra)

    with progress() as bars:
        fit(
            model, pack, Labelled(rows=rows[fitted], labels=labels[fitted]),
            Labelled(rows=rows[held], labels=labels[held]), config, device=device, bars=bars, report=report,
        )  # fmt: skip
    best = next(epoch for epoch in reversed(epochs) if epoch.best)
    _show(epochs, best, len(names))
    console.print(f"teacher of {len(names)} classes written to {escape(str(output.path))}", soft_wrap=True)
    results = {"classes": len(names), "class_names": list(names), "best_epoch": best.epoch}
    figures = {"validation_accuracy": best.held_accuracy, "validation_loss": best.held_loss, "train_loss": best.loss}
    return output.finish(results | figures | {k: v for k, v in provenance.items() if k != "recipe"})


def _kept(config: TeachConfig, earlier: dict[str, Any], pack: Pack) -> dict[str, Any]:
    """The figures of the finished teacher. Raises UserError where it learnt from other images."""
    if earlier.get("data_fingerprint") != pack.fingerprint:
        raise UserError(f"{config.out}: holds a teacher of other images; name another folder, or remove it")
    console.print(f"{escape(config.out)}: this teacher is finished", soft_wrap=True)
    return earlier


def _finished(config: TeachConfig) -> bool:
    """Whether `config.out` holds a finished teacher. Raises UserError for one of another recipe."""
    recipe, teacher, results = (Path(config.out, name) for name in ("config.toml", backbones.WEIGHTS, RESULTS))
    finished = teacher.is_file() and results.is_file()
    if finished:
        held, asked = tomllib.loads(recipe.read_text()), tomllib.loads(dump(config))
        if other := sorted(name for name in (held.keys() | asked.keys()) - FREE if held.get(name) != asked.get(name)):
            what = f"a teacher of another recipe ({', '.join(other)})"
            raise UserError(f"{config.out}: holds {what}; name another folder, or remove it")
    return finished


def _check(config: TeachConfig) -> None:
    if not 0 <= config.validation < 1:
        raise UserError(f"validation: {config.validation} is no share of the images; 0.15 is usual, 0 keeps none")
    if not 0 <= config.label_smoothing < 1:
        raise UserError(f"label_smoothing: {config.label_smoothing} makes no sense; 0.1 is usual, 0 leaves labels hard")
    require_sane(config.optim)
    require_least(config, epochs=1, size=1, batch_size=1, freeze_blocks=0, workers=0, seed=0)


def _show(epochs: list[Epoch], best: Epoch, classes: int) -> None:
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
