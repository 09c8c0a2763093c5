"""The training loop: batches in, updates out, with validation, checkpoints and a clean stop."""

import time
from contextlib import AbstractContextManager, closing, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from repcon.config import TrainConfig
from repcon.distill.checkpoint import Checkpoints
from repcon.distill.distributed import DistributedContext, GracefulShutdown
from repcon.distill.loader import Batch, Clock, DistillLoader
from repcon.distill.loss import MultiHeadKLLoss
from repcon.distill.loss_guard import LossGuard, batch_norm_explained
from repcon.distill.metrics import TrainingLog
from repcon.distill.optim import OptimizerUpdates, autocast, keyed
from repcon.distill.start import begin
from repcon.distill.validation import Validation
from repcon.labels.store import LabelStore
from repcon.models.preprocessing import normalise, preprocessing_of
from repcon.models.student import Student
from repcon.runtime.device import require_compiler


class Trainer:
    """A student in training. `step` counts batches from the start of the whole run, `images` the crops shown."""

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
        self.student, start = begin(settings, store, loader, distributed, resumed=resumed)
        self.start = start.plain()
        self._weigh()
        self.preprocessing = preprocessing_of(self.student.backbone, settings.size)
        self.validation = Validation(settings, store, self.preprocessing, distributed)
        self.updates = OptimizerUpdates(
            self.student,
            settings.optim,
            total=sum(-(-steps // settings.grad_accum_steps) for steps in loader.lengths),
            per_epoch=loader.steps / settings.grad_accum_steps / settings.epochs,
            device=distributed.device,
            precision=settings.precision,
        )
        if settings.compile:
            require_compiler(distributed.device)
        self._wrapped = distributed.wrap(self.student)
        self._model: Any = torch.compile(self._wrapped) if settings.compile else self._wrapped
        self.step = self.images = 0
        self._best = float("inf")
        self._saved = time.monotonic()

    @property
    def kept(self) -> Student:
        """The student to evaluate and to save: the moving average where there is one."""
        averaged = self.updates.averaged
        assert isinstance(averaged, Student)
        return averaged

    def run(
        self,
        state: dict[str, Any] | None,
        checkpoints: Checkpoints,
        log: TrainingLog,
        stop: GracefulShutdown,
        folder: Path,
    ) -> None:
        """All that is left to do. Raises KeyboardInterrupt after a stop was asked for and its checkpoint written."""
        if state is None:
            log.validated(0, 0, self._measured())
        first, start = (0, 0) if state is None else self._restore(state, log)
        guard = LossGuard(self.loss.names, self.distributed, folder)
        clock = Clock()
        batch: Batch | None = None
        with closing(self.loader.run(first, start)) as epoch_groups:
            for part, batches in epoch_groups:
                self.student.train()
                for number, batch in enumerate(clock.timed(batches), start):
                    rate = self.updates.lr
                    losses = self.train_batch(batch, part, number, guard)
                    log.step(self.step, losses, batch.total, rate, clock)
                    ends, place = self._closes(part, number), (part, number + 1)
                    if ends and self._interrupted(batch, place, checkpoints, log, guard, stop):
                        raise KeyboardInterrupt
                self._check(guard, batch)
                start = 0
                self._end_pass(part, checkpoints, log)

    def answer(self, pixels: torch.Tensor) -> torch.Tensor:
        """(B, 3, S, S) uint8 to the logits of the student in training."""
        return self._answer(self._model, pixels)

    def _answer(self, model: Any, pixels: torch.Tensor) -> torch.Tensor:
        images = normalise(pixels, self.preprocessing, torch.float32)
        with autocast(self.distributed.device, self.settings.precision):
            return model(images)

    def train_batch(self, batch: Batch, part: int, number: int, guard: LossGuard) -> torch.Tensor:
        """One batch; gives (H,) this process's part of its losses. Randomness is keyed by the step alone."""
        torch.manual_seed(keyed(self.settings.seed, self.step * self.distributed.world + self.distributed.rank))
        last = self._closes(part, number)
        with self._apart(last):
            with batch_norm_explained():
                logits = self.answer(batch.pixels)
            guard.check()  # Of the step before. Here, so that the CPU runs ahead of a GPU, but by one step at most.
            losses = self.loss(logits, batch.labels, batch.rows)
            self.step += 1
            self.images += batch.total
            guard.watch(self.step, losses, logits, batch)
            # The team averages gradients, so a process counts by its part of the batch.
            part_of_batch = len(batch.images) / batch.total
            weight = part_of_batch * self.distributed.world / self._joined(part, number)
            self.updates.step(losses.sum() * weight, update=last)
        return losses.detach() * part_of_batch

    def _apart(self, last: bool) -> AbstractContextManager[Any]:
        """Leaves gradients unaveraged until the last batch of an update."""
        wrapped = self._wrapped
        return wrapped.no_sync() if isinstance(wrapped, DistributedDataParallel) and not last else nullcontext()

    def _closes(self, part: int, number: int) -> bool:
        """Whether batch `number` completes an update: `grad_accum_steps` batches, or the last of the pass."""
        return (number + 1) % self.settings.grad_accum_steps == 0 or number + 1 == self.loader.lengths[part]

    def _joined(self, part: int, number: int) -> int:
        """How many batches the update that `number` belongs to is made of."""
        first = number - number % self.settings.grad_accum_steps
        return min(self.settings.grad_accum_steps, self.loader.lengths[part] - first)

    def _interrupted(
        self,
        batch: Batch,
        place: tuple[int, int],
        checkpoints: Checkpoints,
        log: TrainingLog,
        guard: LossGuard,
        stop: GracefulShutdown,
    ) -> bool:
        """Saves when it is time or a stop is asked for; gives whether to stop."""
        late = self.distributed.is_main and time.monotonic() - self._saved >= 60 * self.settings.checkpoint_minutes
        # Summed over the team: what one was asked, and what the leader's clock says, all do.
        stopping, saving = self.distributed.total(torch.tensor([stop.requested, late], dtype=torch.float32)).tolist()
        if stopping or saving:
            self._check(guard, batch)
            self._save(checkpoints, log, place, best=False)
        return bool(stopping)

    def _check(self, guard: LossGuard, batch: Batch | None) -> None:
        """What is kept must be from before anything went wrong: the last loss, or the update after it."""
        guard.check()
        if batch is not None:
            self.student.eval()
            with torch.no_grad():
                guard.check_answers(self.step, self._answer(self.student, batch.pixels))
            self.student.train()

    def _end_pass(self, part: int, checkpoints: Checkpoints, log: TrainingLog) -> None:
        epoch = self.loader.epoch_groups[part].epoch + len(self.loader.epoch_groups[part].crops)
        figures = self._measured()
        log.validated(self.step, epoch, figures)
        kl = sum(values["kl"] for values in figures["heads"].values())
        best = kl < self._best or not figures["heads"]  # With nothing held out, the newest is taken for the best.
        self._best = min(self._best, kl)
        self._save(checkpoints, log, (part + 1, 0), best=best)

    def _measured(self) -> dict[str, Any]:
        """The figures on held-out images of the student that would be kept now."""
        self.distributed.share_buffers(self.kept)
        kept = self.kept.eval()
        return self.validation.measure(kept, partial(self._answer, kept), self.loader)

    def _weigh(self) -> None:
        """Balances the heads' losses as the main process found it."""
        weights = [self.start["weights"].get(head.name, 1.0) * head.weight for head in self.settings.heads]
        found = torch.tensor(weights) if self.distributed.is_main else torch.zeros(len(weights))
        self.loss.weights.copy_(self.distributed.total(found))

    def _save(self, checkpoints: Checkpoints, log: TrainingLog, place: tuple[int, int], *, best: bool) -> None:
        self._saved = time.monotonic()
        logged = log.state()
        if not self.distributed.is_main:
            return
        state = {
            "place": list(place),
            "step": self.step,
            "images": self.images,
            "best": self._best,
            "student": self.student.state_dict(),
            "updates": self.updates.state_dict(),
            "log": logged,
            "start": self.start,
        }
        checkpoints.save(state, self.step, best=best)

    def _restore(self, state: dict[str, Any], log: TrainingLog) -> tuple[int, int]:
        """Takes the run up where `state` was saved; gives pass and batch."""
        self.student.load_state_dict(state["student"])
        self.updates.load_state_dict(state["updates"])
        self.step, self.images, self._best = state["step"], state["images"], state["best"]
        self.start = state["start"]
        self._weigh()
        log.resumed(self.step, self.images, state["log"])
        part, number = state["place"]
        return part, number
