"""Loader `ffcv`: the pack's own JPEG bytes in FFCV's `.beton`, read, decoded and cropped in one compiled call.

FFCV's stock image field re-encodes, decodes with the fast DCT and shrinks by areas. Here a field stores the pack's
bytes unchanged, and a decoder of repcon's decodes them with the exact DCT and crops the exact box. FFCV's writer,
reader, memory map and compiler are used unchanged (`decode.ffcv_format`). Its `Loader` class is not used: it needs one
order and one batch size for a whole epoch and one crop per sample, reuses batches that the consumer may still hold, and
hangs after an error in its thread. So the threads of all CPU loaders call the compiled pipeline, for a part of a batch
at a time; it releases the GIL and reports which image failed.
"""

from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from repcon.decode.base import decode_error
from repcon.decode.libraries import require_installed
from repcon.decode.resize import CropResizer
from repcon.decode.worker_pool import CpuLoader
from repcon.images.format import BETON
from repcon.images.jpeg import content_hash
from repcon.images.pack import ImagePack
from repcon.runtime.errors import UserError


def write_beton(pack: ImagePack, path: Path) -> None:
    """Write the pack in FFCV's format, with the same JPEG bytes. Raises UserError where FFCV is not installed."""
    require_installed("ffcv")
    _ffcv_format().write_beton(pack, path)


class FfcvLoader(CpuLoader[Any]):
    """FFCV's file, memory map and compiler; the decoder and the resize of `decode.ffcv_format`."""

    kind = "ffcv"

    def __init__(self, pack: ImagePack, sides: Sequence[int], *, num_workers: int = 0, device: str = "cpu") -> None:
        if "://" in pack.url:
            raise UserError(f"{pack.url}: FFCV reads local files only; copy the pack here or use another loader")
        self._path = Path(pack.url, BETON)
        self._reader = _ffcv_format().BetonReader(pack, self._path, tuple(sides))
        self._unchecked = bytearray(b"\1" * len(pack) if pack.check else len(pack))
        super().__init__(pack, sides, self._reader.make_state, num_workers, device)

    def _fill(self, resizer: CropResizer, places: range, state: Any) -> None:
        images, c = slice(places.start, places.stop), resizer.boxes.shape[1]
        rows = resizer.rows[images]
        for row in rows:
            if self._unchecked[row]:
                self._check(int(row))
        outs = tuple(out[places.start * c : places.stop * c] for out in resizer.outs)
        failed = self._reader.decode(rows, resizer.boxes[images], resizer.flips[images], outs, state)
        if failed >= 0:
            raise decode_error(self._pack, int(rows[failed]), state.error())

    def _check(self, row: int) -> None:
        """Raises UserError where the image's bytes are not those of the pack."""
        if content_hash(self._reader.jpeg(row)) != self._pack.hashes[row].tobytes():
            key = self._pack.keys[row]
            raise UserError(f"{self._path}: image {key} has changed; run `repcon pack --ffcv` again to make the file")
        self._unchecked[row] = 0


def _ffcv_format() -> ModuleType:
    """Import the module that imports FFCV. That sets torch to one thread, which is undone here."""
    threads = torch.get_num_threads()
    from repcon.decode import ffcv_format

    torch.set_num_threads(threads)
    return ffcv_format
