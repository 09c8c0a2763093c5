"""Loader `dali` on a GPU: decoding, cutting, resizing and flipping in one DALI graph.

Mixed decode, once per image; then for each crop an exact slice (a region given to the resize itself would read past
the box), antialiased triangle resize, and flip. Where the filter reaches past the box, DALI repeats the border and the
reference leaves it out: so the box lies in a margin of zeros, and the outermost pixels are scaled up by what the zeros
took from them.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from nvidia.dali import fn, types
from nvidia.dali.pipeline import Pipeline

from repcon.loaders import CropBatch, Request
from repcon.loaders.dali import decoded, read, run
from repcon.loaders.pool import BatchPool, Spares, cores
from repcon.loaders.reference import check_boxes

if TYPE_CHECKING:
    from repcon.images import Pack

IMAGES_PER_RUN = 64


@dataclass(frozen=True, slots=True)
class Graph:
    """A pipeline, and on a GPU the stream of its own that does not wait for the consumer's training step."""

    pipeline: Pipeline
    stream: torch.cuda.Stream | None


class GraphLoader:
    """The whole way inside DALI. Made for a GPU; with `device="cpu"` the same graph runs on the CPU, for tests."""

    kind = "dali"

    def __init__(self, pack: "Pack", sides: Sequence[int], *, workers: int = 0, device: str = "cuda") -> None:
        self._pack, self._sides, self._device = pack, tuple(sides), torch.device(device)
        self._gpu = None
        if self._device.type == "cuda":
            self._gpu = torch.cuda.current_device() if self._device.index is None else self._device.index
        # Three batches in work, each on a pipeline and a stream of its own: some parse and decode, others resize.
        self._pool = BatchPool(3)
        self._threads = workers or max(1, cores() // 2)
        self._graphs: dict[int, Spares[Graph]] = {}
        longest = int(pack.sizes.max(initial=1))
        self._margins = [_Margins(longest, side) for side in self._sides]

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

    def _graph(self, crops: int) -> Graph:
        pipeline = _crop_graph(crops, self._sides, threads=self._threads, gpu=self._gpu)
        return Graph(pipeline, None if self._gpu is None else torch.cuda.Stream(self._gpu))

    def _fill(self, graphs: Spares[Graph], batch: CropBatch, request: Request) -> None:
        n, c = request.crops.shape
        with graphs.one() as graph, torch.cuda.stream(graph.stream):
            for side in self._sides:
                place = torch.empty((n * c, side, side, 3), dtype=torch.uint8, device=self._device)
                batch.pixels[side] = place.permute(0, 3, 1, 2)
            for start in range(0, n, IMAGES_PER_RUN):
                self._fill_share(graph, batch, request, range(start, min(start + IMAGES_PER_RUN, n)))

    def _fill_share(self, graph: Graph, batch: CropBatch, request: Request, share: range) -> None:
        c, part = request.crops.shape[1], slice(share.start, share.stop)
        boxes = request.boxes[part].astype(np.int32)
        feeds = {
            "jpegs": read(self._pack, request, share),
            "boxes": list(boxes),
            "flips": list(request.flips[part].astype(np.int32)),
        }
        for margins in self._margins:
            feeds |= margins.feeds(boxes)
        outputs = run(graph.pipeline, feeds, self._pack, request, share)
        for side, output in zip(self._sides, outputs, strict=True):
            crops = torch.from_dlpack(output.as_tensor()).reshape(-1, side, side, 3)
            batch.pixels[side].permute(0, 2, 3, 1)[share.start * c : share.stop * c].copy_(crops)
        if graph.stream is not None:  # before the pipeline's next run takes its outputs back
            graph.stream.synchronize()

    def close(self) -> None:
        """See `Loader.close`."""
        self._pool.close()
        for graphs in self._graphs.values():
            graphs.close()


def _crop_graph(crops: int, sides: Sequence[int], *, threads: int, gpu: int | None) -> Pipeline:
    """jpegs, boxes (crops, 4), flips (crops,), and for each side what `_Margins.feeds` gives -> for each side
    (crops, side, side, 3) uint8, one per image."""
    pipeline = Pipeline(batch_size=IMAGES_PER_RUN, num_threads=threads, device_id=gpu, prefetch_queue_depth=1)
    with pipeline:
        jpegs = fn.external_source(name="jpegs", device="cpu", no_copy=True)
        boxes = fn.external_source(name="boxes", device="cpu")
        flips = fn.external_source(name="flips", device="cpu")
        images = decoded(jpegs, "cpu" if gpu is None else "mixed")
        # axes=(1, 0): a box is x, y, width, height; DALI's images are height, width, channel.
        regions = [fn.slice(images, boxes[j, 0:2], boxes[j, 2:4], axes=(1, 0)) for j in range(crops)]
        pipeline.set_outputs(*(_resized(regions, flips, side, gpu is not None) for side in sides))
    pipeline.build()
    return pipeline


def _resized(regions: list[Any], flips: Any, side: int, on_gpu: bool) -> Any:
    margins = fn.external_source(name=f"margins-{side}", device="cpu")
    rows, columns = (fn.external_source(name=f"{axis}-{side}", device="cpu") for axis in ("rows", "columns"))
    rows, columns = (rows.gpu(), columns.gpu()) if on_gpu else (rows, columns)
    triangle, number, byte = types.DALIInterpType.INTERP_TRIANGULAR, types.DALIDataType.FLOAT, types.DALIDataType.UINT8
    small: list[Any] = []
    for j, region in enumerate(regions):
        start, shape, padded = margins[j, 0], margins[j, 1], margins[j, 2]
        zeros = fn.slice(region, -start, padded, axes=(0, 1), out_of_bounds_policy="pad", fill_values=0)
        first, last = fn.cast(start, dtype=number), fn.cast(start + shape, dtype=number)
        mixed = fn.resize(
            zeros, size=[side, side], roi_start=first, roi_end=last, interp_type=triangle, antialias=True, dtype=number
        )
        crop = fn.cast(mixed * rows[j] * columns[j], dtype=byte)
        small.append(fn.flip(crop, horizontal=flips[j]))
    return fn.stack(*small)


class _Margins:
    """Zeros around a box, and what the outermost pixels of its crop are multiplied by, for boxes up to a length.

    Only a box that is made smaller has them: otherwise the filter is as wide as two pixels, and DALI's repeated border
    weighs what the reference gives to the border itself.
    """

    def __init__(self, longest: int, side: int) -> None:
        lengths = np.arange(longest + 1)
        self._side = side
        self._margin = np.where(lengths > side, np.ceil(lengths / side) + 1, 0).astype(np.int32)
        self._gain = np.array([_gain(int(length), side) for length in lengths], np.float32)

    def feeds(self, boxes: np.ndarray) -> dict[str, list[np.ndarray]]:
        """Per image, for its boxes (c, 4) int32: (c, 3, 2) int32 margin, shape and shape with margins, rows first;
        and the gains of the crop's rows (c, side, 1, 1) and columns (c, 1, side, 1), float32."""
        shape = np.ascontiguousarray(boxes[..., [3, 2]])
        margin = self._margin[shape]
        rows, columns = np.ones((2, *shape.shape[:2], self._side), np.float32)
        for line, lengths in ((rows, shape[..., 0]), (columns, shape[..., 1])):
            line[..., 0] = line[..., -1] = self._gain[lengths]
        return {
            f"margins-{self._side}": list(np.stack([margin, shape, shape + 2 * margin], axis=2)),
            f"rows-{self._side}": list(rows[..., None, None]),
            f"columns-{self._side}": list(columns[:, :, None, :, None]),
        }


def _gain(length: int, side: int) -> float:
    """The sum of the filter's weights at the first output pixel over the sum of those that lie inside the box."""
    if length <= side:
        return 1.0
    scale = length / side
    places = np.arange(-np.ceil(scale), np.ceil(2 * scale) + 1)
    weights = np.maximum(0.0, 1.0 - np.abs(places + 0.5 - scale / 2) / scale)
    return float(weights.sum() / weights[(places >= 0) & (places < length)].sum())
