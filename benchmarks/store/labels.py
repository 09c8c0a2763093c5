"""Labels that compress like real ones: Gaussian image features, a little moved by each crop, through random heads.

Each head is made as peaked as its kind is: a mean top-1 probability of 0.7 for 1,000 classes, 0.35 for 196, 0.55
for 45, as ImageNet-like, fine-grained and remote-sensing teachers answer on a proxy set.
"""

from dataclasses import dataclass

import numpy as np
import torch

from repcon.config import CropConfig
from repcon.crops.plan import plan_crops
from repcon.labels import topk
from repcon.labels.store import StoreSpec, TeacherMetadata

HEADS = {"imagenet": (1000, 0.7), "cars": (196, 0.35), "aerial": (45, 0.55)}
K, CROPS, WIDTH = 16, 8, 128
_SAME_IMAGE = 0.9
"""How much of a crop's features is the image's."""
_BATCH = 4096

Pair = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True, slots=True, kw_only=True)
class Labels:
    """All rows of the benchmark, in memory."""

    boxes: np.ndarray
    """(M, N, 4) uint16."""
    flips: np.ndarray
    """(M, N) uint8."""
    heads: dict[str, Pair]
    """Per head ids (M, N, k) uint16 and logp (M, N, k + 1) float16."""

    @property
    def images(self) -> int:
        return self.flips.shape[1]

    @property
    def raw_bytes_per_crop(self) -> int:
        return 9 + sum(2 * ids.shape[2] + 2 * logp.shape[2] for ids, logp in self.heads.values())


def make_labels(images: int, seed: int = 0, k: int = K) -> Labels:
    """The same labels for the same arguments; a head of fewer than k classes has all of them."""
    generator = torch.Generator().manual_seed(seed)
    weights = {name: torch.randn(WIDTH, classes, generator=generator) for name, (classes, _) in HEADS.items()}
    features = torch.randn(images, WIDTH, generator=generator)
    scales = {name: _scale(features[:2000] @ weights[name], top1) for name, (_, top1) in HEADS.items()}
    parts: dict[str, list[Pair]] = {name: [] for name in HEADS}
    for _ in range(CROPS):
        moved = _SAME_IMAGE * features + (1 - _SAME_IMAGE**2) ** 0.5 * torch.randn(images, WIDTH, generator=generator)
        for name in HEADS:
            batches = [topk.encode(part @ weights[name] * scales[name], k, (1.0,)) for part in moved.split(_BATCH)]
            ids, logp = (torch.cat(tensors).numpy() for tensors in zip(*batches, strict=True))
            parts[name].append((ids.astype(np.uint16), logp.astype(np.float16)))
    sizes = np.random.default_rng(seed).integers(240, 500, (images, 2)).astype(np.int32)
    hashes = np.random.default_rng(seed).integers(0, 256, (images, 16), np.uint8)
    plan = plan_crops(CropConfig(seed=seed), hashes, sizes, range(CROPS))
    heads = {
        name: (np.stack([ids for ids, _ in held]), np.stack([logp for _, logp in held])) for name, held in parts.items()
    }
    return Labels(boxes=plan.boxes, flips=plan.flips, heads=heads)


def _scale(logits: torch.Tensor, top1: float) -> float:
    """The factor that gives the logits this mean top-1 probability."""
    low, high = 1e-3, 1e3
    for _ in range(40):
        middle = (low * high) ** 0.5
        peaked = float((logits * middle).softmax(1).max(1).values.mean()) > top1
        low, high = (low, middle) if peaked else (middle, high)
    return low


def spec_of(labels: Labels, codec: str, values: str, rows_per_shard: int) -> StoreSpec:
    """The store that holds them."""
    teacher_metadata = tuple(
        TeacherMetadata(
            name=name,
            model=name,
            architecture="random linear head",
            weight_hash=name,
            preprocessing={},
            num_classes=classes,
        )
        for name, (classes, _) in HEADS.items()
    )
    return StoreSpec(
        pack_fingerprint="none",
        images=labels.images,
        crops=CROPS,
        crop_recipe={"seed": 0},
        k=max(ids.shape[2] for ids, _ in labels.heads.values()),
        temperatures=(1.0,),
        teachers=teacher_metadata,
        rows_per_shard=rows_per_shard,
        codec=codec,  # pyright: ignore[reportArgumentType]
        values=values,  # pyright: ignore[reportArgumentType]
    )
