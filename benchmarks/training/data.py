"""What `training.py` trains on: generated photographs in packs, and stores of random labels."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import simplejpeg
import torch

from benchmarks.loaders.sample_images import DIFFERENT, repeated
from repcon.config import CropConfig, LoaderKind, Precision
from repcon.crops.plan import plan_crops
from repcon.images.pack import ImagePack
from repcon.images.packing import open_or_pack
from repcon.labels import topk
from repcon.labels.store import LabelStore, StoreSpec, TeacherMetadata

CLASSES = {"generalist": 1000, "task": 100}
CROPS, K = 4, 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """How much is run, and at which size."""

    heavy_images: int
    light_images: int
    batch_size: int
    rounds: int
    heavy_epochs: int = 1
    """How often an epoch of the heavy backbone's contenders goes over its images."""
    heavy: str = "tf_efficientnet_lite0"
    """The backbone that costs more than its data, and the teachers of online distillation."""
    size: int = 128
    precision: Precision = "fp32"
    loader: LoaderKind = "auto"
    num_workers: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Data:
    """Pictures as a folder and as packs, with stores of random labels, for the heavy and the light backbone."""

    folder: Path
    heavy: tuple[ImagePack, LabelStore]
    light: tuple[ImagePack, LabelStore]


def make_data(folder: Path, setting: Setting) -> Data:
    """Ten classes of generated photographs, packed twice: for the heavy backbone and for the light one."""
    pictures = folder / "pictures"
    held = list(_photographs(DIFFERENT))
    for name, count in (("heavy", setting.heavy_images), ("light", setting.light_images)):
        for number, data in enumerate(repeated(held, count)):
            place = pictures / name / f"class-{number % 10}" / f"{number:05d}.jpg"
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(data)
        _store(folder / f"{name}.zarr", open_or_pack(str(pictures / name), folder / "packs"))
    return open_data(folder)


def open_data(folder: Path) -> Data:
    """What `make_data` left in the folder."""
    packs = {pack.fingerprint: pack for pack in map(ImagePack.open, (folder / "packs").iterdir())}
    stores = [LabelStore.open(str(folder / f"{name}.zarr")) for name in ("heavy", "light")]
    heavy, light = ((packs[store.manifest.pack_fingerprint], store) for store in stores)
    return Data(folder=folder / "pictures" / "light", heavy=heavy, light=light)


def _photographs(count: int) -> Iterator[bytes]:
    """JPEGs of 500 x 375 pixels and about 100 kB: smooth shapes under grain, as libjpeg finds photographs."""
    generator = np.random.default_rng(0)
    y, x = np.mgrid[0:375, 0:500].astype(np.float32) / 500
    for _ in range(count):
        waves = generator.uniform(2, 14, (3, 2))
        picture = np.stack([np.sin(a * x + b * y) for a, b in waves], axis=-1) * 90 + 128
        picture += generator.normal(0, 20, picture.shape)
        yield simplejpeg.encode_jpeg(picture.clip(0, 255).astype(np.uint8), quality=88, colorsubsampling="420")


def _store(folder: Path, pack: ImagePack) -> None:
    """Labels of random logits on the planned crops."""
    teacher_metadata = tuple(
        TeacherMetadata(
            name=name, model="random", architecture="random", weight_hash="", preprocessing={}, num_classes=count
        )
        for name, count in CLASSES.items()
    )
    spec = StoreSpec(
        pack_fingerprint=pack.fingerprint,
        images=len(pack),
        crops=CROPS,
        crop_recipe={},
        k=K,
        temperatures=(1.0,),
        teachers=teacher_metadata,
    )
    store = LabelStore.create(str(folder), spec)
    plan = plan_crops(CropConfig(), pack.hashes, pack.sizes, range(CROPS))
    for unit in store.completion.unfinished():
        rows = slice(unit.rows.start, unit.rows.stop)
        shape = (len(unit.crops), len(unit.rows))
        labels = {}
        for name, count in CLASSES.items():
            ids, logp = topk.encode(torch.randn(shape[0] * shape[1], count) * 3, K, (1.0,))
            labels[name] = (ids.numpy().reshape(*shape, -1), logp.numpy().astype(np.float16).reshape(*shape, -1))
        store.writer.write(unit, plan.boxes[unit.crops][:, rows], plan.flips[unit.crops][:, rows], labels)
