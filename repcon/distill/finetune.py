"""Supervised fine-tuning on labelled images of a pack, for `teach` and the `finetune` metric of `evaluate`."""

import copy
from collections.abc import Callable, Mapping
from contextlib import closing
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
    size = preprocessing_of(model, config.size).size
    with closing(
        open_loader(config.loader, pack, (size,), num_workers=config.num_workers, device=str(device))
    ) as loader:
        finetuner = _Finetuner(model, pack, train, validation, config, device, loader)
        if state is not None:
            finetuner.load_state_dict(state)
        task = bars.add_task("fine-tune", total=config.epochs * finetuner.steps, unit="batches", note="")
        bars.update(task, completed=finetuner.epochs * finetuner.steps)
        while finetuner.epochs < config.epochs:
            result = finetuner.run_epoch(lambda: bars.advance(task))
            checked = f", held out {result.held_accuracy:.1f} %" if len(validation.rows) else ""
            bars.update(task, note=f"epoch {result.epoch}: loss {result.loss:.3f}{checked}")
            on_epoch(result, finetuner.best_model)
            save(finetuner.state_dict())
    return finetuner.best_model.eval()


class _Finetuner:
    """Trains and validates one model, epoch by epoch, and keeps the best."""

    def __init__(
        self,
        model: nn.Module,
        pack: ImagePack,
        train: LabelledRows,
        validation: LabelledRows,
        config: TeachConfig,
        device: torch.device,
        loader: Loader,
    ) -> None:
        self.model = model.to(device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self.pack, self.train, self.validation, self.config = pack, train, validation, config
        self.preprocessing, self.device, self.loader = preprocessing_of(model, config.size), device, loader
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
        self.epochs = 0
        self.best_model = model
        self._best: tuple[float, float] | None = None

    def state_dict(self) -> dict[str, Any]:
        """The model's weights, the state of its updates, and the best model so far."""
        progress = {"epochs": self.epochs, "best": list(self._best or ())}
        models = {"model": self.model.state_dict(), "best_model": self.best_model.state_dict()}
        return models | {"updates": self.updates.state_dict()} | progress

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.updates.load_state_dict(state["updates"])
        self.epochs, self._best = state["epochs"], tuple(state["best"])
        self.best_model = copy.deepcopy(self.updates.averaged)
        self.best_model.load_state_dict(state["best_model"])

    def run_epoch(self, advance: Callable[[], None]) -> EpochResult:
        """Train and validate the next epoch; keep its model if it is the best."""
        torch.manual_seed(step_seed(self.config.seed, self.epochs))  # for dropout
        loss, accuracy = self.train_epoch(self.epochs, advance)
        held_accuracy, held_loss = self.validate()
        score = (held_accuracy, -held_loss)
        is_best = self._best is None or len(self.validation.rows) == 0 or score > self._best
        if is_best:
            self._best, self.best_model = score, copy.deepcopy(self.updates.averaged)
        self.epochs += 1
        return EpochResult(
            epoch=self.epochs, loss=loss, accuracy=accuracy, held_loss=held_loss, held_accuracy=held_accuracy,
            best=is_best,
        )  # fmt: skip

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

    def validate(self) -> tuple[float, float]:
        """Accuracy in per cent and mean cross-entropy on whole images; NaN where there are none."""
        rows, model, batch_size = self.validation.rows, self.updates.averaged, self.config.batch_size
        if len(rows) == 0:
            return float("nan"), float("nan")
        logits = predict(model, self.pack, rows, self.preprocessing, batch_size, self.loader)
        labels = torch.from_numpy(self.validation.labels.astype(np.int64))
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
    """(n, C) float32 outputs on the CPU for the whole images, in the order of `rows`."""
    model.eval()
    device = next(model.parameters()).device
    outputs: list[torch.Tensor] = []
    for batch in loader.batches(centred_squares(pack, rows, batch_size)):
        inputs = normalise(batch.pixels[preprocessing.size].to(device), preprocessing, torch.float32)
        with torch.no_grad():
            outputs.append(model(inputs).float().cpu())
    return torch.cat(outputs)
