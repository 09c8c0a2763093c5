"""Loader `ffcv`: the pack's own JPEG bytes in FFCV's `.beton`, read, decoded and cropped in one compiled call.

FFCV's stock image field re-encodes, decodes with the fast DCT and shrinks by areas. Here a field stores the pack's
bytes unchanged, and a decoder of repcon's decodes them with the exact DCT and crops the exact box. FFCV's writer,
reader, memory map and compiler are used unchanged (`decode.ffcv_format`). Its `Loader` class is not used: it needs one
order and one batch size for a whole epoch and one crop per sample, reuses batches that the consumer may still hold, and
hangs after an error in its thread. So the threads of all CPU loaders call the compiled pipeline, for a part of a batch
at a time; it releases the GIL and reports which image failed.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from repcon.decode.base import CropBatch, CropRequest, check_boxes, decode_error
from repcon.decode.buffer_pool import BufferPool
from repcon.decode.libraries import require_installed
from repcon.decode.resize import CropResizer
from repcon.decode.worker_pool import WorkerPool
from repcon.images.format import BETON
from repcon.images.jpeg import content_hash
from repcon.images.pack import ImagePack
from repcon.runtime.errors import UserError


def write_beton(pack: ImagePack, path: Path) -> None:
    """Write the pack in FFCV's format, with the same JPEG bytes. Raises UserError where FFCV is not installed."""
    require_installed("ffcv")
    _ffcv_format().write_beton(pack, path)


class FfcvLoader:
    """FFCV's file, memory map and compiler; the decoder and the resize of `decode.ffcv_format`."""

    kind = "ffcv"

    def __init__(self, pack: ImagePack, sides: Sequence[int], *, num_workers: int = 0, device: str = "cpu") -> None:
        if "://" in pack.url:
            raise UserError(f"{pack.url}: FFCV reads local files only; copy the pack here or use another loader")
        self._pack, self._sides, self._buffers = pack, tuple(sides), BufferPool(device)
        self._path = Path(pack.url, BETON)
        self._reader = _ffcv_format().BetonReader(pack, self._path, self._sides)
        self._workers = WorkerPool(num_workers, self._reader.make_state)
        self._unchecked = bytearray(b"\1" * len(pack) if pack.check else len(pack))

    def batches(self, requests: Iterable[CropRequest]) -> Iterator[CropBatch]:
        """See `Loader.batches`."""
        return self._workers.run(requests, self._start)

    def _start(self, request: CropRequest) -> tuple[CropBatch, list[Callable[[Any], None]]]:
        check_boxes(self._pack, request)
        batch = self._buffers.batch(request, self._sides)
        arrays = CropResizer(self._pack, request, batch)
        rows = np.array(request.images, dtype=np.int64)
        return batch, [partial(self._fill, rows, arrays, chunk) for chunk in self._workers.chunks(len(rows))]

    def _fill(self, all_rows: np.ndarray, arrays: CropResizer, chunk: range, state: Any) -> None:
        images, c = slice(chunk.start, chunk.stop), arrays.boxes.shape[1]
        rows = all_rows[images]
        for row in rows:
            if self._unchecked[row]:
                self._check(int(row))
        outs = tuple(out[chunk.start * c : chunk.stop * c] for out in arrays.outs)
        failed = self._reader.decode(rows, arrays.boxes[images], arrays.flips[images], outs, state)
        if failed >= 0:
            raise decode_error(self._pack, int(rows[failed]), state.error())

    def _check(self, row: int) -> None:
        """Raises UserError where the image's bytes are not those of the pack."""
        if content_hash(self._reader.jpeg(row)) != self._pack.hashes[row].tobytes():
            key = self._pack.keys[row]
            raise UserError(f"{self._path}: image {key} has changed; run `repcon pack --ffcv` again to make the file")
        self._unchecked[row] = 0

    def close(self) -> None:
        """See `Loader.close`."""
        self._workers.close()


def _ffcv_format() -> ModuleType:
    """Import the module that imports FFCV. That sets torch to one thread, which is undone here."""
    threads = torch.get_num_threads()
    from repcon.decode import ffcv_format

    torch.set_num_threads(threads)
    return ffcv_format
