"""Loader `dali`: NVIDIA DALI decodes; on a GPU it also cuts, resizes and flips there.

On the CPU, DALI's decoder runs at libjpeg-turbo's own speed and gives PIL's pixels bit for bit, while its
antialiased resize takes longer than the decoding itself. So there DALI decodes, and the compiled triangle filter
(`loaders.triangle`) cuts and resizes straight out of DALI's buffers. Each thread of the pool drives a pipeline of its
own with one DALI thread: requests may then come in any order and length, and a failure stays in its batch.

On a GPU the whole way is one DALI graph: mixed decode, once per image; then for each crop an exact slice (a region
given to the resize itself would read past the box), antialiased triangle resize, and flip.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from nvidia.dali import fn, types
from nvidia.dali.pipeline import Pipeline

from repcon.errors import UserError
from repcon.loaders import CropBatch, Request
from repcon.loaders.buffers import Buffers
from repcon.loaders.pool import BatchPool, Spares, cores, empty_batch
from repcon.loaders.reference import check_boxes, check_size, decode, undecodable
from repcon.loaders.triangle import cut_into, prepare, scratch

if TYPE_CHECKING:
    from repcon.images import Pack

IMAGES_PER_RUN = 16
"""Images that a CPU pipeline decodes at once; bounds the decoded pixels held in memory."""
IMAGES_PER_GPU_RUN = 64


def open_dali(pack: "Pack", sides: Sequence[int], *, workers: int, device: str) -> "CpuLoader | GraphLoader":
    """The CPU loader, or the GPU graph for a `device` of `cuda` or `cuda:N`."""
    if device.startswith("cuda"):
        return GraphLoader(pack, sides, workers=workers, device=device)
    return CpuLoader(pack, sides, workers=workers)


class CpuLoader:
    """DALI's decoder, the compiled resize."""

    kind = "dali"

    def __init__(self, pack: "Pack", sides: Sequence[int], *, workers: int = 0) -> None:
        self._pack, self._sides, self._buffers = pack, tuple(sides), Buffers()
        self._pool = BatchPool(workers)
        self._decoders = Spares(_decoder)
        prepare(self._sides)
        widest = int(max(pack.sizes[:, 0], default=1))
        self._scratch = Spares(lambda: scratch(widest, self._sides))

    def batches(self, requests: Iterable[Request]) -> Iterator[CropBatch]:
        """See `Loader.batches`."""
        return self._pool.run(requests, self._begin)

    def _begin(self, request: Request) -> tuple[CropBatch, list[Callable[[], None]]]:
        check_boxes(self._pack, request)
        batch = empty_batch(request, self._sides, self._buffers)
        shares = self._pool.shares(len(request.images), IMAGES_PER_RUN)
        return batch, [partial(self._fill, batch, request, share) for share in shares]

    def _fill(self, batch: CropBatch, request: Request, share: range) -> None:
        jpegs = _read(self._pack, request, share)
        boxes, flips = request.boxes.astype(np.uint16), request.flips.astype(np.uint8)
        outs = tuple(pixels.permute(0, 2, 3, 1).numpy() for pixels in batch.pixels.values())
        with self._decoders.one() as pipeline, self._scratch.one() as (row, line):
            (decoded,) = _run(pipeline, {"jpegs": jpegs}, self._pack, request, share)
            for k, i in enumerate(share):
                image = np.asarray(decoded[k])
                check_size(self._pack, int(request.images[i]), image.shape)
                flat = image.reshape(len(image), -1)
                cut_into(flat, boxes[i], flips[i], outs, i * boxes.shape[1], row, line)

    def close(self) -> None:
        """See `Loader.close`."""
        self._pool.close()
        self._decoders.close()


class GraphLoader:
    """The whole way inside DALI. Made for a GPU; with `device="cpu"` the same graph runs on the CPU, for tests."""

    kind = "dali"

    def __init__(self, pack: "Pack", sides: Sequence[int], *, workers: int = 0, device: str = "cuda") -> None:
        self._pack, self._sides, self._device = pack, tuple(sides), torch.device(device)
        # Two batches in work, each on a pipeline and a stream of its own: one parses while the other resizes.
        self._pool = BatchPool(2)
        self._threads = workers or max(1, cores() // 2)
        self._graphs: dict[int, Spares[Pipeline]] = {}

    def batches(self, requests: Iterable[Request]) -> Iterator[CropBatch]:
        """See `Loader.batches`; the pixels lie on the device, for use on the consumer's current stream."""
        for batch in self._pool.run(requests, self._begin):
            if self._device.type == "cuda":
                for pixels in batch.pixels.values():
                    pixels.record_stream(torch.cuda.current_stream(self._device))
            yield batch

    def _begin(self, request: Request) -> tuple[CropBatch, list[Callable[[], None]]]:
        check_boxes(self._pack, request)
        c = request.crops.shape[1]
        graphs = self._graphs.setdefault(c, Spares(partial(self._graph, c)))
        batch = CropBatch(
            pixels={},
            images=torch.from_numpy(np.repeat(np.asarray(request.images, dtype=np.int64), c)),
            crops=torch.from_numpy(np.array(request.crops, dtype=np.int64).reshape(-1)),
        )
        return batch, [partial(self._fill, graphs, batch, request)]

    def _graph(self, crops: int) -> Pipeline:
        gpu = (self._device.index or 0) if self._device.type == "cuda" else None
        return _crop_graph(crops, self._sides, threads=self._threads, gpu=gpu)

    def _fill(self, graphs: Spares[Pipeline], batch: CropBatch, request: Request) -> None:
        n, c = request.crops.shape
        with graphs.one() as pipeline, _own_stream(self._device):
            for side in self._sides:
                place = torch.empty((n * c, side, side, 3), dtype=torch.uint8, device=self._device)
                batch.pixels[side] = place.permute(0, 3, 1, 2)
            for start in range(0, n, IMAGES_PER_GPU_RUN):
                self._fill_share(pipeline, batch, request, range(start, min(start + IMAGES_PER_GPU_RUN, n)))

    def _fill_share(self, pipeline: Pipeline, batch: CropBatch, request: Request, share: range) -> None:
        c, part = request.crops.shape[1], slice(share.start, share.stop)
        feeds = {
            "jpegs": _read(self._pack, request, share),
            "boxes": list(request.boxes[part].astype(np.int32)),
            "flips": list(request.flips[part].astype(np.int32)),
        }
        outputs = _run(pipeline, feeds, self._pack, request, share)
        for side, output in zip(self._sides, outputs, strict=True):
            crops = torch.from_dlpack(output.as_tensor()).reshape(-1, side, side, 3)
            batch.pixels[side].permute(0, 2, 3, 1)[share.start * c : share.stop * c].copy_(crops)
        if self._device.type == "cuda":  # before the pipeline's next run takes its outputs back
            torch.cuda.current_stream(self._device).synchronize()

    def close(self) -> None:
        """See `Loader.close`."""
        self._pool.close()
        for graphs in self._graphs.values():
            graphs.close()


def _decoder() -> Pipeline:
    """jpegs -> (height, width, 3) uint8 on the CPU, in stored orientation, with the exact DCT."""
    pipeline = Pipeline(batch_size=IMAGES_PER_RUN, num_threads=1, device_id=None, prefetch_queue_depth=1)
    with pipeline:
        jpegs = fn.external_source(name="jpegs", device="cpu", no_copy=True)
        pipeline.set_outputs(_decoded(jpegs, "cpu"))
    pipeline.build()
    return pipeline


def _crop_graph(crops: int, sides: Sequence[int], *, threads: int, gpu: int | None) -> Pipeline:
    """jpegs, boxes (crops, 4), flips (crops,) -> for each side (crops, side, side, 3) uint8, one per image."""
    pipeline = Pipeline(batch_size=IMAGES_PER_GPU_RUN, num_threads=threads, device_id=gpu, prefetch_queue_depth=1)
    with pipeline:
        jpegs = fn.external_source(name="jpegs", device="cpu", no_copy=True)
        boxes = fn.external_source(name="boxes", device="cpu")
        flips = fn.external_source(name="flips", device="cpu")
        images = _decoded(jpegs, "cpu" if gpu is None else "mixed")
        # axes=(1, 0): a box is x, y, width, height; DALI's images are height, width, channel.
        regions = [fn.slice(images, boxes[j, 0:2], boxes[j, 2:4], axes=(1, 0)) for j in range(crops)]
        pipeline.set_outputs(*(_resized(regions, flips, side) for side in sides))
    pipeline.build()
    return pipeline


def _decoded(jpegs: Any, device: str) -> Any:
    # jpeg_fancy_upsampling: the GPU's chroma as the CPU decoders interpolate it.
    fancy: dict[str, Any] = {"jpeg_fancy_upsampling": True} if device == "mixed" else {}
    rgb = types.DALIImageType.RGB
    return fn.decoders.image(jpegs, device=device, output_type=rgb, adjust_orientation=False, **fancy)


def _resized(regions: list[Any], flips: Any, side: int) -> Any:
    triangle = types.DALIInterpType.INTERP_TRIANGULAR
    small: list[Any] = [
        fn.resize(region, size=[side, side], interp_type=triangle, antialias=True) for region in regions
    ]
    return fn.stack(*(fn.flip(crop, horizontal=flips[j]) for j, crop in enumerate(small)))


def _read(pack: "Pack", request: Request, share: range) -> list[np.ndarray]:
    """The JPEG bytes of the request's images in `share`, as DALI takes them."""
    return [np.frombuffer(pack.read(int(request.images[i])), dtype=np.uint8) for i in share]


def _run(pipeline: Pipeline, feeds: dict[str, list[np.ndarray]], pack: "Pack", request: Request, share: range) -> Any:
    """One run of the pipeline; raises UserError naming the image that DALI could not decode."""
    try:
        for name, samples in feeds.items():
            pipeline.feed_input(name, samples)
        return pipeline.run()
    except RuntimeError as error:
        rows = [int(request.images[i]) for i in share]
        for row, jpeg in zip(rows, feeds["jpegs"], strict=True):
            try:
                decode(jpeg.tobytes())
            except (OSError, ValueError, SyntaxError) as reason:
                raise undecodable(pack, row, reason) from error
        names = ", ".join(pack.keys[row] for row in rows)
        raise UserError(f"DALI failed on one of the images {names}: {error}") from error


@contextmanager
def _own_stream(device: torch.device) -> Iterator[None]:
    """On a GPU, a stream that does not wait for the consumer's training step."""
    if device.type != "cuda":
        yield
        return
    with torch.cuda.stream(torch.cuda.Stream(device)):
        yield
