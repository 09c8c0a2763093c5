"""A sample of crops with their stored labels, decoded once, for decisions before the first training step."""

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import torch

from repcon.distill.label_cache import LabelPair, take_rows
from repcon.distill.loader import DistillLoader


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelledSample:
    """Crop 0 of n images, on the training device."""

    batches: list[torch.Tensor]
    """Transformed pixels, n rows in all."""
    labels: dict[str, LabelPair]
    """Per head (n, k) ids and (n, k + T) float16 log-probabilities and log-tails, in the order of the batches."""


def draw_images(loader: DistillLoader, limit: int, *, validation_first: bool = False) -> np.ndarray:
    """Up to `limit` ascending training rows of the pack, drawn by the run's seed; optionally validation rows first."""
    drawn = np.arange(0)
    for rows in [loader.validation_rows, loader.train_rows] if validation_first else [loader.train_rows]:
        words = np.random.Philox(key=[loader.seed, 1 << 62]).random_raw(len(rows))
        order = np.argsort(words, kind="stable")
        drawn = np.append(drawn, rows[order[: limit - len(drawn)]])
    return np.sort(drawn)


def load_sample(
    loader: DistillLoader, images: np.ndarray, device: torch.device, transform: Callable[[torch.Tensor], torch.Tensor]
) -> LabelledSample:
    """Decode crop 0 of these ascending rows of the pack, with their labels.

    transform: maps each batch's pixels (b, 3, S, S) uint8 to what is kept of them.
    """
    batches: list[torch.Tensor] = []
    labels: dict[str, list[LabelPair]] = {}
    cpu = torch.device("cpu")
    with closing(loader.first_crops(images)) as loaded:
        for batch in loaded:
            batches.append(transform(batch.pixels))
            for name, (ids, values) in batch.labels.items():
                rows = batch.rows.cpu().numpy()
                labels.setdefault(name, []).append((take_rows(ids, rows, cpu), take_rows(values, rows, cpu)))
    joined: dict[str, LabelPair] = {}
    for name, parts in labels.items():
        ids, values = (torch.cat(column).to(device) for column in zip(*parts, strict=True))
        joined[name] = (ids, values)
    return LabelledSample(batches=batches, labels=joined)
