"""Validation while a student trains: how far it follows each teacher on images that it never trained on, and kNN."""

from collections.abc import Callable, Iterable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch

from repcon.config import ClassSubset, HeadConfig, Tail, TrainConfig
from repcon.decode.factory import open_loader
from repcon.distill.distributed import DistributedContext
from repcon.distill.loader import Batch, DistillLoader
from repcon.distill.loss import MultiHeadKLLoss
from repcon.evaluation.features import centred_squares
from repcon.evaluation.probes import knn, split_classes
from repcon.images.pack import select_classes
from repcon.images.packing import open_or_pack
from repcon.labels.store import LabelStore
from repcon.models.preprocessing import Preprocessing, normalise
from repcon.models.student import Student

NEIGHBOURS = 20


class Validation:
    """All that is measured after a pass."""

    def __init__(
        self,
        settings: TrainConfig,
        store: LabelStore,
        preprocessing: Preprocessing,
        distributed: DistributedContext,
    ) -> None:
        self._distributed = distributed
        self._agreement = Agreement(store, settings.heads, settings.tail, distributed)
        self._neighbours = (
            Neighbours(settings, preprocessing, distributed) if settings.knn and distributed.is_main else None
        )

    def measure(
        self, student: Student, answer: Callable[[torch.Tensor], torch.Tensor], loader: DistillLoader
    ) -> dict[str, Any]:
        """{"heads": {head: {"agreement", "kl"}}, "images": how many} and, where asked for, "knn": accuracy; student in
        eval mode."""
        with closing(loader.held_out()) as batches:
            heads = self._agreement.measure(student, answer, batches)
        figures: dict[str, Any] = {"heads": heads, "images": len(loader.held)}
        if self._neighbours is not None:
            figures["knn"] = self._neighbours.accuracy(student)
        self._distributed.barrier()
        return figures


class Agreement:
    """Top-1 agreement with each teacher, and KL from its stored answers, at temperature 1 where its tail is stored."""

    def __init__(
        self, store: LabelStore, heads: tuple[HeadConfig, ...], tail: Tail, distributed: DistributedContext
    ) -> None:
        self._distributed = distributed
        self._heads = tuple(_plain(head, store.heads[head.name].temperatures) for head in heads)
        self._loss = MultiHeadKLLoss(
            store.heads, self._heads, tail=tail, implementation="torch", device=distributed.device, announced=False
        )

    @torch.no_grad()
    def measure(
        self, student: Student, answer: Callable[[torch.Tensor], torch.Tensor], batches: Iterable[Batch]
    ) -> dict[str, dict[str, float]]:
        """{head: {"agreement": share, "kl": nats}} over the team's batches, {} without any; student in eval mode."""
        sums = torch.zeros(2 * len(self._heads) + 1)
        for batch in batches:
            logits = answer(batch.pixels).float()
            rows = len(logits)
            kl = self._loss(logits, batch.labels, batch.rows).cpu() * rows
            same = [self._same(student, logits, batch, head.name) for head in self._heads]
            sums += torch.cat([kl, torch.stack(same).cpu().float(), torch.tensor([float(rows)])])
        sums = self._distributed.total(sums)
        rows = float(sums[-1])
        if not rows:
            return {}
        return {
            head.name: {
                "agreement": float(sums[len(self._heads) + h]) / rows,
                "kl": float(sums[h]) / rows / head.temperature**2,
            }
            for h, head in enumerate(self._heads)
        }

    def _same(self, student: Student, logits: torch.Tensor, batch: Batch, name: str) -> torch.Tensor:
        """How many rows' first choice is the teacher's."""
        best = batch.labels[name][0][:, 0].to(torch.int64)[batch.rows]
        return (logits[:, student.head_slices[name]].argmax(1) == best).sum()


def _plain(head: HeadConfig, stored: tuple[float, ...]) -> HeadConfig:
    temperature = 1.0 if 1.0 in stored else head.temperature
    return HeadConfig(name=head.name, weight=1.0, temperature=temperature)


class Neighbours:
    """Cosine kNN accuracy of the backbone's features on labelled images, half of each class against the other."""

    def __init__(self, settings: TrainConfig, preprocessing: Preprocessing, distributed: DistributedContext) -> None:
        self._pack = open_or_pack(settings.knn, Path(settings.out) / "knn-pack")
        self._rows, self._labels, _ = select_classes(self._pack, ClassSubset())
        self._train, self._test = split_classes(self._labels, 0.5, settings.seed)
        self._preprocessing, self._device = preprocessing, distributed.device
        self._settings = settings

    @torch.no_grad()
    def accuracy(self, student: Student) -> float:
        """Share of the test half whose 20 nearest of the other half vote for its class."""
        settings, size = self._settings, self._preprocessing.size
        loader = open_loader(
            settings.loader, self._pack, (size,), num_workers=settings.num_workers, device=self._device.type
        )
        parts = []
        try:
            for batch in loader.batches(centred_squares(self._pack, self._rows, settings.batch_size)):
                pixels = normalise(batch.pixels[size].to(self._device), self._preprocessing, torch.float32)
                parts.append(student.features(pixels).float().cpu().numpy())
        finally:
            loader.close()
        features = np.concatenate(parts)
        predicted = knn(features[self._train], self._labels[self._train], features[self._test], (NEIGHBOURS,))
        return float((predicted[NEIGHBOURS] == self._labels[self._test]).mean())
