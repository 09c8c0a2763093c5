"""What every way of reading labels gives, and what is timed of it.

Needs numpy and nothing else, so that a Python without torch can time its own libraries (`other_python.py`).
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from repcon.runtime.prefetch import map_ahead

BATCH = 256
Arrays = list[np.ndarray]
"""Boxes (n, 4) uint16, flips (n,) uint8, then per head ids (n, k) uint16 and log-probabilities (n, k + 1) float16."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """A way of keeping or reading the labels of `images` images."""

    images: int
    slab: Callable[[int], Arrays]
    """One crop of all images, in memory of its own."""
    batch: Callable[[int, np.ndarray], Arrays]
    """Random rows of one crop, from the files and not from a slab in memory."""
    bytes: int
    """What the files take for all crops of these images."""
    checks: str
    """What is found wrong before it is served."""

    def slab_seconds(self, crop: int) -> float:
        """Time to read one crop of all images."""
        return seconds(lambda: self.slab(crop))

    def batch_seconds(self, crop: int, rows: np.ndarray) -> float:
        """Time to read these rows of one crop."""
        return seconds(lambda: self.batch(crop, rows))

    def epoch_seconds(self, orders: Sequence[np.ndarray]) -> float:
        """Time of shuffled epochs, one crop each: batches from a slab in memory while the next slab is read."""

        def epochs() -> None:
            for order, slab in zip(orders, map_ahead(self.slab, range(len(orders))), strict=True):
                gather_all(slab, order)

        return seconds(epochs)


def gather_all(slab: Arrays, order: np.ndarray) -> None:
    """All rows in this order, a batch at a time."""
    for start in range(0, len(order), BATCH):
        gather(slab, order[start : start + BATCH])


def gather(slab: Arrays, rows: np.ndarray) -> Arrays:
    """These rows of every array."""
    return [array[rows] for array in slab]


def require_written(arrays: Arrays, classes: Sequence[int]) -> Arrays:
    """The arrays of a label store, checked for fill values as repcon's own reader does. Raises ValueError."""
    boxes, flips, *pairs = arrays
    fills = boxes.max(initial=0) == 65_535 and bool((boxes == 65_535).all(1).any())
    wrong = [ids.max(initial=0) >= count for ids, count in zip(pairs[::2], classes, strict=True)]
    missing = [logp.view(np.int16).max(initial=0) > 0x7C00 for logp in pairs[1::2]]  # as integers, above infinity: NaN
    if fills or flips.max(initial=0) > 1 or any(wrong) or any(missing):
        raise ValueError("a value that was never written")
    return arrays


def seconds(action: Callable[[], object]) -> float:
    """Time that a call takes."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start
