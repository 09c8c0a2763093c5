"""A sample of crops with their stored labels, decoded once, for decisions before the first training step."""

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import torch

from repcon.distill.label_cache import LabelPair
from repcon.distill.loader import DistillLoader


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelledSample:
    """Crop 0 of n images, on the training device."""

    batches: list[torch.Tensor]
    """Transformed pixels, n rows in all."""
    labels: dict[str, LabelPair]
    """Per head (n, k) ids and (n, k + T) float16 log-probabilities and log-tails, in the order of the batches."""
    count: int
    """n."""


def sample_validation_first(loader: DistillLoader, limit: int) -> np.ndarray:
    """Up to `limit` ascending rows of the pack: validation rows, then training rows, drawn by the run's seed."""
    rows = _draw(loader.validation_rows, limit, loader.seed)
    return np.sort(np.concatenate([rows, _draw(loader.train_rows, limit - len(rows), loader.seed)]))


def sample_training(loader: DistillLoader, limit: int) -> np.ndarray:
    """Up to `limit` ascending training rows of the pack, drawn by the run's seed."""
    return np.sort(_draw(loader.train_rows, limit, loader.seed))


def _draw(rows: np.ndarray, count: int, seed: int) -> np.ndarray:
    words = np.random.Philox(key=[seed, 1 << 62]).random_raw(len(rows))
    return rows[np.argsort(words, kind="stable")[:count]]


def load_sample(
    loader: DistillLoader, images: np.ndarray, device: torch.device, transform: Callable[[torch.Tensor], torch.Tensor]
) -> LabelledSample:
    """Decode crop 0 of these ascending rows of the pack, with their labels.

    transform: maps each batch's pixels (b, 3, S, S) uint8 to what is kept of them.
    """
    batches: list[torch.Tensor] = []
    labels: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    with closing(loader.first_crops(images)) as loaded:
        for batch in loaded:
            batches.append(transform(batch.pixels))
            for name, (ids, values) in batch.labels.items():
                labels.setdefault(name, []).append((_take_rows(ids, batch.rows), _take_rows(values, batch.rows)))
    joined = {name: _concatenate(parts, device) for name, parts in labels.items()}
    return LabelledSample(batches=batches, labels=joined, count=len(images))


def _take_rows(table: torch.Tensor, rows: torch.Tensor) -> np.ndarray:
    return table.cpu().numpy()[rows.cpu().numpy()]  # torch does not index tensors of all unsigned dtypes


def _concatenate(parts: list[tuple[np.ndarray, np.ndarray]], device: torch.device) -> LabelPair:
    ids, values = (torch.from_numpy(np.concatenate(column)).to(device) for column in zip(*parts, strict=True))
    return ids, values
