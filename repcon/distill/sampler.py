"""The order of training batches: which crops of which images each batch holds, and when an image is decoded.

An *epoch group* decodes every image once and crops it `crops_per_decode` times; it stands for as many epochs. Its
images are shuffled by (seed, epoch) and cut into chunks; a batch takes one crop of one chunk per crop number:

    batch t  =  crop j of chunk (t - j * stride) mod steps,   j = 0 .. crops - 1

With stride 0 all crops of an image are in one batch. `mix_window` sets the stride so that they are spread over that
many batches (batch-norm statistics then see each image once). Each image is still decoded once: its pixels wait in
memory for their batches, about `mix_window` batches of them.

Every rank takes a slice of every chunk. So the global batches depend only on seed, epoch, batch size, crops and
window: each (image, crop) occurs once, whatever the number of ranks, and a run may resume with another number. Where
labels are read in windows, images are shuffled within each window and come window by window.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from repcon.decode.base import CropBatch, CropRequest
from repcon.runtime.errors import UserError

BoxLookup = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
"""(n,) rows of the pack to boxes (n, c, 4) uint16 and flips (n, c) uint8 of an epoch group's c crops."""


def box_lookup(boxes: Sequence[np.ndarray], flips: Sequence[np.ndarray]) -> BoxLookup:
    """A lookup in arrays of all N images: per crop boxes (N, 4) uint16 and flips (N,) uint8."""

    def lookup(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return np.stack([box[images] for box in boxes], axis=1), np.stack([flip[images] for flip in flips], axis=1)

    return lookup


@dataclass(frozen=True, slots=True, kw_only=True)
class EpochGroup:
    """One pass over the images, which stands for one epoch per crop number."""

    epoch: int
    """The first of its epochs."""
    crops: tuple[int, ...]
    """The crop numbers cut from each image, one per epoch."""


def epoch_groups(epochs: int, crops_per_decode: int, stored_crops: int) -> list[EpochGroup]:
    """The groups of `epochs` epochs; epoch e shows crop e, starting over after the last stored crop."""
    if not 1 <= crops_per_decode <= stored_crops:
        raise UserError(
            f"crops_per_decode {crops_per_decode}: the store holds {stored_crops} crops per image; "
            f"use 1..{stored_crops}"
        )
    groups = []
    for first in range(0, epochs, crops_per_decode):
        last = min(first + crops_per_decode, epochs)
        groups.append(EpochGroup(epoch=first, crops=tuple(epoch % stored_crops for epoch in range(first, last))))
    return groups


def split_train_validation(hashes: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Training and validation rows, both ascending; images of equal content are on the same side.

    hashes: (N, 16) uint8, the pack's content hashes. `fraction` of the rows (at least one, unless it is 0) validates.
    """
    total = len(hashes)
    count = 0 if fraction == 0 else min(max(1, round(fraction * total)), total - 1)
    if count <= 0:
        return np.arange(total), np.arange(0)
    salt = np.random.Philox(key=seed).random_raw(2)
    words = np.ascontiguousarray(hashes).view("<u8") ^ salt
    score = words[:, 0] * np.uint64(0x9E3779B97F4A7C15) + words[:, 1]
    score ^= score >> np.uint64(29)
    validates = score <= np.partition(score, count - 1)[count - 1]
    return np.flatnonzero(~validates), np.flatnonzero(validates)


class CropBatchSampler:
    """The batches of one epoch group for one rank; `start` in the methods is the first batch that is wanted.

    images: (n,) rows to show. batch_size: crops per batch over all ranks. windows: (n,) number of the window that holds
    each image's labels; images of a lower one come first. Raises UserError where a batch is smaller than its crops, or
    a chunk smaller than the number of ranks.
    """

    def __init__(
        self,
        images: np.ndarray,
        group: EpochGroup,
        *,
        seed: int,
        batch_size: int,
        mix_window: int = 0,
        windows: np.ndarray | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.group = group
        self._edges = _chunk_edges(len(images), batch_size, len(group.crops))
        self.steps = len(self._edges) - 1
        self._stride = _stride(mix_window, len(group.crops), self.steps)
        if int(np.diff(self._edges).min()) < world_size:
            raise UserError(
                f"batch_size {batch_size}: a batch has fewer images than the {world_size} processes; enlarge it"
            )
        self._rows, self._windows, self._key = np.asarray(images), windows, [seed, group.epoch]
        self._rank, self._world_size = rank, world_size

    @cached_property
    def _shuffled(self) -> np.ndarray:
        """The rows in their order; computed on first use, since a long run has many epoch groups."""
        # Raw Philox words are stable over numpy's versions, `permutation` is not guaranteed to be.
        words = np.random.Philox(key=self._key).random_raw(len(self._rows))
        if self._windows is None:
            return self._rows[np.argsort(words, kind="stable")]
        return self._rows[np.lexsort((words, self._windows))]

    def size(self, step: int) -> int:
        """Crops in batch `step` over all ranks."""
        return sum(int(self._edges[chunk + 1] - self._edges[chunk]) for chunk in self._chunks(step))

    def samples(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """This rank's part of batch `step`: (b,) rows and (b,) crop numbers, in the order of the pixels."""
        images = [self._chunk_images(chunk) for chunk in self._chunks(step)]
        if self._stride == 0:  # one decoded chunk, in the loader's order: image by image
            return np.repeat(images[0], len(images)), np.tile(self.group.crops, len(images[0]))
        return np.concatenate(images), np.repeat(self.group.crops, [len(rows) for rows in images])

    def requests(self, lookup: BoxLookup, start: int = 0) -> Iterator[CropRequest]:
        """What to decode, in order; `lookup` is called when a request is made."""
        for _, chunks in self._decode_schedule(start):
            images = np.concatenate([self._chunk_images(chunk) for chunk in chunks])
            boxes, flips = lookup(images)
            crops = np.tile(np.array(self.group.crops, np.int64), (len(images), 1))
            yield CropRequest(images=images, crops=crops, boxes=boxes, flips=flips)

    def batches(self, decoded: Iterable[CropBatch], start: int = 0) -> Iterator[CropBatch]:
        """The batches start, start + 1, ... out of the decoded `requests(..., start)`."""
        if self._stride == 0:
            yield from decoded
            return
        decoded = iter(decoded)
        schedule = dict(self._decode_schedule(start))
        waiting: dict[tuple[int, int], CropBatch] = {}
        for step in range(start, self.steps):
            if step in schedule:
                waiting |= self._split_decoded(next(decoded), schedule[step], step)
            yield _concatenate([waiting.pop((chunk, j)) for j, chunk in enumerate(self._chunks(step))])

    def _chunks(self, step: int) -> list[int]:
        """Per crop number, the chunk whose crop is in batch `step`."""
        return [(step - j * self._stride) % self.steps for j in range(len(self.group.crops))]

    def _chunk_images(self, chunk: int) -> np.ndarray:
        """This rank's rows of a chunk."""
        first, size = int(self._edges[chunk]), int(self._edges[chunk + 1] - self._edges[chunk])
        low, high = (first + size * rank // self._world_size for rank in (self._rank, self._rank + 1))
        return self._shuffled[low:high]

    def _decode_schedule(self, start: int) -> Iterator[tuple[int, list[int]]]:
        """(step, chunks that must be decoded for it) where there are any; a resume decodes waiting chunks again."""
        seen: set[int] = set()
        for step in range(start, self.steps):
            new = [chunk for chunk in dict.fromkeys(self._chunks(step)) if chunk not in seen]
            seen.update(new)
            if new:
                yield step, new

    def _split_decoded(self, batch: CropBatch, chunks: list[int], step: int) -> dict[tuple[int, int], CropBatch]:
        """The decoded crops by (chunk, index of the crop), without those whose batch is before `step`."""
        parts: dict[tuple[int, int], CropBatch] = {}
        count, first = len(self.group.crops), 0
        for chunk in chunks:
            last = first + len(self._chunk_images(chunk)) * count
            for j in range(count):
                if (chunk + j * self._stride) % self.steps >= step:
                    parts[chunk, j] = _copy_rows(batch, slice(first + j, last, count))
            first = last
        return parts


def _chunk_edges(images: int, batch_size: int, crops: int) -> np.ndarray:
    """Where chunks begin and end: all of batch_size // crops images, the last two sharing what remains.

    One image that is left over after chunks of two joins the last of them.
    """
    size = batch_size // crops
    if size < 1:
        raise UserError(f"batch_size {batch_size} is smaller than crops_per_decode {crops}; enlarge it")
    if images < 1:
        raise UserError("no images are left to train on; lower val_fraction or use a larger pack")
    edges = np.append(np.arange(0, images, size), images)
    if len(edges) > 2:  # A batch of one image would break batch norm.
        edges[-2] = edges[-3] + (images - edges[-3] + 1) // 2
        if size > 1 and edges[-1] - edges[-2] == 1:
            edges = np.delete(edges, -2)
    return edges


def _stride(mix_window: int, crops: int, steps: int) -> int:
    """Batches between two crops of an image."""
    if not mix_window or crops == 1:
        return 0
    if mix_window < crops or steps < crops:
        raise UserError(
            f"mix_window {mix_window}: {crops} crops need a window of {crops} batches or more, and an epoch as long "
            f"(it has {steps}); enlarge it, lower batch_size, or set it to 0"
        )
    return min(mix_window, steps) // crops


def _copy_rows(batch: CropBatch, rows: slice) -> CropBatch:
    """A copy, so that the decoded batch can be freed."""
    copies = {
        side: pixels.permute(0, 2, 3, 1)[rows].clone().permute(0, 3, 1, 2) for side, pixels in batch.pixels.items()
    }
    return CropBatch(pixels=copies, images=batch.images[rows], crops=batch.crops[rows])


def _concatenate(parts: list[CropBatch]) -> CropBatch:
    pixels = {
        side: torch.cat([part.pixels[side].permute(0, 2, 3, 1) for part in parts]).permute(0, 3, 1, 2)
        for side in parts[0].pixels
    }
    images, crops = torch.cat([part.images for part in parts]), torch.cat([part.crops for part in parts])
    return CropBatch(pixels=pixels, images=images, crops=crops)
