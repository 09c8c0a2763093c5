"""Some crops with their stored labels, decoded once: what is decided before the first step is decided on them."""

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import torch

from repcon.distill.loader import DistillLoader

Pair = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """Crop 0 of n images, on the training device."""

    parts: list[torch.Tensor]
    """What was made of the pixels, batch by batch; n rows in all."""
    labels: dict[str, Pair]
    """Per head (n, k) ids and (n, k + T) float16 log-probabilities and log-tails, in the order of the parts."""
    crops: int
    """n."""


def held_out_first(loader: DistillLoader, limit: int) -> np.ndarray:
    """Up to `limit` rising rows of the pack: those held out of training, then others, drawn by the run's seed."""
    held = _drawn(loader.held, limit, loader.seed)
    return np.sort(np.concatenate([held, _drawn(loader.rows, limit - len(held), loader.seed)]))


def trained_on(loader: DistillLoader, limit: int) -> np.ndarray:
    """Up to `limit` rising rows of the pack that are trained on, drawn by the run's seed."""
    return np.sort(_drawn(loader.rows, limit, loader.seed))


def _drawn(rows: np.ndarray, count: int, seed: int) -> np.ndarray:
    cpu_group = np.random.Philox(key=[seed, 1 << 62]).random_raw(len(rows))
    return rows[np.argsort(cpu_group, kind="stable")[:count]]


def collect(
    loader: DistillLoader, images: np.ndarray, device: torch.device, transform: Callable[[torch.Tensor], torch.Tensor]
) -> Sample:
    """Decode crop 0 of these rising rows of the pack and keep what `transform` makes of each batch's pixels
    (b, 3, S, S) uint8."""
    parts: list[torch.Tensor] = []
    labels: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    with closing(loader.first_crops(images)) as batches:
        for batch in batches:
            parts.append(transform(batch.pixels))
            for name, (ids, values) in batch.labels.items():
                labels.setdefault(name, []).append((_rows(ids, batch.rows), _rows(values, batch.rows)))
    return Sample(parts=parts, labels={name: _joined(held, device) for name, held in labels.items()}, crops=len(images))


def _rows(table: torch.Tensor, rows: torch.Tensor) -> np.ndarray:
    return table.cpu().numpy()[rows.cpu().numpy()]  # torch does not index by rows in all unsigned integers


def _joined(parts: list[tuple[np.ndarray, np.ndarray]], device: torch.device) -> Pair:
    ids, values = (torch.from_numpy(np.concatenate(column)).to(device) for column in zip(*parts, strict=True))
    return ids, values
