"""What every script is asked to do: one teacher's top k over given crops of a folder of JPEGs."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

Forward = Callable[[torch.Tensor], torch.Tensor]
"""(n, 3, size, size) float32, normalised, to logits (n, classes)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A job of a script. It can be pickled."""

    images: Path
    """A folder of 000000.jpg, 000001.jpg, ..."""
    boxes: np.ndarray
    """(N, c, 4) uint16: x, y, width, height."""
    flips: np.ndarray
    """(N, c) uint8."""
    load: Callable[[], Forward]
    """Loads the teacher; in the same process a second call costs nothing."""
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    k: int
    batch_size: int
    """In crops."""
    workers: int
    out: Path
    """A folder that is not there yet."""

    @property
    def images_per_batch(self) -> int:
        """At least one."""
        return max(1, self.batch_size // self.boxes.shape[1])
