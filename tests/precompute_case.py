"""A tiny pack, tiny teachers and recipes for the tests of precompute."""

import hashlib
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from repcon import backbones, packing
from repcon.backbones import Preprocessing
from repcon.config import CropConfig, PackConfig, PrecomputeConfig, TeacherConfig
from repcon.images import Pack

SIZE = 32


@pytest.fixture(scope="session")
def pack_path(picture_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The 32 pictures as a pack."""
    out = tmp_path_factory.mktemp("packs") / "pack"
    packing.run(PackConfig(source=str(picture_folder), out=str(out), workers=1))
    return out


@pytest.fixture(scope="session")
def teacher_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Random classifiers: `five` and `nine` classes for 32 pixels, `wide` (40 classes) for 48."""
    folders = {}
    for seed, (name, count, size) in enumerate([("five", 5, SIZE), ("nine", 9, SIZE), ("wide", 40, 48)]):
        torch.manual_seed(seed)
        model = backbones.create("test_resnet", num_classes=count, pretrained=False)
        folders[name] = tmp_path_factory.mktemp("teachers") / name
        data = Preprocessing(size=size, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
        backbones.save(model, folders[name], classes=(), preprocessing=data, extra={})
    return folders


@pytest.fixture
def recipe(pack_path: Path, teacher_folders: dict[str, Path], tmp_path: Path) -> PrecomputeConfig:
    """Teacher `five`, 4 units of 8 rows, 8 crops each."""
    return PrecomputeConfig(
        pack=str(pack_path),
        out=str(tmp_path / "labels.zarr"),
        teachers=(TeacherConfig(name="five", model=str(teacher_folders["five"])),),
        crops=8,
        crop=CropConfig(seed=3),
        k=4,
        temperatures=(1.0, 2.0),
        rows_per_shard=8,
        loader="reference",
        batch_size=16,
        workers=1,
        device="cpu",
    )


def with_teachers(recipe: PrecomputeConfig, folders: dict[str, Path], *names: str) -> PrecomputeConfig:
    """The recipe with other teachers."""
    return replace(recipe, teachers=tuple(TeacherConfig(name=name, model=str(folders[name])) for name in names))


def contents(folder: str | Path, below: str = "") -> dict[str, str]:
    """sha256 of every file of a store, by its name."""
    root = Path(folder)
    files = sorted(path for path in (root / below).rglob("*") if path.is_file())
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def rot(pack: Path, image: int) -> str:
    """Overwrites the image's pixels in its shard with zeros, gives its key; the file keeps its length."""
    opened = Pack.open(pack, check=False)
    data = opened.read(image)
    for shard in pack.glob("*.tar"):
        content = shard.read_bytes()
        place = content.find(data)
        if place >= 0:
            half = len(data) // 2
            shard.write_bytes(content[: place + half] + bytes(len(data) - half) + content[place + len(data) :])
    return opened.keys[image]


# Factories for `module:function`; not tests.


def _linear() -> nn.Linear:
    generator = torch.Generator().manual_seed(5)
    layer = nn.Linear(3, 6)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(6, 3, generator=generator))
        layer.bias.zero_()
    return layer


PLAIN = {"size": 16, "mean": [0.0, 0.0, 0.0], "std": [1.0, 1.0, 1.0]}


class Colours(nn.Module):
    """Answers by the mean colour; `limit` is the largest batch that its memory holds."""

    def __init__(self, limit: int = 1 << 30, seconds: float = 0.0, nan: bool = False) -> None:
        super().__init__()
        self.layer, self.limit, self.seconds, self.nan = _linear(), limit, seconds, nan

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if len(images) > self.limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        if self.seconds:
            time.sleep(self.seconds)
        logits = self.layer(images.mean((2, 3)))
        return logits * float("nan") if self.nan and len(images) > 1 else logits


def plain():
    return Colours(), PLAIN


def small_memory():
    return Colours(limit=5), PLAIN


def no_memory():
    return Colours(limit=0), PLAIN


def slow():
    return Colours(seconds=0.15), PLAIN


def nan():
    return Colours(nan=True), PLAIN


class Forgetful(Colours):
    """Leaves an image out."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return super().forward(images[:-1] if len(images) > 1 else images)


class Rude(Colours):
    """Writes into its input."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return super().forward(images.sub_(0.3).mul_(3.0))


class Deadly(Colours):
    """Kills its process."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if len(images) > 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(images)


def deadly():
    return Deadly(), PLAIN


class Moody(Colours):
    """The same weights, and another answer in another mood."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return super().forward(images) * float(os.environ.get("MOOD", "1"))


def moody():
    return Moody(), PLAIN


def rude():
    """With the preprocessing of `five` and `nine`."""
    return Rude(), {"size": SIZE, "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}


def forgetful():
    return Forgetful(), PLAIN
