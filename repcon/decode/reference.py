"""The reference loader: PIL decodes, torch resizes in float32. Slow and plain; other loaders are compared with it."""

import io
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from repcon.decode.base import CropBatch, CropRequest, check_boxes, check_image_size, decode_error
from repcon.decode.buffer_pool import BufferPool
from repcon.images.pack import ImagePack


def decode(jpeg: bytes) -> np.ndarray:
    """(height, width, 3) uint8 RGB of a JPEG's bytes. EXIF orientation is not applied: boxes are in stored pixels."""
    return np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB"))


def crop_float(image: np.ndarray, box: Sequence[int] | np.ndarray, side: int, flip: bool) -> torch.Tensor:
    """The crop before rounding: (3, side, side) float32 in 0..255.

    `image` is (height, width, 3) uint8; `box` is x, y, width, height. The box is cut out first, so that only its own
    pixels are averaged, with torch's antialiased bilinear (triangle) filter.
    """
    x, y, width, height = (int(value) for value in box)
    pixels = torch.from_numpy(np.array(image[y : y + height, x : x + width], dtype=np.float32))
    planes = pixels.permute(2, 0, 1)[None]
    out = F.interpolate(planes, size=(side, side), mode="bilinear", antialias=True, align_corners=False)[0]
    return out.flip(-1) if flip else out


def crop(image: np.ndarray, box: Sequence[int] | np.ndarray, side: int, flip: bool) -> torch.Tensor:
    """`crop_float` rounded to (3, side, side) uint8: what every loader must give."""
    return crop_float(image, box, side, flip).round_().clamp_(0, 255).to(torch.uint8)


class ReferenceLoader:
    """One image at a time, in the consumer's own thread."""

    kind = "reference"

    def __init__(self, pack: ImagePack, sides: Sequence[int], *, device: str = "cpu") -> None:
        self._pack, self._sides, self._buffers = pack, tuple(sides), BufferPool(device)

    def batches(self, requests: Iterable[CropRequest]) -> Iterator[CropBatch]:
        """See `Loader.batches`."""
        for request in requests:
            check_boxes(self._pack, request)
            batch = self._buffers.batch(request, self._sides)
            for i, row in enumerate(request.images):
                self._fill(batch, request, i, int(row))
            yield batch

    def _fill(self, batch: CropBatch, request: CropRequest, i: int, row: int) -> None:
        jpeg = self._pack.read(row)
        try:
            image = decode(jpeg)
        except (OSError, ValueError, SyntaxError) as error:
            raise decode_error(self._pack, row, error) from error
        check_image_size(self._pack, row, image.shape)
        for j, (box, flip) in enumerate(zip(request.boxes[i], request.flips[i], strict=True)):
            for side, pixels in batch.pixels.items():
                pixels[i * len(request.boxes[i]) + j] = crop(image, box, side, bool(flip))

    def close(self) -> None:
        """Nothing to stop."""
