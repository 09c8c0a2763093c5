"""A tiny pack with a label store of two colour teachers, for the tests of training."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from repcon import crops, topk
from repcon.config import CropConfig, HeadConfig, OptimConfig, TrainConfig
from repcon.images import Pack
from repcon.loaders import Request, open_loader
from repcon.packing import open_or_pack
from repcon.store import LabelStore, StoreSpec, TeacherSection
from repcon.training.trainer import Trainer

SIZE = 32
CROPS = 4
K = 4
CLASSES = {"colours": 6, "tones": 3}


def colour_logits(pixels: torch.Tensor, classes: int) -> torch.Tensor:
    """A teacher that can be learnt: (B, 3, S, S) uint8 to (B, classes) from the mean colour."""
    weight = torch.randn(3, classes, generator=torch.Generator().manual_seed(classes))
    means = pixels.float().mean((2, 3)) / 255
    return (means - means.mean(1, keepdim=True)) @ weight * 20


def section(name: str, classes: int, weight_hash: str = "none") -> TeacherSection:
    return TeacherSection(
        name=name,
        model="colours",
        architecture="colours",
        weight_hash=weight_hash,
        preprocessing={"size": SIZE},
        num_classes=classes,
        licence="CC0-1.0",
    )


def make_store(
    folder: Path, pack: Pack, weight_hash: str = "none", crop_seed: int = 0, rows_per_shard: int = 0
) -> LabelStore:
    """Every unit written, with the teachers' answers on exactly the stored crops."""
    recipe = CropConfig(seed=crop_seed)
    spec = StoreSpec(
        pack_fingerprint=pack.fingerprint,
        images=len(pack),
        crops=CROPS,
        crop_recipe={"seed": crop_seed},
        k=K,
        temperatures=(1.0, 2.0),
        teachers=tuple(section(name, classes, weight_hash) for name, classes in CLASSES.items()),
        rows_per_shard=rows_per_shard,
    )
    store = LabelStore.create(str(folder), spec)
    plan = crops.plan(recipe, pack.hashes, pack.sizes, range(CROPS))
    loader = open_loader("torch", pack, (SIZE,), workers=1)
    for unit in store.unfinished():
        rows = np.arange(unit.rows.start, unit.rows.stop)
        boxes, flips = plan.boxes[unit.crops][:, rows], plan.flips[unit.crops][:, rows]
        numbers = np.tile(np.array(unit.crops), (len(rows), 1))
        request = Request(images=rows, crops=numbers, boxes=boxes.swapaxes(0, 1), flips=flips.swapaxes(0, 1))
        pixels = next(iter(loader.batches([request]))).pixels[SIZE]
        labels = {}
        for name, classes in CLASSES.items():
            ids, logp = topk.encode(colour_logits(pixels, classes), K, (1.0, 2.0))
            shape = (len(rows), len(unit.crops), -1)
            labels[name] = (
                ids.numpy().reshape(shape).swapaxes(0, 1),
                logp.numpy().astype(np.float16).reshape(shape).swapaxes(0, 1),
            )
        store.write(unit, boxes, flips, labels)
    loader.close()
    return LabelStore.open(str(folder))


def make_case(root: Path, pictures: Path) -> Path:
    """`root/pack` and `root/labels.zarr`."""
    pack = open_or_pack(str(pictures), root / "cache")
    (root / "pack.txt").write_text(str(pack_path(root)))
    make_store(root / "labels.zarr", pack)
    return root


def pack_path(root: Path) -> Path:
    """Where `open_or_pack` put the pack."""
    return next(path.parent for path in (root / "cache").rglob("*.npz"))


def settings(root: Path, out: Path, **changes: object) -> TrainConfig:
    """A run of seconds: 32 pictures, 4 epochs of 4 batches."""
    values: dict[str, object] = {
        "pack": str(pack_path(root)),
        "store": str(root / "labels.zarr"),
        "out": str(out),
        "trunk": "test_efficientnet",
        "pretrained": False,
        "size": SIZE,
        "epochs": 4,
        "batch_size": 8,
        "holdout": 0.1,
        "loader": "torch",
        "workers": 1,
        "device": "cpu",
        "precision": "fp32",
        "heads": (HeadConfig(name="colours", temperature=2.0), HeadConfig(name="tones", weight=0.5)),
        "optim": OptimConfig(lr=3e-3, warmup_epochs=0.5),
    }
    return TrainConfig(**(values | changes))  # pyright: ignore[reportArgumentType]


def lines(out: Path, event: str) -> list[dict[str, Any]]:
    events = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [line for line in events if line["event"] == event]


def losses(out: Path) -> list[tuple[int, dict[str, float]]]:
    return [(line["step"], line["loss"]) for line in lines(out, "step")]


def stop_after(steps: int, monkeypatch: pytest.MonkeyPatch, number: int = signal.SIGTERM) -> None:
    """Sends this process a real signal in the middle of the run."""
    plain = Trainer.train_batch
    taken = 0

    def stopping(self: Trainer, *arguments: Any) -> torch.Tensor:
        nonlocal taken
        taken += 1
        if taken == steps:
            os.kill(os.getpid(), number)
        return plain(self, *arguments)

    monkeypatch.setattr(Trainer, "train_batch", stopping)


def newest(out: Path) -> Path:
    return max((out / "checkpoints").glob("step-*.pt"))
