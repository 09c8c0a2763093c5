"""Decoded crops of one request after the other, and which images cannot be decoded."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch

from repcon.decode.base import CropRequest, Loader, decode_error
from repcon.decode.reference import decode
from repcon.images.pack import ImagePack
from repcon.runtime.errors import UserError
from repcon.runtime.memory import require_memory

_DECODING_BYTES = 24
"""Upper bound of a decoder's memory per pixel."""


@dataclass(frozen=True, slots=True)
class Decoded:
    """The images of one request, (n,) rows of the pack, with the pixels of all their crops, image by image."""

    images: np.ndarray
    pixels: dict[int, torch.Tensor]
    missing: dict[int, str]
    """The request's other rows, whose image cannot be decoded, with the reason."""


class Decoding:
    """Decodes requests, each image once for all its crops and all teachers.

    An image that cannot be decoded is recorded as missing in the store, permanently. So the image itself is checked: a
    file that cannot be read (disk, network, permissions), or a loader that fails on an intact image (GPU memory, FFCV's
    own file), stops the run.
    """

    def __init__(self, loader: Loader, pack: ImagePack) -> None:
        self._loader, self._pack = loader, pack
        self._pending: list[CropRequest] = []
        self._source_failed = False

    def run(self, requests: Iterator[CropRequest]) -> Iterator[Decoded]:
        """One result per request, in order; a batch that fails is decoded again image by image."""
        again: Iterator[CropRequest] = iter(())
        while True:
            again, self._pending = chain(self._pending, again), []
            try:
                for batch in self._loader.batches(self._sent(again, requests)):
                    yield Decoded(self._pending.pop(0).images, batch.pixels, {})
                return
            except UserError:
                if self._source_failed or not self._pending:
                    raise
            # A loader that reads ahead may have failed on a later request: then this one is intact, that fails again.
            yield self._one_by_one(self._pending.pop(0))

    def _sent(self, again: Iterator[CropRequest], source: Iterator[CropRequest]) -> Iterator[CropRequest]:
        """The requests for the loader; those that it has taken and not answered are in `_pending`."""
        while (request := next(again, None) or self._next(source)) is not None:
            self._pending.append(request)
            yield request

    def _next(self, source: Iterator[CropRequest]) -> CropRequest | None:
        try:
            return next(source, None)
        except BaseException:
            self._source_failed = True
            raise

    def _one_by_one(self, request: CropRequest) -> Decoded:
        """The rows that can be decoded and their pixels; the others are missing."""
        missing: dict[int, str] = {}
        decodable: list[int] = []
        parts: list[dict[int, torch.Tensor]] = []
        for place, image in enumerate(request.images.tolist()):
            if reason := self._damage(image):
                # The reason is stored, and must not depend on the pack's location.
                missing[image] = reason.removeprefix(f"{self._pack.url}: ")
            else:  # a failure now is the loader's own
                parts += [batch.pixels for batch in self._loader.batches([request.subset(slice(place, place + 1))])]
                decodable.append(image)
        joined = {side: torch.cat([part[side] for part in parts]) for side in (parts[0] if parts else {})}
        return Decoded(np.array(decodable, np.int64), joined, missing)

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
