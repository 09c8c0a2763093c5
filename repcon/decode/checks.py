"""What every loader refuses, with the image named: boxes that leave it, bytes that are no JPEG, another size."""

from collections.abc import Sequence

import numpy as np

from repcon.decode.base import CropRequest
from repcon.images.pack import ImagePack
from repcon.runtime.errors import UserError


def undecodable(pack: ImagePack, row: int, error: object) -> UserError:
    """The error for an image whose bytes are no JPEG that the loaders read."""
    return UserError(
        f"image {pack.keys[row]} (row {row} of the pack): cannot be decoded ({error}); pack the images again"
    )


def check_boxes(pack: ImagePack, request: CropRequest) -> None:
    """Raises UserError naming the first image whose boxes are empty or leave it."""
    boxes = request.boxes.astype(np.int64)
    size = np.asarray(pack.sizes)[request.images][:, None]
    wrong = (boxes[..., 2:] < 1) | (boxes[..., :2] + boxes[..., 2:] > size)
    if wrong.any():
        i, j, _ = np.argwhere(wrong)[0]
        row, box = int(request.images[i]), tuple(boxes[i, j].tolist())
        raise UserError(
            f"image {pack.keys[row]} (row {row} of the pack): box {box} (x, y, width, height) is not inside its "
            f"{size[i, 0, 0]} x {size[i, 0, 1]} pixels; the boxes belong to another pack"
        )


def check_size(pack: ImagePack, row: int, shape: Sequence[int]) -> None:
    """Raises UserError where a decoded image, (height, width, ...), is not of the size that the pack's index has."""
    width, height = pack.sizes[row].tolist()
    if (height, width) != tuple(shape[:2]):
        raise undecodable(pack, row, f"it is {shape[1]} x {shape[0]} pixels, the index says {width} x {height}")
