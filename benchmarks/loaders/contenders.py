"""What takes part in the loaders' benchmark: each a process of its own, so that none disturbs another's memory,
threads or compiled code, and its memory can be told.

bare               the floor: libjpeg-turbo (simplejpeg) on bytes that lie in memory, into a buffer that is used again
bare_odd           the same into a buffer at an odd address, as `torch` and `ffcv` have it (`buffers.image_buffer`)
torch, dali, ffcv  repcon's loaders on the CPU
dali_mixed         DALI decoding on a GPU
dataloader_pil     PyTorch's DataLoader over PIL: the same boxes, one decode per image, torchvision's resize
ffcv_stock         FFCV as it comes: an image field that encodes again, one decode per CROP with the fast DCT, own boxes
"""

import io
import os
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr, suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from threading import local
from typing import Any

import numpy as np
import simplejpeg
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from benchmarks.harness.records import in_new_process, peak_memory_bytes
from repcon.config import CropConfig
from repcon.crops.plan import plan_crops
from repcon.decode.base import CropRequest
from repcon.decode.buffer_pool import image_buffer
from repcon.decode.factory import open_loader
from repcon.decode.libraries import installed
from repcon.images.pack import ImagePack
from repcon.runtime.console import console

BATCH_IMAGES = 64
FLOOR, FLOOR_ODD = "bare", "bare_odd"
OURS = ("torch", "dali", "ffcv")
STOCK = "stock.beton"


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One row of the benchmark: crops of every image of a pack, every image decoded once."""

    pack: str
    crops: int
    """Per image; 0 decodes only."""
    side: int
    """Of a crop, in pixels."""
    check: bool = True
    """Whether the pack compares each image with its hash at the first read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """What opening a case took."""

    first_batch_seconds: float
    """From the import of the loader's libraries to the first batch."""
    first_epoch_seconds: float
    """All images once, from the first request; a loader that compiles has done so before."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """A loader at work."""

    epoch: Callable[[], Iterator[object]]
    """One batch after the other, all images once."""
    close: Callable[[], object] = lambda: None


Maker = Callable[[Case, int], Ready]
"""Opens a case with so many threads or workers; must be picklable."""


class Contender:
    """The process that holds one of them."""

    def __init__(self, kind: str, make: Maker, threads: int) -> None:
        context = get_context("spawn")
        self.kind = kind
        self._here, there = context.Pipe()
        self._process = context.Process(target=_serve, args=(make, threads, there))
        self._process.start()
        there.close()

    def open(self, case: Case) -> Opened:
        """Opens a case in place of the last one and goes once through it."""
        return self._ask(case)

    def epoch(self) -> float:
        """Seconds to go through the case."""
        return self._ask("epoch")

    def memory_bytes(self) -> int:
        """The most memory that the process has held, and what its workers hold now."""
        return self._ask("memory")

    def close(self) -> None:
        """Ends the process."""
        with suppress(OSError):  # where it has died already
            self._here.send(None)
        self._process.join()

    def _ask(self, what: object) -> Any:
        self._here.send(what)
        answer = self._here.recv()
        if isinstance(answer, str):
            raise RuntimeError(f"{self.kind} failed:\n{answer}")
        return answer


def _serve(make: Maker, threads: int, connection: Connection) -> None:
    console.quiet = True
    torch.set_num_threads(threads)
    ready = Ready(epoch=lambda: iter(()))
    while (order := connection.recv()) is not None:
        try:
            if isinstance(order, Case):
                ready.close()
                answer, ready = _open(make, order, threads)
            else:
                answer = _memory_bytes() if order == "memory" else _seconds(ready)
        except Exception:  # Whatever it is, it belongs to the process that asked.
            answer = traceback.format_exc()
        connection.send(answer)
    ready.close()


def _open(make: Maker, case: Case, threads: int) -> tuple[Opened, Ready]:
    start = time.perf_counter()
    ready = make(case, threads)
    opened = time.perf_counter()
    batches = ready.epoch()
    next(batches)
    first = time.perf_counter()
    for _ in batches:
        pass
    seconds = time.perf_counter() - opened
    return Opened(first_batch_seconds=first - start, first_epoch_seconds=seconds), ready


def _seconds(ready: Ready) -> float:
    start = time.perf_counter()
    for _ in ready.epoch():
        pass
    return time.perf_counter() - start


def _memory_bytes() -> int:
    total, own = peak_memory_bytes(), os.getpid()
    for child in Path(f"/proc/{own}/task/{own}/children").read_text().split():
        lines = Path(f"/proc/{child}/smaps_rollup").read_text().splitlines()
        total += next(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total


def _numpy_memory(pack: ImagePack) -> np.ndarray:
    return np.empty(3 * pack.largest, np.uint8)


def _bare(memory: Callable[[ImagePack], np.ndarray], case: Case, threads: int) -> Ready:
    pack = ImagePack.open(case.pack)
    jpegs = [pack.read(row) for row in range(len(pack))]
    shares = [jpegs[start : start + 8] for start in range(0, len(jpegs), 8)]
    held = local()
    pool = ThreadPoolExecutor(threads)

    def decode(share: list[bytes]) -> None:
        if not hasattr(held, "buffer"):
            held.buffer = memory(pack)
        for data in share:
            simplejpeg.decode_jpeg(data, buffer=held.buffer)

    return Ready(epoch=lambda: pool.map(decode, shares), close=pool.shutdown)


def _ours(kind: str, case: Case, threads: int, device: str = "cpu") -> Ready:
    pack = ImagePack.open(case.pack, check=case.check)
    requests = _requests(pack, case)
    loader = open_loader(kind, pack, [case.side], num_workers=threads, device=device)

    def epoch() -> Iterator[object]:
        yield from loader.batches(requests)
        if device != "cpu":
            torch.cuda.synchronize()

    return Ready(epoch=epoch, close=loader.close)


def _requests(pack: ImagePack, case: Case) -> list[CropRequest]:
    order = np.random.default_rng(0).permutation(len(pack))
    boxes, flips = boxes_and_flips(pack, case)
    numbers = np.tile(np.arange(boxes.shape[1]), (len(order), 1))
    whole = CropRequest(images=order, crops=numbers, boxes=boxes[order], flips=flips[order])
    return list(whole.split(BATCH_IMAGES))


def boxes_and_flips(pack: ImagePack, case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Of all images of the pack: (N, c, 4) uint16 and (N, c) uint8."""
    if not case.crops:
        return np.empty((len(pack), 0, 4), np.uint16), np.empty((len(pack), 0), np.uint8)
    plan = plan_crops(CropConfig(), pack.hashes, pack.sizes, range(case.crops))
    return plan.boxes.swapaxes(0, 1), plan.flips.swapaxes(0, 1)


class PilCrops(Dataset[torch.Tensor]):
    """An image's crops, (c, side, side, 3) uint8."""

    def __init__(self, pack: ImagePack, case: Case) -> None:
        self._pack, self._side = pack, case.side
        self._boxes, self._flips = boxes_and_flips(pack, case)

    def __len__(self) -> int:
        return len(self._pack)

    def __getitem__(self, row: int) -> torch.Tensor:
        image = Image.open(io.BytesIO(self._pack.read(row))).convert("RGB")
        found = []
        for (x, y, width, height), flip in zip(self._boxes[row].tolist(), self._flips[row], strict=True):
            crop = image.crop((x, y, x + width, y + height))
            crop = crop.resize((self._side, self._side), Image.Resampling.BILINEAR)
            found.append(np.asarray(crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else crop))
        return torch.from_numpy(np.stack(found))


def _dataloader_pil(case: Case, threads: int) -> Ready:
    data = PilCrops(ImagePack.open(case.pack), case)
    order = np.random.default_rng(0).permutation(len(data)).tolist()
    # Images are named, not shuffled by the loader: all contenders take the same order.
    loader = DataLoader(data, BATCH_IMAGES, sampler=order, num_workers=threads, persistent_workers=True)
    return Ready(epoch=lambda: iter(loader))


def write_stock(pack: Path, threads: int) -> None:
    """FFCV's own image field, which encodes every image again, beside the pack's files; nothing where FFCV is missing.

    In a process of its own, whose memory is not the loader's.
    """
    if installed("ffcv"):
        in_new_process(_write_stock, pack, threads)


def _write_stock(pack: Path, threads: int) -> None:
    from ffcv.fields import RGBImageField
    from ffcv.writer import DatasetWriter

    opened = ImagePack.open(pack)
    pictures = [(np.asarray(Image.open(io.BytesIO(opened.read(row)))),) for row in range(len(opened))]
    writer = DatasetWriter(str(pack / STOCK), {"image": RGBImageField(write_mode="jpg")}, num_workers=threads)
    with open(os.devnull, "w") as nowhere, redirect_stderr(nowhere):  # its progress bar
        writer.from_indexed_dataset(pictures)


def _ffcv_stock(case: Case, threads: int) -> Ready:
    from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.pipeline import PipelineSpec
    from ffcv.transforms import RandomHorizontalFlip, ToTensor, ToTorchImage

    recipe = CropConfig()
    pipelines: dict[str, Any] = {"image": None}
    for crop in range(case.crops):
        decoder = RandomResizedCropRGBImageDecoder((case.side, case.side), recipe.scale, recipe.ratio)
        transforms = [RandomHorizontalFlip(recipe.flip), ToTensor(), ToTorchImage()]
        pipelines[f"crop_{crop}"] = PipelineSpec("image", decoder=decoder, transforms=transforms)
    loader = Loader(
        str(Path(case.pack, STOCK)), BATCH_IMAGES, threads, order=OrderOption.RANDOM, seed=0, drop_last=False,
        pipelines=pipelines,
    )  # fmt: skip
    return Ready(epoch=lambda: iter(loader))


MAKERS: dict[str, Maker] = {
    FLOOR: partial(_bare, _numpy_memory),
    FLOOR_ODD: partial(_bare, image_buffer),
    **{kind: partial(_ours, kind) for kind in OURS},
    "dali_mixed": partial(_ours, "dali", device="cuda"),
    "dataloader_pil": _dataloader_pil,
    "ffcv_stock": _ffcv_stock,
}


def present() -> tuple[str, ...]:
    """The contenders, floors apart, that this machine has what it takes for."""
    needs = {"dali_mixed": "dali", "dataloader_pil": "reference", "ffcv_stock": "ffcv"}
    kinds = [*OURS, "dali_mixed", "dataloader_pil", "ffcv_stock"]
    if not torch.cuda.is_available():
        kinds.remove("dali_mixed")
    return tuple(kind for kind in kinds if installed(needs.get(kind, kind)))
