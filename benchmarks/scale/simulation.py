"""Stores of any size, with labels of a teacher that was never asked: one block of rows, shifted from unit to unit."""

from collections.abc import Callable
from contextlib import nullcontext
from unittest.mock import patch

import numpy as np
import torch

from repcon.config import CropConfig
from repcon.crops.plan import plan_crops
from repcon.labels import topk
from repcon.labels.store import LabelStore, StoreSpec, TeacherMetadata

CROPS, CLASSES, K = 8, 1000, 4
ROWS_PER_SHARD = 16_384
_SIDE = 400, 300


class Simulation:
    """Labels of one block: peaked softmax answers and boxes of the crop plan, as compressible as real ones."""

    def __init__(self, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        shape = (CROPS, ROWS_PER_SHARD)
        parts = []
        for _ in range(CROPS):
            features = torch.randn(ROWS_PER_SHARD, 32, generator=generator)
            logits = features @ torch.randn(32, CLASSES, generator=generator)
            parts.append(topk.encode(logits, K, (1.0,)))
        ids, logp = (torch.cat(tensors).numpy() for tensors in zip(*parts, strict=True))
        self._ids = ids.astype(np.uint16).reshape(*shape, K)
        self._logp = logp.astype(np.float16).reshape(*shape, K + 1)
        hashes = np.random.default_rng(seed).integers(0, 256, (ROWS_PER_SHARD, 16), np.uint8)
        sizes = np.tile(np.array(_SIDE, np.int32), (ROWS_PER_SHARD, 1))
        planned = plan_crops(CropConfig(), hashes, sizes, range(CROPS))
        self._boxes, self._flips = planned.boxes, planned.flips

    def write(
        self,
        url: str,
        images: int,
        *,
        rows_per_shard: int = ROWS_PER_SHARD,
        durable: bool = True,
        advance: Callable[[int], None] = lambda rows: None,
    ) -> int:
        """A finished store; gives the bytes of its shards. `advance` is told of rows that were written.

        Without `durable` nothing waits for the disk: the same files, and no promise that they outlive a power cut.
        """
        metadata = TeacherMetadata(
            name="synthetic", model="none", architecture="none", weight_hash="", preprocessing={}, num_classes=CLASSES
        )
        spec = StoreSpec(
            pack_fingerprint="", images=images, crops=CROPS, crop_recipe={}, k=K, temperatures=(1.0,),
            teachers=(metadata,), rows_per_shard=rows_per_shard,
        )  # fmt: skip
        written = 0
        with nullcontext() if durable else patch("os.fsync"):
            store = LabelStore.create(url, spec)
            for number, unit in enumerate(store.units()):
                place = slice(0, len(unit.rows))
                labels = self._shifted(self._ids, number)[:, place], self._shifted(self._logp, number)[:, place]
                written += store.writer.write(
                    unit,
                    self._shifted(self._boxes, number)[:, place],
                    self._shifted(self._flips, number)[:, place],
                    {"synthetic": labels},
                )
                advance(CROPS * len(unit.rows))
        return written

    def _shifted(self, block: np.ndarray, number: int) -> np.ndarray:
        """Another block of the same rows: no two units hold the same bytes."""
        return np.roll(block, -(61 * number), axis=1)
