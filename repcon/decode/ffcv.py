"""Loader `ffcv`: the pack's own JPEG bytes in FFCV's `.beton`, read, decoded and cut in one compiled call.

FFCV's stock image field encodes again, decodes with the fast DCT and shrinks by areas; here a field stores the pack's
bytes as they are, and a decoder of ours decodes them with the exact DCT and cuts the exact box. FFCV's writer, reader,
memory map and compiler are used as they are (`decode.ffcv_format`). Its `Loader` class is not: it wants one order and
one batch size for a whole epoch and one crop per sample, reuses batches that the consumer may still hold, and waits for
ever after an error in its thread. So the compiled pipeline is called, a share of a batch at a time, from the threads
that all CPU loaders have; it leaves the interpreter's lock, and says which image failed.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

from repcon.decode.base import CropBatch, CropRequest
from repcon.decode.buffers import CropBuffers
from repcon.decode.checks import check_boxes, undecodable
from repcon.decode.crop_resizer import arrays
from repcon.decode.factory import require
from repcon.decode.worker_pool import BatchPool, BufferPool, empty_batch
from repcon.images.format import BETON
from repcon.images.jpeg import content_hash
from repcon.images.pack import ImagePack
from repcon.runtime.errors import UserError


def write_beton(pack: ImagePack, path: Path) -> None:
    """Writes the pack as FFCV reads it, with the same JPEG bytes. Raises UserError where FFCV is not installed."""
    require("ffcv")
    _ffcv().write(pack, path)


class FfcvLoader:
    """FFCV's file, memory map and compiler; the decoder and the resize of `decode.ffcv_format`."""

    kind = "ffcv"

    def __init__(self, pack: ImagePack, sides: Sequence[int], *, num_workers: int = 0, device: str = "cpu") -> None:
        if "://" in pack.url:
            raise UserError(f"{pack.url}: FFCV reads local files only; copy the pack here or use another loader")
        self._pack, self._sides, self._buffers = pack, tuple(sides), CropBuffers(device)
        self._path = Path(pack.url, BETON)
        self._beton = _ffcv().Beton(pack, self._path, self._sides)
        self._pool = BatchPool(num_workers)
        self._workspaces = BufferPool(self._beton.workspace)
        self._unchecked = bytearray(b"\1" * len(pack) if pack.check else len(pack))

    def batches(self, requests: Iterable[CropRequest]) -> Iterator[CropBatch]:
        """See `Loader.batches`."""
        return self._pool.run(requests, self._begin)

    def _begin(self, request: CropRequest) -> tuple[CropBatch, list[Callable[[], None]]]:
        check_boxes(self._pack, request)
        batch = empty_batch(request, self._sides, self._buffers)
        made = arrays(batch, request)
        return batch, [partial(self._fill, request, *made, share) for share in self._pool.shares(len(request.images))]

    def _fill(
        self, request: CropRequest, boxes: np.ndarray, flips: np.ndarray, outs: tuple[np.ndarray, ...], share: range
    ) -> None:
        part, c = slice(share.start, share.stop), boxes.shape[1]
        rows = np.array(request.images[part], dtype=np.int64)
        filled = tuple(out[share.start * c : share.stop * c] for out in outs)
        for row in rows:
            if self._unchecked[row]:
                self._check(int(row))
        with self._workspaces.one() as space:
            failed = self._beton.decode(rows, boxes[part], flips[part], filled, space)
            if failed >= 0:
                raise undecodable(self._pack, int(rows[failed]), space.error())

    def _check(self, row: int) -> None:
        if content_hash(self._beton.jpeg(row)) != self._pack.hashes[row].tobytes():
            key = self._pack.keys[row]
            raise UserError(f"{self._path}: image {key} has changed; run `repcon pack --ffcv` again to make the file")
        self._unchecked[row] = 0

    def close(self) -> None:
        """See `Loader.close`."""
        self._pool.close()
        self._workspaces.close()


def _ffcv() -> ModuleType:
    """The module that imports FFCV, which sets torch to one thread when it is imported; that is undone here."""
    threads = torch.get_num_threads()
    from repcon.decode import ffcv_format

    torch.set_num_threads(threads)
    return ffcv_format
