"""Pixels for the teachers: one unit after the other without a pause in between, and around damaged images."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from repcon.decode.base import CropRequest, Loader
from repcon.decode.checks import undecodable
from repcon.decode.reference import decode
from repcon.images.pack import ImagePack
from repcon.precompute.work_unit import WorkUnit
from repcon.runtime.errors import UserError
from repcon.runtime.memory import require_memory

_DECODING_BYTES = 24
"""Per pixel: more than a decoder takes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """Some images of a unit, (n,) rows of the pack, with the pixels of all their crops, image by image."""

    work: WorkUnit
    images: np.ndarray
    pixels: dict[int, torch.Tensor]
    is_last: bool
    """Whether these are the unit's last images."""


@dataclass(frozen=True, slots=True)
class _Drawn:
    work: WorkUnit
    request: CropRequest
    is_last: bool


class Decoding:
    """Every image is decoded once for all its crops and all teachers.

    An image that cannot be decoded is noted in its unit as missing, for good. So it is the image itself that is looked
    at: a file that cannot be read at all (disk, network, rights), or a loader that fails on a whole image (a GPU's
    memory, FFCV's own file), stops the run.
    """

    def __init__(self, loader: Loader, pack: ImagePack, batch_crops: int) -> None:
        self._loader, self._pack, self._batch_crops = loader, pack, batch_crops
        self._drawn: list[_Drawn] = []
        self._source_failed = False

    def steps(self, works: Iterator[WorkUnit]) -> Iterator[Step]:
        """The units' images in order; a batch that fails is taken again image by image."""
        source = self._requests(works)
        while True:
            again, self._drawn = self._drawn, []
            try:
                for batch in self._loader.batches(self._noted(again, source)):
                    drawn = self._drawn.pop(0)
                    yield _step(drawn, drawn.request.images, batch.pixels)
                return
            except UserError:
                if self._source_failed or not self._drawn:
                    raise
            # A loader that reads ahead may mean a later request: then this one is whole, and the later fails again.
            drawn = self._drawn.pop(0)
            yield _step(drawn, *self._one_by_one(drawn))

    def _requests(self, works: Iterator[WorkUnit]) -> Iterator[_Drawn]:
        for work in works:
            for request in work.requests(max(1, self._batch_crops // len(work.unit.crops))):
                yield _Drawn(work, request, int(request.images[-1]) == work.unit.rows[-1])

    def _noted(self, again: list[_Drawn], source: Iterator[_Drawn]) -> Iterator[CropRequest]:
        """The requests for the loader; what it has drawn and not yet answered stays in `_drawn`."""
        for drawn in again:
            self._drawn.append(drawn)
            yield drawn.request
        while (drawn := self._next(source)) is not None:
            self._drawn.append(drawn)
            yield drawn.request

    def _next(self, source: Iterator[_Drawn]) -> _Drawn | None:
        try:
            return next(source, None)
        except BaseException:
            self._source_failed = True
            raise

    def _one_by_one(self, drawn: _Drawn) -> tuple[np.ndarray, dict[int, torch.Tensor]]:
        """The rows that can be decoded, with their pixels joined; the others are noted as missing."""
        whole: list[int] = []
        parts: list[dict[int, torch.Tensor]] = []
        for place, image in enumerate(drawn.request.images.tolist()):
            if reason := self._damage(image):
                # Kept in the store, which must not depend on where the pack lies.
                drawn.work.missing[image] = reason.removeprefix(f"{self._pack.url}: ")
            else:  # whatever the loader says now is the loader's own failure
                single = drawn.request.part(slice(place, place + 1))
                parts += [batch.pixels for batch in self._loader.batches([single])]
                whole.append(image)
        joined = {side: torch.cat([part[side] for part in parts]) for side in (parts[0] if parts else {})}
        return np.array(whole, np.int64), joined

    def _damage(self, image: int) -> str:
        """Why the image cannot be decoded; empty where it can. Raises where its file cannot be read."""
        try:
            decode(self._pack.read(image))
        except UserError as error:
            if isinstance(error.__cause__, OSError):
                raise
            return str(error)
        except (MemoryError, OSError, ValueError, SyntaxError) as error:
            self._require_memory(image, error)
            return str(undecodable(self._pack, image, error))
        return ""

    def _require_memory(self, image: int, error: Exception) -> None:
        """Raises UserError where memory was short: decoders then call the image damaged, which would be for good."""
        try:
            if isinstance(error, MemoryError):
                raise error
            require_memory(_DECODING_BYTES * int(np.prod(self._pack.sizes[image], dtype=np.int64)))
        except MemoryError:
            raise UserError(
                f"image {self._pack.keys[image]}: memory is too short to decode it; free some and run the same command "
                "again, what was finished is kept"
            ) from error


def _step(drawn: _Drawn, images: np.ndarray, pixels: dict[int, torch.Tensor]) -> Step:
    return Step(work=drawn.work, images=images, pixels=pixels, is_last=drawn.is_last)
