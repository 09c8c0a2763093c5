"""A student of teachers that run in every training step: the way without a label store, as the comparison needs it."""

from collections.abc import Generator
from dataclasses import replace
from pathlib import Path

import torch

from repcon.config import TrainConfig
from repcon.distill.distributed import DistributedContext
from repcon.distill.loader import Batch, DistillLoader
from repcon.distill.trainer import Trainer
from repcon.images.pack import ImagePack
from repcon.labels import topk
from repcon.labels.store import LabelStore
from repcon.models.student import save_student
from repcon.models.teacher import Teacher, load_stored_teacher


class OnlineFeed(DistillLoader):
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
    distributed = DistributedContext(rank=0, world_size=1, device=torch.device("cpu"), cpu_group=None)
    store = LabelStore.open(settings.store)
    kind = OnlineFeed if online else DistillLoader
    loader = kind(
        ImagePack.open(settings.pack), store, size=settings.size, batch_size=settings.batch_size,
        epochs=settings.epochs, val_fraction=settings.val_fraction, seed=settings.seed,
    )  # fmt: skip
    if isinstance(loader, OnlineFeed):
        (loader.temperature,) = {head.temperature for head in settings.heads}
        loader.teachers = tuple(load_stored_teacher(head.metadata, "cpu") for head in store.heads.values())
    trainer = Trainer(settings, store, loader, distributed)
    trainer.student.train()
    for part in range(len(loader.epoch_groups)):
        for number, batch in enumerate(loader.batches(part)):
            trainer.train_batch(batch, part, number)
    loader.close()
    save_student(trainer.averaged_student, out, preprocessing=trainer.preprocessing, card={})
    return trainer
