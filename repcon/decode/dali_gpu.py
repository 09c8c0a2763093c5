"""Loader `dali` on a GPU: DALI decodes there, and one kernel launch per size crops, resizes and flips.

DALI's own graph of slice, resize and flip took an H200 6 microseconds for each further crop of 224 pixels, this launch
takes 1.2.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

import numpy as np
import torch
from nvidia.dali.pipeline import Pipeline
from repcon_kernels import cut_crops

from repcon.decode.base import CropBatch, CropRequest, check_boxes, check_image_size
from repcon.decode.dali_cpu import build_pipeline, run_pipeline
from repcon.decode.worker_pool import WorkerPool
from repcon.images.pack import ImagePack
from repcon.runtime.device import indexed, stream_context
from repcon.runtime.errors import UserError
from repcon.runtime.system import own_cores

IMAGES_PER_RUN = 128
"""Images that are decoded at once; bounds the decoded pixels held in memory."""
PIPELINES = 3
"""Pipelines that run at the same time: some parse and decode while others crop."""


class DaliGpuLoader:
    """DALI on a GPU; with `device="cpu"` the same steps run on the CPU, slowly, for tests."""

    kind = "dali"

    def __init__(self, pack: ImagePack, sides: Sequence[int], *, num_workers: int = 0, device: str = "cuda") -> None:
        self._pack, self._sides, self._device = pack, tuple(sides), indexed(device)
        self._on_gpu = self._device.type == "cuda"
        self._implementation = "triton" if self._on_gpu else "torch"
        if self._on_gpu:
            check_kernel(self._implementation, self._sides, self._device)
        threads = num_workers or max(1, own_cores() // 2)
        gpu = self._device.index if self._on_gpu else None
        self._workers = WorkerPool(PIPELINES, partial(build_pipeline, IMAGES_PER_RUN, threads=threads, gpu=gpu))
        # A stream of the loader's own does not wait for the consumer's training step.
        self._stream = torch.cuda.Stream(self._device) if self._on_gpu else None

    def batches(self, requests: Iterable[CropRequest]) -> Iterator[CropBatch]:
        """See `Loader.batches`; the pixels lie on the device, for use on the consumer's current stream."""
        for batch in self._workers.run(requests, self._start):
            if self._on_gpu:
                for pixels in batch.pixels.values():
                    pixels.record_stream(torch.cuda.current_stream(self._device))
            yield batch

    def _start(self, request: CropRequest) -> tuple[CropBatch, list[Callable[[Pipeline], None]]]:
        check_boxes(self._pack, request)
        n, c = request.crops.shape
        with stream_context(self._stream):
            outs = {
                side: torch.empty((n * c, side, side, 3), dtype=torch.uint8, device=self._device)
                for side in self._sides
            }
        batch = CropBatch.for_request(request, {side: out.permute(0, 3, 1, 2) for side, out in outs.items()})
        chunks = [slice(start, min(start + IMAGES_PER_RUN, n)) for start in range(0, n, IMAGES_PER_RUN)]
        return batch, [partial(self._fill, request, list(outs.values()), chunk) for chunk in chunks]

    def _fill(self, request: CropRequest, outs: Sequence[torch.Tensor], chunk: slice, pipeline: Pipeline) -> None:
        c, rows = request.crops.shape[1], request.images[chunk].tolist()
        with stream_context(self._stream):
            (decoded,) = run_pipeline(pipeline, self._pack, rows)
            # By the array interface: a DLPack export makes DALI wait for the whole device, including the training
            # step, before it reuses the memory.
            images = [torch.as_tensor(decoded[i], device=self._device) for i in range(len(rows))]
            for row, image in zip(rows, images, strict=True):
                check_image_size(self._pack, row, image.shape)
            boxes = torch.from_numpy(request.boxes[chunk].astype(np.int32))
            flips = torch.from_numpy(request.flips[chunk].astype(np.uint8))
            for out in outs:
                crops = out[chunk.start * c : chunk.stop * c]
                cut_crops(images, boxes, flips, crops, implementation=self._implementation)
            if self._stream is not None:  # before the pipeline's next run reuses the images' memory
                self._stream.synchronize()

    def close(self) -> None:
        """See `Loader.close`."""
        self._workers.close()


def check_kernel(implementation: str, sides: Sequence[int], device: torch.device) -> None:
    """Compile the crop kernel before several threads call it, and compare its crops with torch's.

    Raises UserError where they differ: a kernel that the GPU's compiler gets wrong must not go unnoticed.
    """
    image = (torch.arange(40 * 56 * 3) * 89 % 251).to(device, torch.uint8).reshape(40, 56, 3)
    boxes = torch.tensor([[[0, 0, 56, 40], [7, 3, 31, 20]]], dtype=torch.int32)
    flips = torch.tensor([[0, 1]], dtype=torch.uint8)
    for side in sides:
        expected, actual = torch.zeros((2, 2, side, side, 3), dtype=torch.uint8, device=device)
        cut_crops([image], boxes, flips, expected)
        cut_crops([image], boxes, flips, actual, implementation=implementation)
        if (expected.int() - actual.int()).abs().max() > 1:
            raise UserError(
                f"loader dali: on {device} the kernel that cuts crops gives other pixels than torch at {side} pixels; "
                "use loader = 'torch', and report this with your GPU and the versions of triton and its driver"
            )
