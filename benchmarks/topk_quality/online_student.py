"""A student of teachers that run in every training step: the way without a label store, as the comparison needs it."""

from collections.abc import Generator
from dataclasses import replace
from pathlib import Path

import torch

from repcon.config import TrainConfig
from repcon.distill.distributed import Team
from repcon.distill.loader import Batch, Feed
from repcon.distill.loss_guard import LossGuard
from repcon.distill.trainer import Trainer
from repcon.images.pack import Pack
from repcon.labels import topk
from repcon.labels.store import LabelStore
from repcon.models import student
from repcon.models.teacher import Teacher, from_section


class OnlineFeed(Feed):
    """The same batches, their labels computed by `teachers` from the pixels at hand."""

    teachers: tuple[Teacher, ...] = ()
    temperature: float = 1.0

    def batches(self, part: int, start: int = 0) -> Generator[Batch]:
        for batch in super().batches(part, start):
            labels = {}
            for teacher in self.teachers:
                logits = teacher(batch.pixels)
                ids, logp = topk.encode(logits, self._store.heads[teacher.name].k, (1.0, self.temperature))
                labels[teacher.name] = (ids.clone(), logp.clone())  # Inference tensors take no part in a gradient.
            yield replace(batch, labels=labels, rows=torch.arange(len(batch.pixels)))


def train(settings: TrainConfig, out: Path, *, online: bool) -> Trainer:
    """Trains on the CPU without checkpoints and logs, from the store's labels or `online`, and saves the student.

    The store also says which teachers there are, how many classes of their answers are kept (k) and which crops are
    cut. All heads have one temperature.
    """
    team = Team(rank=0, world=1, device=torch.device("cpu"), words=None)
    store = LabelStore.open(settings.store)
    kind = OnlineFeed if online else Feed
    feed = kind(
        Pack.open(settings.pack), store, size=settings.size, batch_size=settings.batch_size, epochs=settings.epochs,
        holdout=settings.holdout, seed=settings.seed,
    )  # fmt: skip
    if isinstance(feed, OnlineFeed):
        (feed.temperature,) = {head.temperature for head in settings.heads}
        feed.teachers = tuple(from_section(head.section, "cpu") for head in store.heads.values())
    trainer = Trainer(settings, store, feed, team)
    trainer.student.train()
    guard = LossGuard(trainer.loss.names, team, out)
    for part in range(len(feed.passes)):
        for number, batch in enumerate(feed.batches(part)):
            trainer.train_batch(batch, part, number, guard)
    feed.close()
    student.save(trainer.kept, out, preprocessing=trainer.preprocessing, card={})
    return trainer
