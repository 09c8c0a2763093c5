"""The trainer: one training step, and the loop around it with validation, checkpoints and graceful shutdown."""

import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from repcon.config import TrainConfig
from repcon.distill.checkpoint import CheckpointManager
from repcon.distill.distributed import DistributedContext, GracefulShutdown
from repcon.distill.initialization import init_student
from repcon.distill.loader import Batch, DistillLoader
from repcon.distill.loss import MultiHeadKLLoss
from repcon.distill.loss_guard import LossGuard, explain_batch_norm_error
from repcon.distill.metrics import StepTimer, TrainingLog
from repcon.distill.optim import OptimizerUpdates, autocast, step_seed
from repcon.distill.validation import Validation
from repcon.labels.store import LabelStore
from repcon.models.preprocessing import Preprocessing, normalise, preprocessing_of
from repcon.models.student import Student
from repcon.runtime.device import require_compiler


class Trainer:
    """A student in training, with all that a training step needs; stateful as torch's optimizers are.

    resumed: the state will be loaded from a checkpoint, so the student's initial weights do not matter.
    """

    settings: TrainConfig
    loader: DistillLoader
    distributed: DistributedContext
    loss: MultiHeadKLLoss
    loss_guard: LossGuard
    student: Student
    preprocessing: Preprocessing
    updates: OptimizerUpdates
    validation: Validation
    initialization: dict[str, Any]
    """How the student was initialised, for results and model card."""
    step: int
    """Batches since the start of the run."""
    images: int
    """Crops shown since the start of the run, over all ranks."""

    def __init__(
        self,
        settings: TrainConfig,
        store: LabelStore,
        loader: DistillLoader,
        distributed: DistributedContext,
        *,
        resumed: bool = False,
    ) -> None:
        torch.manual_seed(settings.seed)
        self.settings, self.loader, self.distributed = settings, loader, distributed
        self.loss = MultiHeadKLLoss(
            store.heads, settings.heads, tail=settings.tail, implementation=settings.loss, device=distributed.device
        )
        self.loss_guard = LossGuard(self.loss.names, distributed, Path(settings.out))
        self.student, initialization = init_student(settings, store, loader, distributed, resumed=resumed)
        self.initialization = initialization.to_json()
        self._balance_heads()
        self.preprocessing = preprocessing_of(self.student.backbone, settings.size)
        self.validation = Validation(settings, store, self.preprocessing, distributed)
        self.updates = OptimizerUpdates(
            self.student,
            settings.optim,
            total=sum(-(-steps // settings.grad_accum_steps) for steps in loader.group_steps),
            per_epoch=loader.steps / settings.grad_accum_steps / settings.epochs,
            device=distributed.device,
            precision=settings.precision,
        )
        if settings.compile:
            require_compiler(distributed.device)
        self._ddp = distributed.wrap_ddp(self.student)
        self._model: Any = torch.compile(self._ddp) if settings.compile else self._ddp
        self.step = self.images = 0

    @property
    def averaged_student(self) -> Student:
        """The student to evaluate and to save: the moving average where there is one."""
        averaged = self.updates.averaged
        assert isinstance(averaged, Student)
        return averaged

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """(B, 3, S, S) uint8 to the logits of the student in training."""
        return self._forward(self._model, pixels)

    def _forward(self, model: Any, pixels: torch.Tensor) -> torch.Tensor:
        images = normalise(pixels, self.preprocessing, torch.float32)
        with autocast(self.distributed.device, self.settings.precision):
            return model(images)

    def train_batch(self, batch: Batch, group: int, number: int) -> torch.Tensor:
        """Train on batch `number` of an epoch group; gives (H,) this rank's part of the losses.

        Random numbers depend on the step alone, so that a resumed run repeats them.
        """
        rank, world_size = self.distributed.rank, self.distributed.world_size
        torch.manual_seed(step_seed(self.settings.seed, self.step * world_size + rank))
        updates = self.completes_update(group, number)
        with self._no_sync(updates):
            with explain_batch_norm_error():
                logits = self.forward(batch.pixels)
            self.loss_guard.check()  # the step before; here, so that the CPU runs one step ahead of a GPU
            losses = self.loss(logits, batch.labels, batch.rows)
            self.step += 1
            self.images += batch.total
            self.loss_guard.watch(self.step, losses, logits, batch)
            # DistributedDataParallel averages gradients over ranks, so a rank counts by its part of the batch.
            fraction = len(batch.images) / batch.total
            weight = fraction * world_size / self._batches_in_update(group, number)
            self.updates.step(losses.sum() * weight, update=updates)
        return losses.detach() * fraction

    def completes_update(self, group: int, number: int) -> bool:
        """Whether batch `number` completes an update: `grad_accum_steps` batches, or the last of its epoch group."""
        return (number + 1) % self.settings.grad_accum_steps == 0 or number + 1 == self.loader.group_steps[group]

    def _batches_in_update(self, group: int, number: int) -> int:
        """The number of batches in the update that batch `number` belongs to."""
        first = number - number % self.settings.grad_accum_steps
        return min(self.settings.grad_accum_steps, self.loader.group_steps[group] - first)

    def _no_sync(self, updates: bool) -> AbstractContextManager[Any]:
        """Leave gradients unaveraged over ranks until the last batch of an update."""
        ddp = self._ddp
        return ddp.no_sync() if isinstance(ddp, DistributedDataParallel) and not updates else nullcontext()

    def check_finite(self, batch: Batch | None) -> None:
        """Raises UserError where the last loss, or the student's logits after the last update, are not finite."""
        self.loss_guard.check()
        if batch is not None:
            self.student.eval()
            with torch.no_grad():
                self.loss_guard.check_logits(self.step, self._forward(self.student, batch.pixels))
            self.student.train()

    def validate(self) -> dict[str, Any]:
        """Figures of the averaged student on the validation images, see `Validation.measure`."""
        student = self.averaged_student.eval()
        self.distributed.broadcast(student.buffers())  # batch-norm statistics, which each rank updates by itself
        return self.validation.measure(student, partial(self._forward, student), self.loader)

    def _balance_heads(self) -> None:
        """Set the heads' weights: the configured ones times the balancing weights that the main process found."""
        balance = self.initialization["weights"]
        weights = [balance.get(head.name, 1.0) * head.weight for head in self.settings.heads]
        of_main = torch.tensor(weights) if self.distributed.is_main else torch.zeros(len(weights))
        self.loss.weights.copy_(self.distributed.all_sum(of_main))

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run continues with."""
        return {
            "step": self.step,
            "images": self.images,
            "student": self.student.state_dict(),
            "updates": self.updates.state_dict(),
            "initialization": self.initialization,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state_dict`."""
        self.student.load_state_dict(state["student"])
        self.updates.load_state_dict(state["updates"])
        self.step, self.images, self.initialization = state["step"], state["images"], state["initialization"]
        self._balance_heads()


@dataclass(kw_only=True)
class TrainingLoop:
    """Trains through all epoch groups; validates and saves after each, and saves when it is time or on a signal."""

    trainer: Trainer
    checkpoints: CheckpointManager
    log: TrainingLog
    shutdown: GracefulShutdown
    best_kl: float = float("inf")
    saved_at: float = field(default_factory=time.monotonic)
    """Of the latest checkpoint, or the beginning; `time.monotonic()`."""

    def run(self, state: Mapping[str, Any] | None) -> None:
        """Train until the end. state: the checkpoint to resume from, None at the beginning.

        Raises KeyboardInterrupt once a shutdown was requested and its checkpoint is written.
        """
        trainer, timer = self.trainer, StepTimer()
        first, start = (0, 0) if state is None else self._resume(state)
        if state is None:
            self.log.log_validation(0, 0, trainer.validate())
        batch: Batch | None = None
        with closing(trainer.loader.groups(first, start)) as groups:
            for group, batches in groups:
                trainer.student.train()
                for number, batch in enumerate(timer.measure(batches), start):
                    rate = trainer.updates.lr
                    losses = trainer.train_batch(batch, group, number)
                    self.log.log_step(trainer.step, losses, batch.total, rate, timer)
                    if trainer.completes_update(group, number) and self._save_if_due(batch, (group, number + 1)):
                        raise KeyboardInterrupt
                trainer.check_finite(batch)
                start = 0
                self._end_group(group)

    def _save_if_due(self, batch: Batch, position: tuple[int, int]) -> bool:
        """Save when it is time or a shutdown is requested; gives whether to stop."""
        distributed, settings = self.trainer.distributed, self.trainer.settings
        due = distributed.is_main and time.monotonic() - self.saved_at >= 60 * settings.checkpoint_minutes
        # Summed over the ranks, so that all of them agree.
        flags = torch.tensor([self.shutdown.requested, due], dtype=torch.float32)
        stopping, saving = distributed.all_sum(flags).tolist()
        if stopping or saving:
            self.trainer.check_finite(batch)
            self._save(position, best=False)
        return bool(stopping)

    def _end_group(self, group: int) -> None:
        epoch_group = self.trainer.loader.epoch_groups[group]
        figures = self.trainer.validate()
        self.log.log_validation(self.trainer.step, epoch_group.epoch + len(epoch_group.crops), figures)
        kl = sum(values["kl"] for values in figures["heads"].values())
        best = kl < self.best_kl or not figures["heads"]  # Without validation images the newest counts as the best.
        self.best_kl = min(self.best_kl, kl)
        self._save((group + 1, 0), best=best)

    def _save(self, position: tuple[int, int], *, best: bool) -> None:
        """Write a checkpoint. position: epoch group and batch that a resumed run continues with."""
        self.saved_at = time.monotonic()
        logged = self.log.state_dict()  # on all ranks: it sums over them
        if self.trainer.distributed.is_main:
            progress = {"position": list(position), "best_kl": self.best_kl, "log": logged}
            self.checkpoints.save(self.trainer.state_dict() | progress, self.trainer.step, best=best)

    def _resume(self, state: Mapping[str, Any]) -> tuple[int, int]:
        """Load a checkpoint; gives epoch group and batch to continue with."""
        self.trainer.load_state_dict(state)
        self.best_kl = state["best_kl"]
        self.log.resume(self.trainer.step, self.trainer.images, state["log"])
        group, number = state["position"]
        return group, number
