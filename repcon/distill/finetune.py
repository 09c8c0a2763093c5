"""Supervised fine-tuning on labelled rows of a pack: what `teach` does, and `evaluate` where it is asked to."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from rich.progress import Progress
from torch import nn
from torch.nn import functional

from repcon.config import TeachConfig
from repcon.crops.plan import plan
from repcon.decode.base import Loader
from repcon.decode.factory import open_loader
from repcon.distill.loss_guard import batch_norm_explained
from repcon.distill.optim import OptimizerUpdates, autocast, keyed
from repcon.distill.sampler import CropBatchSampler, EpochGroup, cut_of
from repcon.evaluation.features import centred_squares
from repcon.images.pack import ImagePack
from repcon.models.freeze import freeze
from repcon.models.preprocessing import Preprocessing, normalise, preprocessing_of
from repcon.runtime.errors import UserError


@dataclass(frozen=True, slots=True, kw_only=True)
class Labelled:
    """Rows of a pack with their classes, both (n,) int64."""

    rows: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True, slots=True, kw_only=True)
class Epoch:
    """What one epoch came to; accuracies in per cent."""

    epoch: int
    loss: float
    accuracy: float
    """On the crops that were trained on."""
    held_loss: float
    held_accuracy: float
    """On the held-out images, whole; NaN where none are held out."""
    best: bool


def fit(
    model: nn.Module,
    pack: ImagePack,
    train: Labelled,
    held: Labelled,
    config: TeachConfig,
    *,
    device: torch.device,
    bars: Progress,
    report: Callable[[Epoch, nn.Module], None],
    save: Callable[[dict[str, Any]], None] = lambda state: None,
    state: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Trains `model` by cross-entropy on fresh random crops and gives the weights of the best epoch on `held`.

    Without held-out images the last epoch is the best. `report` is called after each epoch, with the weights to keep
    where that epoch is the best so far. `save` is then given the state, which goes on from there as if there had been
    no stop. `config` says how; its data, classes and validation share are not read here.
    """
    preprocessing = preprocessing_of(model, config.size)
    model = model.to(device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    loader = open_loader(config.loader, pack, (preprocessing.size,), num_workers=config.num_workers, device=str(device))
    trainer = _Trainer(model, pack, train, config, preprocessing, device, loader)
    best: tuple[float, float] | None = None
    kept = model
    first = 0
    if state is not None:
        first, best = state["epochs"], tuple(state["best"])
        trainer.load_state_dict(state)
        kept = copy.deepcopy(trainer.updates.averaged)
        kept.load_state_dict(state["kept"])
    task = bars.add_task("fine-tune", total=config.epochs * trainer.steps, unit="batches", note="")
    bars.update(task, completed=first * trainer.steps)
    try:
        for number in range(first, config.epochs):
            torch.manual_seed(keyed(config.seed, number))  # of the epoch's dropout
            loss, accuracy = trainer.epoch(number, lambda: bars.advance(task))
            held_accuracy, held_loss = trainer.check(held, config.batch_size)
            score = (held_accuracy, -held_loss)
            is_best = best is None or len(held.rows) == 0 or score > best
            if is_best:
                best, kept = score, copy.deepcopy(trainer.updates.averaged)
            checked = f", held out {held_accuracy:.1f} %" if len(held.rows) else ""
            bars.update(task, note=f"epoch {number + 1}: loss {loss:.3f}{checked}")
            figures = Epoch(
                epoch=number + 1, loss=loss, accuracy=accuracy, held_loss=held_loss,
                held_accuracy=held_accuracy, best=is_best,
            )  # fmt: skip
            report(figures, kept)
            save(trainer.state_dict() | {"epochs": number + 1, "best": list(best or score), "kept": kept.state_dict()})
    finally:
        loader.close()
    return kept.eval()


class _Trainer:
    """One model's epochs: the order of the images, the step, and the check on held-out images."""

    def __init__(
        self,
        model: nn.Module,
        pack: ImagePack,
        train: Labelled,
        config: TeachConfig,
        preprocessing: Preprocessing,
        device: torch.device,
        loader: Loader,
    ) -> None:
        self.model, self.pack, self.train, self.config = model, pack, train, config
        self.preprocessing, self.device, self.loader = preprocessing, device, loader
        freeze(model, config.freeze_blocks, config.freeze_norm)
        self.steps = self._order(0).steps
        self.updates = OptimizerUpdates(
            model,
            config.optim,
            total=config.epochs * self.steps,
            per_epoch=self.steps,
            device=device,
            precision=config.precision,
        )
        self.classes = torch.full((len(pack),), -1, dtype=torch.int64)
        self.classes[torch.from_numpy(train.rows)] = torch.from_numpy(train.labels.astype(np.int64))

    def state_dict(self) -> dict[str, Any]:
        """The model and what its updates have gathered."""
        return {"model": self.model.state_dict(), "updates": self.updates.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.updates.load_state_dict(state["updates"])

    def epoch(self, number: int, advance: Callable[[], None]) -> tuple[float, float]:
        """Trains on crop `number` of every image; gives mean loss and accuracy in per cent."""
        self.model.train()
        order = self._order(number)
        crops = plan(self.config.crop, self.pack.hashes, self.pack.sizes, [number])
        losses, hits, seen = 0.0, 0, 0
        for batch in self.loader.batches(order.requests(cut_of(list(crops.boxes), list(crops.flips)))):
            labels = self.classes[batch.images].to(self.device)
            loss, logits = self._step(batch.pixels[self.preprocessing.size], labels)
            if not np.isfinite(loss):
                raise UserError(f"optim.lr {self.config.optim.lr}: the loss is no number any more; lower the rate")
            losses += loss * len(labels)
            hits += int((logits.argmax(1) == labels).sum())
            seen += len(labels)
            advance()
        return losses / seen, 100 * hits / seen

    def _step(self, pixels: torch.Tensor, labels: torch.Tensor) -> tuple[float, torch.Tensor]:
        inputs = normalise(pixels.to(self.device), self.preprocessing, torch.float32)
        with batch_norm_explained(), autocast(self.device, self.config.precision):
            logits = self.model(inputs)
        loss = functional.cross_entropy(logits.float(), labels, label_smoothing=self.config.label_smoothing)
        self.updates.step(loss)
        return float(loss.detach()), logits.detach()

    def check(self, held: Labelled, batch_size: int) -> tuple[float, float]:
        """Accuracy in per cent and mean cross-entropy on whole images; NaN where there are none."""
        if len(held.rows) == 0:
            return float("nan"), float("nan")
        logits = predict(self.updates.averaged, self.pack, held.rows, self.preprocessing, batch_size, self.loader)
        labels = torch.from_numpy(held.labels.astype(np.int64))
        loss = functional.cross_entropy(logits, labels)
        return 100 * float((logits.argmax(1) == labels).float().mean()), float(loss)

    def _order(self, number: int) -> CropBatchSampler:
        part = EpochGroup(epoch=number, crops=(number,))
        return CropBatchSampler(self.train.rows, part, seed=self.config.seed, batch_size=self.config.batch_size)


def predict(
    model: nn.Module,
    pack: ImagePack,
    rows: np.ndarray,
    preprocessing: Preprocessing,
    batch_size: int,
    loader: Loader,
) -> torch.Tensor:
    """(n, C) float32 logits on the host, of the whole images in the order of `rows`."""
    model.eval()
    device = next(model.parameters()).device
    parts: list[Any] = []
    for batch in loader.batches(centred_squares(pack, rows, batch_size)):
        inputs = normalise(batch.pixels[preprocessing.size].to(device), preprocessing, torch.float32)
        with torch.no_grad():
            parts.append(model(inputs).float().cpu())
    return torch.cat(parts)
