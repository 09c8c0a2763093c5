"""Loader `dali` on the CPU: NVIDIA DALI decodes, compiled code resizes.

On the CPU, DALI's decoder is nearly as fast as libjpeg-turbo alone and gives PIL's pixels bit for bit, while its
antialiased resize takes longer than the decoding itself. So DALI decodes, and the compiled resize (`decode.resize`)
reads from DALI's buffers. Each job drives a pipeline of its own with one DALI thread: requests may then come in any
order and length, and a failure stays in its batch.

On a GPU: `decode.dali_gpu`.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from nvidia.dali import fn, types
from nvidia.dali.pipeline import Pipeline

from repcon.decode.base import decode_error
from repcon.decode.reference import decode
from repcon.decode.resize import CropResizer, Scratch, compile_resize
from repcon.decode.worker_pool import CpuLoader
from repcon.images.pack import ImagePack
from repcon.runtime.errors import UserError

IMAGES_PER_RUN = 16
"""Images that a CPU pipeline decodes at once; bounds the decoded pixels held in memory."""


class DaliCpuLoader(CpuLoader[tuple[Pipeline, Scratch]]):
    """DALI's decoder and the compiled resize."""

    kind = "dali"
    images_per_job = IMAGES_PER_RUN

    def __init__(self, pack: ImagePack, sides: Sequence[int], *, num_workers: int = 0) -> None:
        def make_state() -> tuple[Pipeline, Scratch]:
            return build_pipeline(IMAGES_PER_RUN, threads=1), Scratch.of(pack.widest, sides)

        super().__init__(pack, sides, make_state, num_workers, "cpu")
        compile_resize(sides)

    def _fill(self, resizer: CropResizer, places: range, state: tuple[Pipeline, Scratch]) -> None:
        pipeline, scratch = state
        (decoded,) = run_pipeline(pipeline, self._pack, resizer.rows[places.start : places.stop].tolist())
        resizer.resize(places, (np.asarray(decoded[i]) for i in range(len(places))), scratch)


def build_pipeline(batch_size: int, *, threads: int, gpu: int | None = None) -> Pipeline:
    """At most `batch_size` JPEGs to (height, width, 3) uint8 RGB in stored orientation, with the exact DCT.

    gpu: the device number to decode on; None decodes on the CPU.
    """
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


def run_pipeline(pipeline: Pipeline, pack: ImagePack, rows: Sequence[int]) -> Any:
    """The pipeline's outputs for these rows of the pack. Raises UserError naming the image that DALI cannot decode."""
    jpegs = [np.frombuffer(pack.read(row), dtype=np.uint8) for row in rows]
    try:
        pipeline.feed_input("jpegs", jpegs)
        return pipeline.run()
    except RuntimeError as error:
        for row, jpeg in zip(rows, jpegs, strict=True):
            try:
                decode(jpeg.tobytes())
            except (OSError, ValueError, SyntaxError) as reason:
                raise decode_error(pack, row, reason) from error
        names = ", ".join(pack.keys[row] for row in rows)
        raise UserError(f"DALI failed on one of the images {names}: {error}") from error
