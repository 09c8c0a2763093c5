"""Loader `torch`: libjpeg-turbo (simplejpeg) and torch's antialiased uint8 resize, on threads. Runs everywhere.

Both libraries leave the interpreter's lock while they work, so threads scale like processes and copy nothing.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import simplejpeg
import torch

from repcon.loaders import CropBatch, Request
from repcon.loaders.buffers import Buffers
from repcon.loaders.pool import BatchPool, empty_batch
from repcon.loaders.reference import check_boxes, check_size, undecodable

if TYPE_CHECKING:
    from repcon.images import Pack

# What F.interpolate(antialias=True) calls, with an output of ours: written channels-last in place it takes two
# thirds of the time, and a strided view of the box needs no copy.
_resize_into = torch._C._nn._upsample_bilinear2d_aa  # pyright: ignore[reportAttributeAccessIssue]


class ThreadsLoader:
    """One decode per image, then each box is resized straight into its place in the batch."""

    kind = "torch"

    def __init__(self, pack: "Pack", sides: Sequence[int], *, workers: int = 0, device: str = "cpu") -> None:
        self._pack, self._sides, self._buffers = pack, tuple(sides), Buffers(device)
        self._pool = BatchPool(workers)
        _keep_torch_single(self._pool)

    def batches(self, requests: Iterable[Request]) -> Iterator[CropBatch]:
        """See `Loader.batches`."""
        return self._pool.run(requests, self._begin)

    def _begin(self, request: Request) -> tuple[CropBatch, list[Callable[[], None]]]:
        check_boxes(self._pack, request)
        batch = empty_batch(request, self._sides, self._buffers)
        shares = self._pool.shares(len(request.images))
        return batch, [partial(self._fill, batch, request, share) for share in shares]

    def _fill(self, batch: CropBatch, request: Request, share: range) -> None:
        for i in share:
            row = int(request.images[i])
            data = self._pack.read(row)
            try:
                image = simplejpeg.decode_jpeg(data)
            except ValueError as error:
                raise undecodable(self._pack, row, error) from error
            check_size(self._pack, row, image.shape)
            cut(image, request, i, batch.pixels)

    def close(self) -> None:
        """See `Loader.close`."""
        self._pool.close()


def _keep_torch_single(pool: BatchPool) -> None:
    """torch splits each resize over threads of its own, which on cores that are busy decoding costs several times
    what it saves. How many it takes is a property of the calling thread, and the last number given is the default of
    threads to come: it is put back.
    """
    threads = torch.get_num_threads()
    pool.in_each_thread(_single)
    torch.set_num_threads(threads)


def _single() -> None:
    torch.get_num_threads()  # a thread's first question sets the default
    torch.set_num_threads(1)


def cut(image: np.ndarray, request: Request, i: int, pixels: dict[int, torch.Tensor]) -> None:
    """Resizes every crop of the request's image i, (height, width, 3) uint8, into its rows of `pixels`."""
    boxes, flips = request.boxes[i].tolist(), request.flips[i].tolist()
    for j, ((x, y, width, height), flip) in enumerate(zip(boxes, flips, strict=True)):
        # numpy slices in half of torch's time, and threads wait for each other meanwhile.
        box = torch.from_numpy(image[y : y + height, x : x + width]).permute(2, 0, 1)[None]
        row = i * len(boxes) + j
        for side, batch in pixels.items():
            out = batch[row : row + 1]
            _resize_into(box, [side, side], False, out=out)
            if flip:
                out.copy_(out.flip(-1))
