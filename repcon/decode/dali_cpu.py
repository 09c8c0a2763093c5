"""Loader `dali` on the CPU: NVIDIA DALI decodes, compiled code resizes.

On the CPU, DALI's decoder is nearly as fast as libjpeg-turbo alone and gives PIL's pixels bit for bit, while its
antialiased resize takes longer than the decoding itself. So there DALI decodes, and the compiled triangle filter
(`decode.resize`) cuts and resizes straight out of DALI's buffers. Each thread of the pool drives a pipeline of its
own with one DALI thread: requests may then come in any order and length, and a failure stays in its batch.

On a GPU: `decode.dali_gpu`.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
from nvidia.dali import fn, types
from nvidia.dali.pipeline import Pipeline

from repcon.decode.base import CropBatch, CropRequest
from repcon.decode.buffers import CropBuffers
from repcon.decode.checks import check_boxes, undecodable
from repcon.decode.crop_resizer import CropResizer, Cut
from repcon.decode.reference import decode
from repcon.decode.worker_pool import BatchPool, BufferPool, empty_batch
from repcon.images.pack import ImagePack
from repcon.runtime.errors import UserError

IMAGES_PER_RUN = 16
"""Images that a CPU pipeline decodes at once; bounds the decoded pixels held in memory."""


class CpuLoader:
    """DALI's decoder, the compiled resize."""

    kind = "dali"

    def __init__(self, pack: ImagePack, sides: Sequence[int], *, num_workers: int = 0) -> None:
        self._pack, self._sides, self._buffers = pack, tuple(sides), CropBuffers()
        self._pool = BatchPool(num_workers)
        self._decoders = BufferPool(partial(decoding, IMAGES_PER_RUN, threads=1, gpu=None))
        self._cutter = CropResizer(pack, self._sides)

    def batches(self, requests: Iterable[CropRequest]) -> Iterator[CropBatch]:
        """See `Loader.batches`."""
        return self._pool.run(requests, self._begin)

    def _begin(self, request: CropRequest) -> tuple[CropBatch, list[Callable[[], None]]]:
        check_boxes(self._pack, request)
        batch = empty_batch(request, self._sides, self._buffers)
        cut = self._cutter.into(batch, request)
        shares = self._pool.shares(len(request.images), IMAGES_PER_RUN)
        return batch, [partial(self._fill, request, cut, share) for share in shares]

    def _fill(self, request: CropRequest, cut: Cut, share: range) -> None:
        jpegs = read(self._pack, request, share)
        with self._decoders.one() as pipeline:
            (images,) = run(pipeline, jpegs, self._pack, request, share)
            cut(share, (np.asarray(images[k]) for k in range(len(share))))

    def close(self) -> None:
        """See `Loader.close`."""
        self._pool.close()
        self._decoders.close()


def decoding(batch_size: int, *, threads: int, gpu: int | None) -> Pipeline:
    """At most `batch_size` jpegs -> (height, width, 3) uint8 RGB in stored orientation, with the exact DCT; on the CPU,
    or on the GPU of this number."""
    # jpeg_fancy_upsampling: the GPU's chroma as the CPU decoders interpolate it. hw_decoder_load: a GPU's JPEG engines
    # take all images; by itself DALI gives them two thirds, and decodes the rest more slowly and less exactly.
    options: dict[str, Any] = {"output_type": types.DALIImageType.RGB, "adjust_orientation": False}
    if gpu is not None:
        options |= {"device": "mixed", "jpeg_fancy_upsampling": True, "hw_decoder_load": 1.0}
    pipeline = Pipeline(batch_size=batch_size, num_threads=threads, device_id=gpu, prefetch_queue_depth=1)
    with pipeline:
        jpegs = fn.external_source(name="jpegs", device="cpu", no_copy=True)
        pipeline.set_outputs(fn.decoders.image(jpegs, **options))
    pipeline.build()
    return pipeline


def read(pack: ImagePack, request: CropRequest, share: range) -> list[np.ndarray]:
    """The JPEG bytes of the request's images in `share`, as DALI takes them."""
    return [np.frombuffer(pack.read(int(request.images[i])), dtype=np.uint8) for i in share]


def run(pipeline: Pipeline, jpegs: list[np.ndarray], pack: ImagePack, request: CropRequest, share: range) -> Any:
    """One run of the pipeline; raises UserError naming the image that DALI could not decode."""
    try:
        pipeline.feed_input("jpegs", jpegs)
        return pipeline.run()
    except RuntimeError as error:
        rows = [int(request.images[i]) for i in share]
        for row, jpeg in zip(rows, jpegs, strict=True):
            try:
                decode(jpeg.tobytes())
            except (OSError, ValueError, SyntaxError) as reason:
                raise undecodable(pack, row, reason) from error
        names = ", ".join(pack.keys[row] for row in rows)
        raise UserError(f"DALI failed on one of the images {names}: {error}") from error
