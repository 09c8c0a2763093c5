"""What `precompute.py` lets compete: our whole path, the teachers alone on tensors in memory, and FKD's way."""

import shutil
import time
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from benchmarks.loaders.sample_images import DIFFERENT, repeated
from repcon.commands import pack as packing
from repcon.config import CropConfig, LoaderKind, PackConfig, Precision, PrecomputeConfig, TeacherConfig
from repcon.crops.plan import plan_crops
from repcon.decode.base import CropRequest
from repcon.decode.factory import open_loader
from repcon.images.pack import ImagePack
from repcon.models import teacher as teachers
from repcon.models.preprocessing import normalise
from repcon.models.teacher import Teacher
from repcon.models.timm_import import timm
from repcon.precompute import engine
from repcon.precompute.context import PrecomputeContext
from repcon.precompute.output_store import open_or_create_store, with_store_settings
from repcon.precompute.progress import Event
from repcon.runtime.console import console
from repcon.runtime.system import cores

MODELS = {"light": "package:efficientnet_lite0", "heavy": "benchmarks.precompute.contenders:resnet50"}
K, CROP = 16, CropConfig()


def resnet50() -> tuple[torch.nn.Module, dict[str, Any]]:
    """A heavy teacher with random weights: it costs what a trained one costs, and its labels mean nothing."""
    torch.manual_seed(0)
    model = timm.create_model("resnet50", pretrained=False)
    return model, {"size": 224, "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}


def load(
    sizes: dict[str, int], precision: Precision, device: torch.device, *, compile: bool = False
) -> tuple[Teacher, ...]:
    """`light`, `heavy` or both, each with its input size."""
    loaded = []
    for name, size in sizes.items():
        teacher = teachers.load_teacher(TeacherConfig(name=name, model=MODELS[name], precision=precision), device)
        if compile:
            teacher.compile(device)
        # A factory names one size; a network of convolutions takes any.
        metadata = replace(teacher.metadata, preprocessing={**teacher.metadata.preprocessing, "size": size})
        loaded.append(replace(teacher, preprocessing=replace(teacher.preprocessing, size=size), metadata=metadata))
    return tuple(loaded)


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Some teachers over some crops of each image of a pack."""

    teachers: tuple[Teacher, ...]
    pack: ImagePack
    pictures: Path
    """The pack's JPEGs as files."""
    crops: int
    batch_size: int
    device: torch.device
    folder: Path
    """For what a contender writes; it is removed again."""

    @property
    def total(self) -> int:
        """Crops of all images."""
        return self.crops * len(self.pack)


@dataclass(frozen=True, slots=True)
class Took:
    """Seconds of one run, and what our path says of it."""

    seconds: float
    event: Event = field(default_factory=Event)


def ours(job: Job, rows_per_shard: int = 0, loader: LoaderKind = "auto") -> Took:
    """The work of `repcon precompute` in this process: from the pack to a finished store."""
    config = PrecomputeConfig(
        pack=job.pack.url,
        out=str(job.folder / "labels.zarr"),
        crops=job.crops,
        crop=CROP,
        k=K,
        batch_size=job.batch_size,
        rows_per_shard=rows_per_shard,
        loader=loader,
    )
    config = with_store_settings(config)
    store = open_or_create_store(config, job.pack, [teacher.metadata for teacher in job.teachers])
    context = PrecomputeContext(config=config, pack=job.pack, store=store, teachers=job.teachers, device=job.device)
    events: list[Event] = []
    started = time.perf_counter()
    engine.work(context, events.append)
    seconds, done = time.perf_counter() - started, _sum(events)
    if store.completion.unfinished() or done.crops != job.total:
        raise RuntimeError(f"{config.out}: labelled {done.crops} of {job.total} crops")
    shutil.rmtree(config.out)
    return Took(seconds, done)


def _sum(events: Sequence[Event]) -> Event:
    return Event(
        images=sum(event.images for event in events),
        crops=sum(event.crops for event in events),
        seconds=sum(event.seconds for event in events),
        waited_seconds=sum(event.waited_seconds for event in events),
        written_bytes=sum(event.written_bytes for event in events),
    )


def alone(job: Job) -> Took:
    """The teachers' forward passes over as many crops, on normalised tensors that lie on the device: the limit."""
    inputs = []
    for teacher in job.teachers:
        side = teacher.preprocessing.size
        pixels = torch.randint(0, 256, (job.batch_size, 3, side, side), dtype=torch.uint8, device=job.device)
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        inputs.append(normalise(pixels, teacher.preprocessing, teacher.dtype))
    _synchronise(job.device)
    started = time.perf_counter()
    for start in range(0, job.total, job.batch_size):
        for teacher, tensor in zip(job.teachers, inputs, strict=True):
            teacher.forward(tensor[: job.total - start])
    _synchronise(job.device)
    return Took(time.perf_counter() - started)


def decode(job: Job) -> Took:
    """The loader over the job's crops, on all cores and for nobody."""
    pack, depth = job.pack, job.crops
    planned = plan_crops(CROP, pack.hashes, pack.sizes, range(depth))
    request = CropRequest.of_images(np.arange(len(pack)), range(depth), planned.boxes, planned.flips)
    sides = [teacher.preprocessing.size for teacher in job.teachers]
    with closing(open_loader("auto", pack, sides, device=str(job.device))) as loader:
        started = time.perf_counter()
        for _ in loader.batches(request.split(max(1, job.batch_size // depth))):
            pass
        return Took(time.perf_counter() - started)


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class _FkdImages(Dataset):
    """As FKD's generator reads: PIL, torchvision's crops, one item per image with all its crops and their boxes."""

    def __init__(self, job: Job) -> None:
        self._paths = sorted(job.pictures.glob("*.jpg"))
        self._crops, self._preprocessing = job.crops, job.teachers[0].preprocessing

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, number: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
        """Inputs (c, 3, S, S), boxes (c, 4), flips (c,), and the image's number."""
        from torchvision.transforms import (
            RandomResizedCrop,
            functional,
        )  # after repcon.models.timm_import has completed it

        # torchvision's annotations know tensors only.
        image: Any = Image.open(self._paths[number]).convert("RGB")
        p = self._preprocessing
        crops, boxes, flips = [], [], torch.rand(self._crops) < CROP.flip
        for flip in flips:
            box = RandomResizedCrop.get_params(image, list(CROP.scale), list(CROP.ratio))
            crop = functional.resized_crop(image, *box, [p.size, p.size])
            upright: Any = functional.hflip(crop) if flip else crop
            crop = functional.to_tensor(upright)
            crops.append(functional.normalize(crop, list(p.mean), list(p.std)))
            boxes.append(box)
        return torch.stack(crops), torch.tensor(boxes), flips, number


def fkd(job: Job) -> Took:
    """FKD's way with the job's first teacher: a DataLoader with a process per core, softmax, a file per image."""
    out, teacher = job.folder / "fkd", job.teachers[0]
    out.mkdir()
    started = time.perf_counter()
    loader = DataLoader(
        _FkdImages(job),
        batch_size=max(1, job.batch_size // job.crops),
        num_workers=cores(),
        pin_memory=job.device.type == "cuda",
    )
    for crops, boxes, flips, numbers in loader:
        inputs = crops.flatten(0, 1).to(job.device, teacher.dtype, non_blocking=True)
        answers = teacher.forward(inputs.contiguous(memory_format=torch.channels_last)).softmax(1)
        top = [part.cpu().unflatten(0, crops.shape[:2]) for part in answers.topk(K)]
        for place, number in enumerate(numbers.tolist()):
            torch.save([boxes[place], flips[place], *(part[place].clone() for part in top)], out / f"{number}.tar")
    seconds = time.perf_counter() - started
    shutil.rmtree(out)
    return Took(seconds)


class Packs:
    """Packs of any number of images, made once each."""

    def __init__(self, pictures: Iterable[bytes], folder: Path) -> None:
        """The first `DIFFERENT` pictures are taken."""
        self._held, self._folder = list(islice(pictures, DIFFERENT)), folder

    def of(self, count: int) -> tuple[ImagePack, Path]:
        """A pack of so many images, and the folder of their files."""
        place, out = self._folder / f"pictures-{count}", self._folder / f"pack-{count}"
        if not out.exists():
            place.mkdir()
            for number, data in enumerate(repeated(self._held, count)):
                (place / f"{number:06d}.jpg").write_bytes(data)
            console.quiet = True
            packing.run(PackConfig(source=str(place), out=str(out)))
            console.quiet = False
        return ImagePack.open(out), place
