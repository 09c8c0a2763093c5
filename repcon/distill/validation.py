"""Validation during training: agreement with each teacher on validation images, and kNN accuracy."""

from collections.abc import Callable, Iterable
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from repcon.config import ClassSubset, HeadConfig, Tail, TrainConfig
from repcon.decode.factory import open_loader
from repcon.distill.distributed import DistributedContext
from repcon.distill.finetune import predict
from repcon.distill.loader import Batch, DistillLoader
from repcon.distill.loss import MultiHeadKLLoss
from repcon.evaluation.probes import knn, split_classes
from repcon.images.pack import select_classes
from repcon.images.packing import open_or_pack
from repcon.labels.store import LabelStore
from repcon.models.preprocessing import Preprocessing
from repcon.models.student import Student
from repcon.runtime.errors import UserError

K = 20
"""Neighbours of the kNN classifier."""


class Validation:
    """The figures that are measured after each epoch group."""

    def __init__(
        self,
        settings: TrainConfig,
        store: LabelStore,
        preprocessing: Preprocessing,
        distributed: DistributedContext,
    ) -> None:
        self._distributed = distributed
        self._agreement = TeacherAgreement(store, settings.heads, settings.tail, distributed)
        self._knn = KnnAccuracy(settings, preprocessing, distributed) if settings.knn and distributed.is_main else None

    def measure(
        self, student: Student, forward: Callable[[torch.Tensor], torch.Tensor], loader: DistillLoader
    ) -> dict[str, Any]:
        """{"heads": {head: {"agreement", "kl"}}, "images": their number} and, where asked for, "knn": accuracy.

        student: in evaluation mode. forward: uint8 pixels to its logits.
        """
        with closing(loader.validation_batches()) as batches:
            heads = self._agreement.measure(student, forward, batches)
        figures: dict[str, Any] = {"heads": heads, "images": len(loader.validation_rows)}
        if self._knn is not None:
            figures["knn"] = self._knn.measure(student)
        self._distributed.barrier()
        return figures


class TeacherAgreement:
    """Top-1 agreement with each teacher, and KL from its stored labels, at temperature 1 where its tail is stored."""

    def __init__(
        self, store: LabelStore, heads: tuple[HeadConfig, ...], tail: Tail, distributed: DistributedContext
    ) -> None:
        self._distributed = distributed
        self._heads = tuple(
            HeadConfig(name=h.name, temperature=1.0 if 1.0 in store.heads[h.name].temperatures else h.temperature)
            for h in heads
        )
        self._loss = MultiHeadKLLoss(
            store.heads, self._heads, tail=tail, implementation="torch", device=distributed.device, announce=False
        )

    @torch.no_grad()
    def measure(
        self, student: Student, forward: Callable[[torch.Tensor], torch.Tensor], batches: Iterable[Batch]
    ) -> dict[str, dict[str, float]]:
        """{head: {"agreement": fraction, "kl": nat}} over the batches of all ranks; {} without any."""
        sums = torch.zeros(2 * len(self._heads) + 1)
        for batch in batches:
            logits = forward(batch.pixels).float()
            rows = len(logits)
            kl = self._loss(logits, batch.labels, batch.rows).cpu() * rows
            hits = []
            for head in self._heads:
                top = batch.labels[head.name][0][:, 0].to(torch.int64)[batch.rows]
                hits.append((logits[:, student.head_slices[head.name]].argmax(1) == top).sum())
            sums += torch.cat([kl, torch.stack(hits).cpu().float(), torch.tensor([float(rows)])])
        sums = self._distributed.all_sum(sums)
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


class KnnAccuracy:
    """Cosine kNN accuracy of the backbone's features on labelled images, half of each class against the other."""

    def __init__(self, settings: TrainConfig, preprocessing: Preprocessing, distributed: DistributedContext) -> None:
        self._pack = open_or_pack(settings.knn, Path(settings.out) / "knn-pack")
        self._rows, self._labels, _ = select_classes(self._pack, ClassSubset())
        self._train, self._test = split_classes(self._labels, 0.5, settings.seed)
        if not len(self._test):
            raise UserError(f"knn: {settings.knn}: no class has two images, of which one is tested; name other images")
        self._preprocessing, self._device = preprocessing, distributed.device
        self._settings = settings

    def measure(self, student: Student) -> float:
        """Fraction of the test half that its K nearest neighbours in the other half classify correctly."""
        settings, inputs = self._settings, self._preprocessing
        with closing(
            open_loader(
                settings.loader, self._pack, (inputs.size,), num_workers=settings.num_workers, device=self._device.type
            )
        ) as loader:
            found = predict(student.backbone, self._pack, self._rows, inputs, settings.batch_size, loader)
        features = found.numpy()
        predicted = knn(features[self._train], self._labels[self._train], features[self._test], (K,))
        return float((predicted[K] == self._labels[self._test]).mean())
