"""Loader `torch`: libjpeg-turbo (simplejpeg) decodes, compiled code resizes, on threads. Runs wherever torch does.

Torch's own antialiased resize takes 1.3 times as long (4 crops of 160 pixels from 400 x 300, two cores) and rounds to
eight bits between rows and columns, which moves a label by 0.003 nat; `decode.resize` gives the reference's pixels.
Decoder and resize release the GIL, so threads scale like processes and copy nothing.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import repeat

import numpy as np
import simplejpeg

from repcon.decode.base import CropBatch, CropRequest, check_boxes, decode_error
from repcon.decode.buffer_pool import BufferPool, image_buffer
from repcon.decode.resize import CropResizer, Scratch, compile_resize
from repcon.decode.worker_pool import WorkerPool
from repcon.images.pack import ImagePack


class ThreadedLoader:
    """Decodes each image once and resizes each box straight into its place in the batch."""

    kind = "torch"

    def __init__(self, pack: ImagePack, sides: Sequence[int], *, num_workers: int = 0, device: str = "cpu") -> None:
        self._pack, self._sides, self._buffers = pack, tuple(sides), BufferPool(device)
        self._workers = WorkerPool(num_workers, lambda: (image_buffer(pack), Scratch.of(pack.widest, sides)))
        compile_resize(sides)

    def batches(self, requests: Iterable[CropRequest]) -> Iterator[CropBatch]:
        """See `Loader.batches`."""
        return self._workers.run(requests, self._start)

    def _start(self, request: CropRequest) -> tuple[CropBatch, list[Callable[[tuple[np.ndarray, Scratch]], None]]]:
        check_boxes(self._pack, request)
        batch = self._buffers.batch(request, self._sides)
        resizer = CropResizer(self._pack, request, batch)
        chunks = self._workers.chunks(len(request.images))
        return batch, [partial(self._fill, request, resizer, chunk) for chunk in chunks]

    def _fill(
        self, request: CropRequest, resizer: CropResizer, chunk: range, state: tuple[np.ndarray, Scratch]
    ) -> None:
        memory, scratch = state
        rows = request.images[chunk.start : chunk.stop].tolist()
        # All files are read before the first is decoded: each read in between would wait for the GIL.
        encoded = [self._pack.read(row) for row in rows]
        # The images are decoded one at a time into the same memory: each is resized before the next is decoded.
        resizer.resize(chunk, map(self._decode, rows, encoded, repeat(memory)), scratch)

    def _decode(self, row: int, jpeg: bytes, memory: np.ndarray) -> np.ndarray:
        try:
            return simplejpeg.decode_jpeg(jpeg, buffer=memory)
        except ValueError as error:
            raise decode_error(self._pack, row, error) from error

    def close(self) -> None:
        """See `Loader.close`."""
        self._workers.close()
