"""Loader `dali` on a GPU: DALI decodes there, and one launch per size cuts, resizes and flips.

DALI's own graph of slice, resize and flip took a tenth of a ResNet-50's training step from it (an H200, 224 pixels,
benchmarks/records/2026-11-26-training-nvidia-h200); the GPU's JPEG engines decode beside the step.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from nvidia.dali.pipeline import Pipeline
from repcon_kernels import cut_crops

from repcon.device import indexed
from repcon.environment import cores
from repcon.errors import UserError
from repcon.loaders import CropBatch, Request
from repcon.loaders.checks import check_boxes, check_size
from repcon.loaders.dali import decoding, read, run
from repcon.loaders.pool import BatchPool, Spares, numbered_batch

if TYPE_CHECKING:
    from repcon.images import Pack

IMAGES_PER_RUN = 64
"""Images that are decoded at once; bounds the decoded pixels held in memory."""


@dataclass(frozen=True, slots=True)
class Decoder:
    """A pipeline, and on a GPU the stream of its own that does not wait for the consumer's training step."""

    pipeline: Pipeline
    stream: torch.cuda.Stream | None


class GpuLoader:
    """Made for a GPU; with `device="cpu"` the same way is gone on the CPU, slowly, for tests."""

    kind = "dali"

    def __init__(self, pack: "Pack", sides: Sequence[int], *, workers: int = 0, device: str = "cuda") -> None:
        self._pack, self._sides, self._device = pack, tuple(sides), indexed(device)
        self._on_gpu = self._device.type == "cuda"
        self._implementation = "triton" if self._on_gpu else "torch"
        if self._on_gpu:
            check_kernel(self._implementation, self._sides, self._device)
        # Three batches in work, each on a pipeline and a stream of its own: some parse and decode, others cut.
        self._pool = BatchPool(3)
        self._threads = workers or max(1, cores() // 2)
        self._decoders = Spares(self._decoder)

    def batches(self, requests: Iterable[Request]) -> Iterator[CropBatch]:
        """See `Loader.batches`; the pixels lie on the device, for use on the consumer's current stream."""
        for batch in self._pool.run(requests, self._begin):
            if self._on_gpu:
                for pixels in batch.pixels.values():
                    pixels.record_stream(torch.cuda.current_stream(self._device))
            yield batch

    def _begin(self, request: Request) -> tuple[CropBatch, list[Callable[[], None]]]:
        check_boxes(self._pack, request)
        batch = numbered_batch(request, {})
        return batch, [partial(self._fill, batch, request)]

    def _decoder(self) -> Decoder:
        pipeline = decoding(IMAGES_PER_RUN, threads=self._threads, gpu=self._device.index if self._on_gpu else None)
        return Decoder(pipeline, torch.cuda.Stream(self._device) if self._on_gpu else None)

    def _fill(self, batch: CropBatch, request: Request) -> None:
        n, c = request.crops.shape
        with self._decoders.one() as decoder, torch.cuda.stream(decoder.stream):
            places = {
                side: torch.empty((n * c, side, side, 3), dtype=torch.uint8, device=self._device)
                for side in self._sides
            }
            for start in range(0, n, IMAGES_PER_RUN):
                self._fill_share(decoder, list(places.values()), request, range(start, min(start + IMAGES_PER_RUN, n)))
        batch.pixels.update({side: place.permute(0, 3, 1, 2) for side, place in places.items()})

    def _fill_share(self, decoder: Decoder, places: list[torch.Tensor], request: Request, share: range) -> None:
        c, part = request.crops.shape[1], slice(share.start, share.stop)
        (decoded,) = run(decoder.pipeline, read(self._pack, request, share), self._pack, request, share)
        images = [torch.from_dlpack(decoded[k]) for k in range(len(share))]
        for i, image in zip(share, images, strict=True):
            check_size(self._pack, int(request.images[i]), image.shape)
        boxes = torch.from_numpy(request.boxes[part].astype(np.int32))
        flips = torch.from_numpy(request.flips[part].astype(np.uint8))
        for place in places:
            crops = place[share.start * c : share.stop * c]
            cut_crops(images, boxes, flips, crops, implementation=self._implementation)
        if decoder.stream is not None:  # before the pipeline's next run takes the images' memory back
            decoder.stream.synchronize()

    def close(self) -> None:
        """See `Loader.close`."""
        self._pool.close()
        self._decoders.close()


def check_kernel(implementation: str, sides: Sequence[int], device: torch.device) -> None:
    """Has the kernel compiled before several threads ask for it, and its crops compared with torch's, side by side.

    Raises UserError where they differ: what a GPU's compiler makes of the kernel must not go wrong in silence.
    """
    image = (torch.arange(40 * 56 * 3) * 89 % 251).to(device, torch.uint8).reshape(40, 56, 3)
    boxes = torch.tensor([[[0, 0, 56, 40], [7, 3, 31, 20]]], dtype=torch.int32)
    flips = torch.tensor([[0, 1]], dtype=torch.uint8)
    for side in sides:
        wanted, found = torch.zeros((2, 2, side, side, 3), dtype=torch.uint8, device=device)
        cut_crops([image], boxes, flips, wanted)
        cut_crops([image], boxes, flips, found, implementation=implementation)
        if (wanted.int() - found.int()).abs().max() > 1:
            raise UserError(
                f"loader dali: on {device} the kernel that cuts crops gives other pixels than torch at {side} pixels; "
                "use loader = 'torch', and report this with your GPU and the versions of triton and its driver"
            )
