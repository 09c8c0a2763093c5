"""The loader interface: crop requests in, batches of pixels out, in the same order.

The caller (precompute, train, evaluate) decides which crops of which images are decoded, and in which order; a loader
only decodes. Ordering, partitioning and resuming therefore live in one place (`distill.sampler`) for all loaders.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class CropRequest:
    """The crops of one batch: n images, c crops of each; every image is decoded once."""

    images: np.ndarray
    """(n,) int64: rows of the pack."""
    crops: np.ndarray
    """(n, c) int64: crop numbers, passed through to the batch so that labels can be looked up."""
    boxes: np.ndarray
    """(n, c, 4) uint16: x, y, width, height in the pack's pixels."""
    flips: np.ndarray
    """(n, c) uint8: 1 mirrors the crop from left to right."""

    def subset(self, images: slice) -> "CropRequest":
        """The same crops of some of the images."""
        return CropRequest(
            images=self.images[images], crops=self.crops[images], boxes=self.boxes[images], flips=self.flips[images]
        )

    def split(self, images: int) -> Iterator["CropRequest"]:
        """Requests of at most `images` images each."""
        return (self.subset(slice(start, start + images)) for start in range(0, len(self.images), images))


@dataclass(frozen=True, slots=True, kw_only=True)
class CropBatch:
    """The pixels of one request; row i * c + j is crop j of the request's image i."""

    pixels: dict[int, torch.Tensor]
    """For each side S that the loader was opened for: (n * c, 3, S, S) uint8, channels-last in memory."""
    images: torch.Tensor
    """(n * c,) int64: rows of the pack."""
    crops: torch.Tensor
    """(n * c,) int64: crop numbers."""

    @classmethod
    def for_request(cls, request: CropRequest, pixels: dict[int, torch.Tensor]) -> "CropBatch":
        """A batch with the request's image rows and crop numbers."""
        images = np.repeat(np.asarray(request.images, dtype=np.int64), request.crops.shape[1])
        crops = np.array(request.crops, dtype=np.int64).reshape(-1)
        return cls(pixels=pixels, images=torch.from_numpy(images), crops=torch.from_numpy(crops))


class Loader(Protocol):
    """Decodes images, crops exactly the box, resizes with antialiased bilinear interpolation, flips."""

    kind: str
    """The implementation: `reference`, `torch`, `dali` or `ffcv`."""

    def batches(self, requests: Iterable[CropRequest]) -> Iterator[CropBatch]:
        """One batch per request, in order; requests are taken from the iterable a few batches ahead.

        Raises UserError naming the image that cannot be read or decoded. Batches that the caller keeps stay valid.
        """
        ...

    def close(self) -> None:
        """Stop the workers and free the buffers; safe to call twice."""
        ...
