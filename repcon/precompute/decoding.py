"""Decoded crops of one unit after the other, and which images cannot be decoded."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from repcon.decode.base import CropRequest, Loader
from repcon.decode.checks import decode_error
from repcon.decode.reference import decode
from repcon.images.pack import ImagePack
from repcon.precompute.work_unit import WorkUnit
from repcon.runtime.errors import UserError
from repcon.runtime.memory import require_memory

_DECODING_BYTES = 24
"""Upper bound of a decoder's memory per pixel."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """Some images of a unit, (n,) rows of the pack, with the pixels of all their crops, image by image."""

    work: WorkUnit
    images: np.ndarray
    pixels: dict[int, torch.Tensor]
    is_last: bool
    """Whether these are the unit's last images."""


@dataclass(frozen=True, slots=True)
class _Request:
    work: WorkUnit
    request: CropRequest
    is_last: bool


class Decoding:
    """Decodes every image once for all its crops and all teachers.

    An image that cannot be decoded is recorded as missing in its unit, permanently. So the image itself is checked: a
    file that cannot be read (disk, network, permissions), or a loader that fails on an intact image (GPU memory, FFCV's
    own file), stops the run.
    """

    def __init__(self, loader: Loader, pack: ImagePack, batch_crops: int) -> None:
        self._loader, self._pack, self._batch_crops = loader, pack, batch_crops
        self._pending: list[_Request] = []
        self._source_failed = False

    def steps(self, works: Iterator[WorkUnit]) -> Iterator[Step]:
        """The units' images in order; a batch that fails is decoded again image by image."""
        source = self._requests(works)
        while True:
            again, self._pending = self._pending, []
            try:
                for batch in self._loader.batches(self._sent(again, source)):
                    drawn = self._pending.pop(0)
                    yield _step(drawn, drawn.request.images, batch.pixels)
                return
            except UserError:
                if self._source_failed or not self._pending:
                    raise
            # A loader that reads ahead may have failed on a later request: then this one is intact, that fails again.
            drawn = self._pending.pop(0)
            yield _step(drawn, *self._one_by_one(drawn))

    def _requests(self, works: Iterator[WorkUnit]) -> Iterator[_Request]:
        for work in works:
            for request in work.requests(max(1, self._batch_crops // len(work.unit.crops))):
                yield _Request(work, request, int(request.images[-1]) == work.unit.rows[-1])

    def _sent(self, again: list[_Request], source: Iterator[_Request]) -> Iterator[CropRequest]:
        """The requests for the loader; those that it has taken and not answered are in `_pending`."""
        for drawn in again:
            self._pending.append(drawn)
            yield drawn.request
        while (drawn := self._next(source)) is not None:
            self._pending.append(drawn)
            yield drawn.request

    def _next(self, source: Iterator[_Request]) -> _Request | None:
        try:
            return next(source, None)
        except BaseException:
            self._source_failed = True
            raise

    def _one_by_one(self, drawn: _Request) -> tuple[np.ndarray, dict[int, torch.Tensor]]:
        """The rows that can be decoded and their pixels; the others are recorded as missing."""
        decodable: list[int] = []
        parts: list[dict[int, torch.Tensor]] = []
        for place, image in enumerate(drawn.request.images.tolist()):
            if reason := self._damage(image):
                # The reason is stored, and must not depend on the pack's location.
                drawn.work.missing[image] = reason.removeprefix(f"{self._pack.url}: ")
            else:  # a failure now is the loader's own
                single = drawn.request.subset(slice(place, place + 1))
                parts += [batch.pixels for batch in self._loader.batches([single])]
                decodable.append(image)
        joined = {side: torch.cat([part[side] for part in parts]) for side in (parts[0] if parts else {})}
        return np.array(decodable, np.int64), joined

    def _damage(self, image: int) -> str:
        """Why the image cannot be decoded; empty where it can. Raises UserError where its file cannot be read."""
        try:
            decode(self._pack.read(image))
        except UserError as error:
            if isinstance(error.__cause__, OSError):
                raise
            return str(error)
        except (MemoryError, OSError, ValueError, SyntaxError) as error:
            self._require_memory(image, error)
            return str(decode_error(self._pack, image, error))
        return ""

    def _require_memory(self, image: int, error: Exception) -> None:
        """Raises UserError where memory was short: decoders then report damage, which would be recorded permanently."""
        try:
            if isinstance(error, MemoryError):
                raise error
            require_memory(_DECODING_BYTES * int(np.prod(self._pack.sizes[image], dtype=np.int64)))
        except MemoryError:
            raise UserError(
                f"image {self._pack.keys[image]}: memory is too short to decode it; free some and run the same command "
                "again, what was finished is kept"
            ) from error


def _step(drawn: _Request, images: np.ndarray, pixels: dict[int, torch.Tensor]) -> Step:
    return Step(work=drawn.work, images=images, pixels=pixels, is_last=drawn.is_last)
