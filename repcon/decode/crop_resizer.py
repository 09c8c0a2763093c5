"""From decoded images to a batch on the CPU: what the loaders that decode one image at a time share."""

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from repcon.decode.base import CropBatch, CropRequest
from repcon.decode.checks import check_size
from repcon.decode.resize import cut_into, prepare, scratch
from repcon.decode.worker_pool import BufferPool
from repcon.images.pack import ImagePack

Cut = Callable[[range, Iterable[np.ndarray]], None]


def arrays(batch: CropBatch, request: CropRequest) -> tuple[np.ndarray, np.ndarray, tuple[np.ndarray, ...]]:
    """What compiled code takes: boxes (n, c, 4) uint16, flips (n, c) uint8, per side (n * c, side, side, 3) uint8.

    Made once per batch: torch's views, made anew for every eight images, took 2 % of decoding them.
    """
    # Copies, so that a request that cannot be written to needs no second compilation.
    boxes, flips = np.array(request.boxes, np.uint16, order="C"), np.array(request.flips, np.uint8, order="C")
    return boxes, flips, tuple(pixels.permute(0, 2, 3, 1).numpy() for pixels in batch.pixels.values())


class CropResizer:
    """Cuts the boxes of a pack's images with the compiled resize, in any number of threads at once."""

    def __init__(self, pack: ImagePack, sides: Sequence[int]) -> None:
        prepare(sides)
        self._pack, self._scratch = pack, BufferPool(lambda: scratch(pack.widest, sides))

    def into(self, batch: CropBatch, request: CropRequest) -> Cut:
        """`cut(share, images)` fills the batch's rows of those of the request's images whose places are in `share`.

        The images are (height, width, 3) uint8, taken one after the other. `cut` raises UserError where one is not
        of the size that the pack's index has.
        """
        boxes, flips, outs = arrays(batch, request)
        crops = boxes.shape[1]

        def cut(share: range, images: Iterable[np.ndarray]) -> None:
            with self._scratch.one() as (row, line):
                for i, image in zip(share, images, strict=True):
                    check_size(self._pack, int(request.images[i]), image.shape)
                    if crops:  # compiled code that is called for nothing still gives up the interpreter's lock
                        cut_into(image.reshape(len(image), -1), boxes[i], flips[i], outs, i * crops, row, line)

        return cut
