"""Loaders: requests for crops in, batches of pixels out, in the same order.

A `CropRequest` names images, crop numbers, boxes and flips; whoever makes the requests (precompute, train, evaluate)
decides the order, and a loader only decodes. So order, partition and resume are one place's business
(`distill.sampler`), and no two decoders can disagree about them.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class CropRequest:
    """What one batch is cut from: n images, c crops of each; every image is decoded once."""

    images: np.ndarray
    """(n,) int64: rows of the pack."""
    crops: np.ndarray
    """(n, c) int64: crop numbers, carried through so that labels can be looked up."""
    boxes: np.ndarray
    """(n, c, 4) uint16: x, y, width, height in the pack's pixels."""
    flips: np.ndarray
    """(n, c) uint8: 1 mirrors the crop from left to right."""

    def part(self, images: slice) -> "CropRequest":
        """The same of some of its images."""
        return CropRequest(
            images=self.images[images], crops=self.crops[images], boxes=self.boxes[images], flips=self.flips[images]
        )

    def parts(self, images: int) -> Iterator["CropRequest"]:
        """The same, at most so many images at a time."""
        return (self.part(slice(start, start + images)) for start in range(0, len(self.images), images))


@dataclass(frozen=True, slots=True, kw_only=True)
class CropBatch:
    """The pixels of one request; row i * c + j is crop j of the request's image i."""

    pixels: dict[int, torch.Tensor]
    """For each side S that the loader was opened for: (n * c, 3, S, S) uint8, channels-last in memory."""
    images: torch.Tensor
    """(n * c,) int64: rows of the pack."""
    crops: torch.Tensor
    """(n * c,) int64: crop numbers."""


class Loader(Protocol):
    """Decodes, cuts exactly the box, resizes with antialiased bilinear interpolation, flips."""

    kind: str
    """The implementation: `reference`, `torch`, `dali` or `ffcv`."""

    def batches(self, requests: Iterable[CropRequest]) -> Iterator[CropBatch]:
        """One batch per request, in order; requests are taken from the iterable a few batches ahead.

        Raises UserError naming the image where a worker cannot read or decode one. Held batches stay valid.
        """
        ...

    def close(self) -> None:
        """Stops workers and frees buffers; safe to call twice."""
        ...
