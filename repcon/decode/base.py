"""The loader interface: crop requests in, batches of pixels out, in the same order; and the checks of all loaders.

The caller (precompute, train, evaluate) decides which crops of which images are decoded, and in which order; a loader
only decodes. Ordering, partitioning and resuming therefore live in one place (`distill.sampler`) for all loaders.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from repcon.images.pack import ImagePack
from repcon.runtime.errors import UserError


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

    @classmethod
    def of_images(cls, images: np.ndarray, crops: range, boxes: np.ndarray, flips: np.ndarray) -> "CropRequest":
        """Images (n,) with all their m crops, from boxes (m, n, 4) and flips (m, n)."""
        boxes, flips = (np.ascontiguousarray(array.swapaxes(0, 1)) for array in (boxes, flips))
        return cls(images=images, crops=np.tile(crops, (len(images), 1)), boxes=boxes, flips=flips)

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


def decode_error(pack: ImagePack, row: int, reason: object) -> UserError:
    """The error for an image whose bytes cannot be decoded."""
    return UserError(
        f"image {pack.keys[row]} (row {row} of the pack): cannot be decoded ({reason}); pack the images again"
    )


def check_boxes(pack: ImagePack, request: CropRequest) -> None:
    """Raises UserError naming the first image with a box that is empty or reaches outside the image."""
    boxes = request.boxes.astype(np.int64)
    size = np.asarray(pack.sizes)[request.images][:, None]
    invalid = (boxes[..., 2:] < 1) | (boxes[..., :2] + boxes[..., 2:] > size)
    if invalid.any():
        i, j, _ = np.argwhere(invalid)[0]
        row, box = int(request.images[i]), tuple(boxes[i, j].tolist())
        raise UserError(
            f"image {pack.keys[row]} (row {row} of the pack): box {box} (x, y, width, height) is not inside its "
            f"{size[i, 0, 0]} x {size[i, 0, 1]} pixels; the boxes belong to another pack"
        )


def check_image_size(pack: ImagePack, row: int, shape: Sequence[int]) -> None:
    """Raises UserError where a decoded image (height, width, ...) differs in size from the pack's index."""
    width, height = pack.sizes[row].tolist()
    if (height, width) != tuple(shape[:2]):
        raise decode_error(pack, row, f"it is {shape[1]} x {shape[0]} pixels, the index says {width} x {height}")
