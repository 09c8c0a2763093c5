"""Loader `dali` on a GPU: DALI decodes there, and one launch per size cuts, resizes and flips.

DALI's own graph of slice, resize and flip took an H200 6 microseconds for each further crop of 224 pixels, this launch
takes 1.2.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

import numpy as np
import torch
from nvidia.dali.pipeline import Pipeline
from repcon_kernels import cut_crops

from repcon.decode.base import CropBatch, CropRequest
from repcon.decode.checks import check_boxes, check_size
from repcon.decode.dali_cpu import decoding, read, run
from repcon.decode.worker_pool import BatchPool, BufferPool, numbered_batch
from repcon.images.pack import ImagePack
from repcon.runtime.device import indexed, stream_context
from repcon.runtime.errors import UserError
from repcon.runtime.system import own_cores

IMAGES_PER_RUN = 128
"""Images that are decoded at once; bounds the decoded pixels held in memory."""


class GpuLoader:
    """Made for a GPU; with `device="cpu"` the same way is gone on the CPU, slowly, for tests."""

    kind = "dali"

    def __init__(self, pack: ImagePack, sides: Sequence[int], *, num_workers: int = 0, device: str = "cuda") -> None:
        self._pack, self._sides, self._device = pack, tuple(sides), indexed(device)
        self._on_gpu = self._device.type == "cuda"
        self._implementation = "triton" if self._on_gpu else "torch"
        if self._on_gpu:
            check_kernel(self._implementation, self._sides, self._device)
        # Three shares in work, each on a pipeline of its own: some parse and decode, others cut.
        self._pool = BatchPool(3)
        self._pipelines = BufferPool(self._pipeline)
        self._threads = num_workers or max(1, own_cores() // 2)
        # A stream of the loader's own does not wait for the consumer's training step.
        self._stream = torch.cuda.Stream(self._device) if self._on_gpu else None

    def batches(self, requests: Iterable[CropRequest]) -> Iterator[CropBatch]:
        """See `Loader.batches`; the pixels lie on the device, for use on the consumer's current stream."""
        for batch in self._pool.run(requests, self._begin):
            if self._on_gpu:
                for pixels in batch.pixels.values():
                    pixels.record_stream(torch.cuda.current_stream(self._device))
            yield batch

    def _begin(self, request: CropRequest) -> tuple[CropBatch, list[Callable[[], None]]]:
        check_boxes(self._pack, request)
        n, c = request.crops.shape
        with stream_context(self._stream):
            places = {
                side: torch.empty((n * c, side, side, 3), dtype=torch.uint8, device=self._device)
                for side in self._sides
            }
        batch = numbered_batch(request, {side: place.permute(0, 3, 1, 2) for side, place in places.items()})
        shares = [range(start, min(start + IMAGES_PER_RUN, n)) for start in range(0, n, IMAGES_PER_RUN)]
        return batch, [partial(self._fill, request, list(places.values()), share) for share in shares]

    def _pipeline(self) -> Pipeline:
        return decoding(IMAGES_PER_RUN, threads=self._threads, gpu=self._device.index if self._on_gpu else None)

    def _fill(self, request: CropRequest, places: Sequence[torch.Tensor], share: range) -> None:
        c, part = request.crops.shape[1], slice(share.start, share.stop)
        jpegs = read(self._pack, request, share)
        with self._pipelines.one() as pipeline, stream_context(self._stream):
            (decoded,) = run(pipeline, jpegs, self._pack, request, share)
            # By the array interface: what was given away through DLPack, DALI takes back after waiting for the whole
            # device, the training step included.
            images = [torch.as_tensor(decoded[k], device=self._device) for k in range(len(share))]
            for i, image in zip(share, images, strict=True):
                check_size(self._pack, int(request.images[i]), image.shape)
            boxes = torch.from_numpy(request.boxes[part].astype(np.int32))
            flips = torch.from_numpy(request.flips[part].astype(np.uint8))
            for place in places:
                crops = place[share.start * c : share.stop * c]
                cut_crops(images, boxes, flips, crops, implementation=self._implementation)
            if self._stream is not None:  # before the pipeline's next run takes the images' memory back
                self._stream.synchronize()

    def close(self) -> None:
        """See `Loader.close`."""
        self._pool.close()
        self._pipelines.close()


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
