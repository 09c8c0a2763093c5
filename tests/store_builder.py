"""Small label stores for the tests: labels that follow from the unit's name, so that any process can write them."""

import zlib

import numpy as np
import torch

from repcon import topk
from repcon.store import LabelStore, StoreSpec, TeacherSection, Unit


def section(name: str, num_classes: int, **changes) -> TeacherSection:
    facts = {
        "name": name,
        "model": "resnet10t",
        "architecture": "resnet10t",
        "weight_hash": f"hash of {name}",
        "preprocessing": {"size": 32, "mean": [0.5, 0.5, 0.5]},
        "num_classes": num_classes,
        "versions": {"torch": "2.13.0"},
        "licence": "Apache-2.0",
    }
    return TeacherSection(**(facts | changes))


def spec(**changes) -> StoreSpec:
    facts = {
        "pack_fingerprint": "f" * 64,
        "images": 100,
        "crops": 4,
        "crop_recipe": {"seed": 0, "scale": [0.25, 1.0]},
        "k": 5,
        "temperatures": (1.0, 2.0),
        "teachers": (section("wide", 300), section("small", 4)),
        "rows_per_shard": 40,
    }
    return StoreSpec(**(facts | changes))


def labels_of(store: LabelStore, unit: Unit) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """ids (m, r, k) and logp (m, r, k + T) float16 per head; the same in every process."""
    shape = (len(unit.crops), len(unit.rows))
    labels = {}
    for name in unit.heads:
        head = store.heads[name]
        seed = zlib.crc32(f"{name} {unit.crops.start} {unit.rows.start}".encode())
        logits = 3 * torch.randn(shape[0] * shape[1], head.classes, generator=torch.Generator().manual_seed(seed))
        ids, logp = topk.encode(logits, head.k, head.temperatures)
        labels[name] = (ids.numpy().reshape(*shape, -1), logp.numpy().astype(np.float16).reshape(*shape, -1))
    return labels


def boxes_of(unit: Unit) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng([unit.crops.start, unit.rows.start])
    shape = (len(unit.crops), len(unit.rows))
    return generator.integers(1, 300, (*shape, 4), np.uint16), generator.integers(0, 2, shape, np.uint8)


def write(store: LabelStore, unit: Unit, missing=()) -> None:
    reasons = {row: f"row {row} is no JPEG" for row in missing}
    store.write(unit, *boxes_of(unit), labels_of(store, unit), reasons)


def fill(store: LabelStore) -> LabelStore:
    for unit in store.unfinished():
        write(store, unit)
    return store


def create_and_fill(url: str, **changes) -> None:
    """A process's whole run: what `precompute` does with a store."""
    fill(LabelStore.create(url, spec(**changes)))


def expected(store: LabelStore, crop: int, head: str) -> tuple[np.ndarray, np.ndarray]:
    """The ids (N, k) and logp (N, k + T) that were written for this crop."""
    parts = []
    for unit in store.units():
        if head in unit.heads and crop in unit.crops:
            ids, logp = labels_of(store, unit)[head]
            parts.append((ids[crop - unit.crops.start], logp[crop - unit.crops.start]))
    return np.concatenate([ids for ids, _ in parts]), np.concatenate([logp for _, logp in parts])


def snapshot(folder) -> dict[str, bytes]:
    """Every file below the folder, hidden ones too."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
