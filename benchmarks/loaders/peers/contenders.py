"""The crops of our plan, cut by the loaders of other projects as their users would write it: each image decoded once,
all its boxes cut, resized to the side and flipped, 64 images a batch, one worker per core.

torchvision   PyTorch's DataLoader over a pack's JPEGs
litdata       StreamingDataset and StreamingDataLoader over chunks that `optimize` wrote
streaming     mosaicml-streaming: StreamingDataset and StreamingDataLoader over MDS shards
webdataset    WebDataset and WebLoader over tars
spdl          a Pipeline of threads over a pack's JPEGs; FFmpeg decodes and filters (spdl.io)

The first four have no decoder or resize of their own: they call torchvision's, which is twice as fast as Pillow
(`Cut`). A batch is a dictionary of `row` (n,) int64 and `crops` (n, c, 3, side, side) uint8. Peers' libraries are
imported where they are used, so that each process holds only its own.
"""

# Peers are optional.
# pyright: reportMissingImports=false

import io
import os
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from benchmarks.harness.records import in_new_process
from benchmarks.loaders.contenders import BATCH_IMAGES, Case, Maker, Ready, boxes_and_flips
from repcon.images.pack import ImagePack
from repcon.models.torchvision_operators import complete_on_import

complete_on_import()

Batch = dict[str, torch.Tensor]
FORK = "fork"
"""Start method of the peers' workers, Python's own on Linux: what they are given cannot be pickled."""
LITDATA, STREAMING, WEBDATASET = "litdata", "streaming", "webdataset"
SHARDS_PER_WORKER = 4


class Cut:
    """From an image's JPEG and row to its crops, by torchvision."""

    def __init__(self, pack: ImagePack, case: Case) -> None:
        self._boxes, self._flips = boxes_and_flips(pack, case)
        self._side, self._decode = case.side, decoder()

    def __call__(self, sample: dict[str, Any]) -> Batch:
        """`image`, the JPEG's bytes, and `row` to a `Batch` without its first axis."""
        from torchvision.transforms.v2 import functional as F

        row, image = int(sample["row"]), self._decode(sample["image"])
        crops = []
        for (x, y, width, height), flip in zip(self._boxes[row].tolist(), self._flips[row], strict=True):
            crop = F.resized_crop(image, y, x, height, width, [self._side, self._side], antialias=True)
            crops.append(F.horizontal_flip(crop) if flip else crop)
        return {"row": torch.tensor(row), "crops": torch.stack(crops)}


def decoder() -> Callable[[bytes], torch.Tensor]:
    """JPEG to (3, height, width) uint8: torchvision's decoder, or Pillow where torchvision's library cannot be loaded
    (a build for another torch)."""
    return _decode_by_torchvision if decoder_name() == "torchvision" else _decode_by_pillow


def _decode_by_torchvision(jpeg: bytes) -> torch.Tensor:
    from torchvision.io import decode_jpeg

    return decode_jpeg(torch.frombuffer(bytearray(jpeg), dtype=torch.uint8))  # pyright: ignore[reportReturnType]


def _decode_by_pillow(jpeg: bytes) -> torch.Tensor:
    return torch.from_numpy(np.array(Image.open(io.BytesIO(jpeg)).convert("RGB"))).permute(2, 0, 1)


def decoder_name() -> str:
    """`torchvision` or `Pillow`, whichever `decoder` takes."""
    from torchvision.io.image import _has_image_ops

    return "torchvision" if _has_image_ops() else "Pillow"


class TorchvisionCrops(Dataset[Batch]):
    """A pack's images by row."""

    def __init__(self, pack: ImagePack, case: Case) -> None:
        self._pack, self._cut = pack, Cut(pack, case)

    def __len__(self) -> int:
        return len(self._pack)

    def __getitem__(self, row: int) -> Batch:
        return self._cut({"image": self._pack.read(row), "row": row})


def _torchvision(case: Case, threads: int) -> Ready:
    data = TorchvisionCrops(ImagePack.open(case.pack), case)
    loader = DataLoader(
        data, BATCH_IMAGES, sampler=_order(len(data)), num_workers=threads, persistent_workers=True
    )  # fmt: skip
    return Ready(epoch=lambda: iter(loader))


def _order(images: int) -> list[int]:
    return np.random.default_rng(0).permutation(images).tolist()


def _write_litdata(pack: str, threads: int) -> None:
    import litdata

    rows = range(len(ImagePack.open(pack)))
    litdata.optimize(
        partial(_litdata_sample, pack), list(rows), f"{pack}-{LITDATA}", chunk_bytes="16MB", num_workers=threads,
        keep_data_ordered=True, verbose=False,
    )  # fmt: skip


def _litdata_sample(pack: str, row: int) -> dict[str, Any]:
    return {"image": _opened(pack).read(row), "row": row}


_opened = cache(ImagePack.open)


def litdata_loader(case: Case, threads: int, *, shuffle: bool = False) -> Any:
    """A StreamingDataLoader, whose position can be saved."""
    import litdata

    cut = Cut(ImagePack.open(case.pack), case)
    data = litdata.StreamingDataset(f"{case.pack}-{LITDATA}", shuffle=shuffle, drop_last=False, transform=cut)
    return litdata.StreamingDataLoader(data, batch_size=BATCH_IMAGES, num_workers=threads, persistent_workers=True)


def _write_streaming(pack: str, threads: int) -> None:
    from streaming import MDSWriter

    opened = ImagePack.open(pack)
    with MDSWriter(out=f"{pack}-{STREAMING}", columns={"image": "bytes", "row": "int"}) as writer:
        for row in range(len(opened)):
            writer.write({"image": opened.read(row), "row": row})


def streaming_loader(case: Case, threads: int, *, shuffle: bool = False) -> Any:
    """A StreamingDataLoader of mosaicml-streaming, whose position can be saved."""
    from streaming import StreamingDataLoader, StreamingDataset

    cut = Cut(ImagePack.open(case.pack), case)

    class Crops(StreamingDataset):
        def __getitem__(self, at: Any) -> Any:
            return cut(super().__getitem__(at))

    data = Crops(local=f"{case.pack}-{STREAMING}", batch_size=BATCH_IMAGES, shuffle=shuffle)
    return StreamingDataLoader(
        data, batch_size=BATCH_IMAGES, num_workers=threads, persistent_workers=True, multiprocessing_context=FORK
    )


def _write_webdataset(pack: str, threads: int) -> None:
    import webdataset

    opened, folder = ImagePack.open(pack), Path(f"{pack}-{WEBDATASET}")
    folder.mkdir()
    per_shard = max(1, -(-len(opened) // (SHARDS_PER_WORKER * threads)))
    with webdataset.ShardWriter(str(folder / "%06d.tar"), maxcount=per_shard, verbose=0) as writer:
        for row in range(len(opened)):
            writer.write({"__key__": f"{row:08d}", "jpg": opened.read(row)})


def _webdataset(case: Case, threads: int) -> Ready:
    import webdataset

    cut = Cut(ImagePack.open(case.pack), case)

    def cut_tuple(sample: dict[str, Any]) -> tuple[int, torch.Tensor]:
        row = int(sample["__key__"])
        return row, cut({"image": sample["jpg"], "row": row})["crops"]

    shards = sorted(str(path) for path in Path(f"{case.pack}-{WEBDATASET}").iterdir())
    data = webdataset.WebDataset(shards, shardshuffle=False).map(cut_tuple).batched(BATCH_IMAGES)
    loader = webdataset.WebLoader(
        data, batch_size=None, num_workers=threads, persistent_workers=True, multiprocessing_context=FORK
    )

    def epoch() -> Iterator[Batch]:
        for rows, crops in loader:
            yield {"row": torch.as_tensor(rows), "crops": crops}

    return Ready(epoch=epoch)


def _spdl(case: Case, threads: int) -> Ready:
    import spdl.io
    from spdl.pipeline import PipelineBuilder

    pack, side = ImagePack.open(case.pack), case.side
    boxes, flips = boxes_and_flips(pack, case)

    def decode(row: int) -> tuple[int, Any]:
        packets = spdl.io.demux_image(pack.read(row))
        return row, spdl.io.decode_packets(packets, filter_desc=spdl_filters(boxes[row], flips[row], side))

    def batch(images: list[tuple[int, Any]]) -> Batch:
        rows, frames = zip(*images, strict=True)
        pixels = spdl.io.to_torch(spdl.io.convert_frames(list(frames)))  # (n, c * side, side, 3)
        crops = pixels.unflatten(1, (-1, side)).permute(0, 1, 4, 2, 3)
        return {"row": torch.tensor(rows), "crops": crops}

    def epoch() -> Iterator[Batch]:
        pipeline = (
            PipelineBuilder()
            .add_source(_order(len(pack)))
            .pipe(decode, concurrency=threads, output_order="input")
            .aggregate(BATCH_IMAGES)
            .pipe(batch)
            .add_sink(3)
            .build(num_threads=threads)
        )
        with pipeline.auto_stop():
            yield from pipeline

    return Ready(epoch=epoch)


def spdl_filters(boxes: np.ndarray, flips: np.ndarray, side: int) -> str:
    """FFmpeg's filters from one image to all its crops, one below the other.

    RGB comes first, since YUV with halved chroma cannot be cut at odd pixels.
    """
    names = [f"c{crop}" for crop in range(len(boxes))]
    parts = [f"format=rgb24,split={len(names)}" + "".join(f"[{name}]" for name in names)]
    for name, (x, y, width, height), flip in zip(names, boxes.tolist(), flips, strict=True):
        cut = f"crop={width}:{height}:{x}:{y}:exact=1,scale={side}:{side}:flags=bilinear"
        parts.append(f"[{name}]{cut}{',hflip' if flip else ''}[{name}out]")
    stack = f"vstack=inputs={len(names)}" if len(names) > 1 else "null"
    return ";".join([*parts, "".join(f"[{name}out]" for name in names) + stack])


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """Another project's loader."""

    needs: Callable[[], object]
    """Imports its libraries."""
    open: Maker
    write: Callable[[str, int], None] | None = None
    """(pack, workers): writes the pack's images in its own format, beside the pack."""
    loader: Callable[..., Any] | None = None
    """(case, workers, shuffle=True): a loader with `state_dict` and `load_state_dict`; None where it has neither."""


def _open(make: Callable[..., Any], case: Case, threads: int) -> Ready:
    loader = make(case, threads)
    return Ready(epoch=lambda: iter(loader))


def _needs_spdl() -> None:
    import spdl.io.utils
    import spdl.pipeline

    spdl.io.utils.get_ffmpeg_filters()  # loads FFmpeg's libraries, which are the machine's


PEERS: dict[str, Peer] = {
    "torchvision": Peer(needs=partial(import_module, "torchvision.transforms.v2"), open=_torchvision),
    "litdata": Peer(
        needs=partial(import_module, "litdata"), open=partial(_open, litdata_loader), write=_write_litdata,
        loader=litdata_loader,
    ),
    "streaming": Peer(
        needs=partial(import_module, "streaming"), open=partial(_open, streaming_loader), write=_write_streaming,
        loader=streaming_loader,
    ),
    "webdataset": Peer(needs=partial(import_module, "webdataset"), open=_webdataset, write=_write_webdataset),
    "spdl": Peer(needs=_needs_spdl, open=_spdl),
}  # fmt: skip


def missing(names: Iterable[str] = tuple(PEERS)) -> dict[str, str]:
    """The peers whose libraries cannot be imported here, each with its error in one line."""
    return in_new_process(_missing, tuple(names))


def _missing(names: tuple[str, ...]) -> dict[str, str]:
    return {name: error for name in names if (error := _import_error(name))}


def _import_error(name: str) -> str:
    try:
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
            PEERS[name].needs()
    except Exception as error:  # a library may fail in any way
        return traceback.format_exception_only(error)[-1].strip().splitlines()[0]
    return ""


def write(name: str, pack: str, threads: int) -> None:
    """Write the pack's images in the peer's own format, in a process of its own; nothing where it reads JPEGs."""
    if PEERS[name].write:
        in_new_process(_write_quietly, name, pack, threads)


def _write_quietly(name: str, pack: str, threads: int) -> None:
    make = PEERS[name].write
    assert make is not None
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):  # progress bars
        make(pack, threads)
