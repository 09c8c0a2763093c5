"""From decoded images to a batch on the CPU: what the loaders that decode one image at a time share."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

from repcon.loaders import CropBatch, Request
from repcon.loaders.pool import Spares
from repcon.loaders.reference import check_size
from repcon.loaders.triangle import cut_into, prepare, scratch

if TYPE_CHECKING:
    from repcon.images import Pack


class Cutter:
    """Cuts the boxes of a pack's images with the compiled resize, in any number of threads at once."""

    def __init__(self, pack: "Pack", sides: Sequence[int]) -> None:
        prepare(sides)
        widest = int(max(pack.sizes[:, 0], default=1))
        self._pack, self._scratch = pack, Spares(lambda: scratch(widest, sides))

    @contextmanager
    def into(self, batch: CropBatch, request: Request) -> Iterator[Callable[[int, np.ndarray], None]]:
        """For one thread: `cut(i, image)` fills the batch's rows of the request's image i, (height, width, 3) uint8.

        `cut` raises UserError where the image is not of the size that the pack's index has.
        """
        boxes, flips = np.ascontiguousarray(request.boxes, np.uint16), np.ascontiguousarray(request.flips, np.uint8)
        outs = tuple(pixels.permute(0, 2, 3, 1).numpy() for pixels in batch.pixels.values())
        with self._scratch.one() as (row, line):

            def cut(i: int, image: np.ndarray) -> None:
                check_size(self._pack, int(request.images[i]), image.shape)
                cut_into(image.reshape(len(image), -1), boxes[i], flips[i], outs, i * boxes.shape[1], row, line)

            yield cut
