"""Checks that all loaders share; each error names the image: boxes outside it, decode_error bytes, another size."""

from collections.abc import Sequence

import numpy as np

from repcon.decode.base import CropRequest
from repcon.images.pack import ImagePack
from repcon.runtime.errors import UserError


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
