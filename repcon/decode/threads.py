"""Loader `torch`: libjpeg-turbo (simplejpeg) decodes, compiled code resizes, on threads. Runs wherever torch does.

Torch's own antialiased resize takes 1.3 times as long (4 crops of 160 pixels from 400 x 300, two cores) and rounds to
eight bits between rows and columns, which moves a label by 0.003 nat; `decode.resize` gives the reference's pixels.
Decoder and resize leave the interpreter's lock, so threads scale like processes and copy nothing.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import repeat

import numpy as np
import simplejpeg

from repcon.decode.base import CropBatch, CropRequest
from repcon.decode.buffers import CropBuffers, for_one_image
from repcon.decode.checks import check_boxes, undecodable
from repcon.decode.crop_resizer import CropResizer, Cut
from repcon.decode.worker_pool import BatchPool, BufferPool, empty_batch
from repcon.images.pack import ImagePack


class ThreadsLoader:
    """One decode per image, then each box is resized straight into its place in the batch."""

    kind = "torch"

    def __init__(self, pack: ImagePack, sides: Sequence[int], *, num_workers: int = 0, device: str = "cpu") -> None:
        self._pack, self._sides, self._buffers = pack, tuple(sides), CropBuffers(device)
        self._pool = BatchPool(num_workers)
        self._memory = BufferPool(partial(for_one_image, pack))
        self._cutter = CropResizer(pack, self._sides)

    def batches(self, requests: Iterable[CropRequest]) -> Iterator[CropBatch]:
        """See `Loader.batches`."""
        return self._pool.run(requests, self._begin)

    def _begin(self, request: CropRequest) -> tuple[CropBatch, list[Callable[[], None]]]:
        check_boxes(self._pack, request)
        batch = empty_batch(request, self._sides, self._buffers)
        cut = self._cutter.into(batch, request)
        return batch, [partial(self._fill, request, cut, share) for share in self._pool.shares(len(request.images))]

    def _fill(self, request: CropRequest, cut: Cut, share: range) -> None:
        rows = request.images[share.start : share.stop].tolist()
        # All are read before the first is decoded: each reading in between would wait for the interpreter's lock.
        encoded = [self._pack.read(row) for row in rows]
        with self._memory.one() as memory:  # each image is cut before the next one is decoded
            cut(share, map(self._decode, rows, encoded, repeat(memory)))

    def _decode(self, row: int, data: bytes, memory: np.ndarray) -> np.ndarray:
        try:
            return simplejpeg.decode_jpeg(data, buffer=memory)
        except ValueError as error:
            raise undecodable(self._pack, row, error) from error

    def close(self) -> None:
        """See `Loader.close`."""
        self._pool.close()
