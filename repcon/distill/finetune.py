"""Supervised fine-tuning on labelled images of a pack, for `teach` and the `finetune` metric of `evaluate`."""

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
from repcon.crops.plan import plan_crops
from repcon.decode.base import Loader
from repcon.decode.factory import open_loader
from repcon.distill.loss_guard import explain_batch_norm_error
from repcon.distill.optim import OptimizerUpdates, autocast, step_seed
from repcon.distill.sampler import CropBatchSampler, EpochGroup, box_lookup
from repcon.evaluation.features import centred_squares
from repcon.images.pack import ImagePack
from repcon.models.freeze import freeze
from repcon.models.preprocessing import Preprocessing, normalise, preprocessing_of
from repcon.runtime.errors import UserError


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelledRows:
    """Rows of a pack and their class ids, both (n,) int64."""

    rows: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True, slots=True, kw_only=True)
class EpochResult:
    """Figures of one epoch; accuracies in per cent."""

    epoch: int
    loss: float
    accuracy: float
    """On the training crops."""
    held_loss: float
    held_accuracy: float
    """On the whole validation images; NaN without any."""
    best: bool


def finetune(
    model: nn.Module,
    pack: ImagePack,
    train: LabelledRows,
    validation: LabelledRows,
    config: TeachConfig,
    *,
    device: torch.device,
    bars: Progress,
    on_epoch: Callable[[EpochResult, nn.Module], None],
    save: Callable[[dict[str, Any]], None] = lambda state: None,
    state: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Train `model` by cross-entropy on random crops; gives the model of the epoch with the best validation accuracy.

    Without validation images the last epoch is the best. `on_epoch` is called after each epoch with its result and the
    best model so far, then `save` with the state to resume from (as `state`). `config`: its data, classes and
    validation fraction are not read here.
    """
    preprocessing = preprocessing_of(model, config.size)
    model = model.to(device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    loader = open_loader(config.loader, pack, (preprocessing.size,), num_workers=config.num_workers, device=str(device))
    finetuner = _Finetuner(model, pack, train, config, preprocessing, device, loader)
    best: tuple[float, float] | None = None
    best_model = model
    first = 0
    if state is not None:
        first, best = state["epochs"], tuple(state["best"])
        finetuner.load_state_dict(state)
        best_model = copy.deepcopy(finetuner.updates.averaged)
        best_model.load_state_dict(state["kept"])
    task = bars.add_task("fine-tune", total=config.epochs * finetuner.steps, unit="batches", note="")
    bars.update(task, completed=first * finetuner.steps)
    try:
        for number in range(first, config.epochs):
            torch.manual_seed(step_seed(config.seed, number))  # for dropout
            loss, accuracy = finetuner.train_epoch(number, lambda: bars.advance(task))
            held_accuracy, held_loss = finetuner.validate(validation, config.batch_size)
            score = (held_accuracy, -held_loss)
            is_best = best is None or len(validation.rows) == 0 or score > best
            if is_best:
                best, best_model = score, copy.deepcopy(finetuner.updates.averaged)
            checked = f", held out {held_accuracy:.1f} %" if len(validation.rows) else ""
            bars.update(task, note=f"epoch {number + 1}: loss {loss:.3f}{checked}")
            result = EpochResult(
                epoch=number + 1, loss=loss, accuracy=accuracy, held_loss=held_loss, held_accuracy=held_accuracy,
                best=is_best,
            )  # fmt: skip
            on_epoch(result, best_model)
            progress = {"epochs": number + 1, "best": list(best or score), "kept": best_model.state_dict()}
            save(finetuner.state_dict() | progress)
    finally:
        loader.close()
    return best_model.eval()


class _Finetuner:
    """Trains and validates one model, epoch by epoch."""

    def __init__(
        self,
        model: nn.Module,
        pack: ImagePack,
        train: LabelledRows,
        config: TeachConfig,
        preprocessing: Preprocessing,
        device: torch.device,
        loader: Loader,
    ) -> None:
        self.model, self.pack, self.train, self.config = model, pack, train, config
        self.preprocessing, self.device, self.loader = preprocessing, device, loader
        freeze(model, config.freeze_blocks, config.freeze_norm)
        self.steps = self._sampler(0).steps
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
        """The model's weights, and the state of its updates."""
        return {"model": self.model.state_dict(), "updates": self.updates.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.updates.load_state_dict(state["updates"])

    def train_epoch(self, number: int, advance: Callable[[], None]) -> tuple[float, float]:
        """Train on crop `number` of every image; gives mean loss and accuracy in per cent."""
        self.model.train()
        sampler = self._sampler(number)
        plan = plan_crops(self.config.crop, self.pack.hashes, self.pack.sizes, [number])
        losses, hits, seen = 0.0, 0, 0
        for batch in self.loader.batches(sampler.requests(box_lookup(list(plan.boxes), list(plan.flips)))):
            labels = self.classes[batch.images].to(self.device)
            loss, logits = self._step(batch.pixels[self.preprocessing.size], labels)
            if not np.isfinite(loss):
                raise UserError(f"optim.lr {self.config.optim.lr}: the loss is NaN or infinite; lower the rate")
            losses += loss * len(labels)
            hits += int((logits.argmax(1) == labels).sum())
            seen += len(labels)
            advance()
        return losses / seen, 100 * hits / seen

    def _step(self, pixels: torch.Tensor, labels: torch.Tensor) -> tuple[float, torch.Tensor]:
        inputs = normalise(pixels.to(self.device), self.preprocessing, torch.float32)
        with explain_batch_norm_error(), autocast(self.device, self.config.precision):
            logits = self.model(inputs)
        loss = functional.cross_entropy(logits.float(), labels, label_smoothing=self.config.label_smoothing)
        self.updates.step(loss)
        return float(loss.detach()), logits.detach()

    def validate(self, validation: LabelledRows, batch_size: int) -> tuple[float, float]:
        """Accuracy in per cent and mean cross-entropy on whole images; NaN where there are none."""
        if len(validation.rows) == 0:
            return float("nan"), float("nan")
        logits = predict(self.updates.averaged, self.pack, validation.rows, self.preprocessing, batch_size, self.loader)
        labels = torch.from_numpy(validation.labels.astype(np.int64))
        loss = functional.cross_entropy(logits, labels)
        return 100 * float((logits.argmax(1) == labels).float().mean()), float(loss)

    def _sampler(self, number: int) -> CropBatchSampler:
        group = EpochGroup(epoch=number, crops=(number,))
        return CropBatchSampler(self.train.rows, group, seed=self.config.seed, batch_size=self.config.batch_size)


def predict(
    model: nn.Module,
    pack: ImagePack,
    rows: np.ndarray,
    preprocessing: Preprocessing,
    batch_size: int,
    loader: Loader,
) -> torch.Tensor:
    """(n, C) float32 logits on the CPU, of the whole images in the order of `rows`."""
    model.eval()
    device = next(model.parameters()).device
    logits: list[torch.Tensor] = []
    for batch in loader.batches(centred_squares(pack, rows, batch_size)):
        inputs = normalise(batch.pixels[preprocessing.size].to(device), preprocessing, torch.float32)
        with torch.no_grad():
            logits.append(model(inputs).float().cpu())
    return torch.cat(logits)
