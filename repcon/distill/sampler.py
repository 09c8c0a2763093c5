"""The order of training: which crops of which images are in each batch, who decodes them, and when.

A *pass* decodes every image once and cuts `crops_per_decode` stored crops from it; it stands for as many epochs.
Its images are shuffled by (seed, epoch) and cut into groups; a batch is one crop of a group per crop number:

    batch t  =  crop j of group (t - j * stride) mod steps,   j = 0 .. crops - 1

With stride 0 all crops of an image meet in one batch. `mix_window` sets the stride so that they are spread over
that many batches (batch-norm statistics then see each image once), and still each image is decoded once: pixels
wait in memory for their batch, about `mix_window` batches of them.

Every process takes a slice of every group. So the batches as a whole depend on (seed, epoch, batch size, crops,
window) only: each (image, crop) comes once, whatever the number of processes, and a run may go on with another.
Where labels are read in windows, images are shuffled within each window and come window by window.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from repcon.decode.base import CropBatch, CropRequest
from repcon.runtime.errors import UserError

Cut = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
"""Of (n,) rows the boxes (n, c, 4) uint16 and flips (n, c) uint8 of a pass's c crops."""


def cut_of(boxes: Sequence[np.ndarray], flips: Sequence[np.ndarray]) -> Cut:
    """From those of all images in memory, per crop (N, 4) uint16 and (N,) uint8."""

    def cut(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return np.stack([box[images] for box in boxes], axis=1), np.stack([flip[images] for flip in flips], axis=1)

    return cut


@dataclass(frozen=True, slots=True, kw_only=True)
class EpochGroup:
    """One time through the images."""

    epoch: int
    """The first of the epochs that it stands for."""
    crops: tuple[int, ...]
    """The crop numbers cut from each image, one per epoch."""


def epoch_groups(epochs: int, crops_per_decode: int, stored: int) -> list[EpochGroup]:
    """`epochs` epochs as passes; epoch e shows crop e, and after the last stored crop the first one again."""
    if not 1 <= crops_per_decode <= stored:
        raise UserError(
            f"crops_per_decode {crops_per_decode}: the store holds {stored} crops per image; use 1..{stored}"
        )
    return [
        EpochGroup(epoch=first, crops=tuple(e % stored for e in range(first, min(first + crops_per_decode, epochs))))
        for first in range(0, epochs, crops_per_decode)
    ]


def split(hashes: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows to train on and rows held out, both rising; images of equal content fall on the same side.

    hashes: (N, 16) uint8, the pack's content hashes. `share` of the rows (at least one, unless it is 0) is held out.
    """
    count = len(hashes)
    held = 0 if share == 0 else min(max(1, round(share * count)), count - 1)
    if held <= 0:
        return np.arange(count), np.arange(0)
    salt = np.random.Philox(key=seed).random_raw(2)
    cpu_group = np.ascontiguousarray(hashes).view("<u8") ^ salt
    score = cpu_group[:, 0] * np.uint64(0x9E3779B97F4A7C15) + cpu_group[:, 1]
    score ^= score >> np.uint64(29)
    is_held = score <= np.partition(score, held - 1)[held - 1]
    return np.flatnonzero(~is_held), np.flatnonzero(is_held)


class CropBatchSampler:
    """One pass's batches for one process; `start` anywhere below names the first batch that is wanted.

    images: (n,) rows to show. batch_size: crops per batch over all processes. windows: (n,) number of the window that
    holds each image's labels; images of a lower one come first. Raises UserError where the sizes cannot be met (a batch
    smaller than its crops, a group smaller than the number of processes).
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
        world: int = 1,
    ) -> None:
        self.epoch_group = group
        self._edges = _edges(len(images), batch_size, len(group.crops))
        self.steps = len(self._edges) - 1
        self._stride = _stride(mix_window, len(group.crops), self.steps)
        if int(np.diff(self._edges).min()) < world:
            raise UserError(f"batch_size {batch_size}: a batch has fewer images than the {world} processes; enlarge it")
        self._rows, self._windows, self._key = np.asarray(images), windows, [seed, group.epoch]
        self._rank, self._world = rank, world

    @cached_property
    def _images(self) -> np.ndarray:
        """The rows in their order; made when first asked for, since a long run has many passes."""
        # Raw Philox words are stable over numpy's versions, `permutation` is not promised to be.
        cpu_group = np.random.Philox(key=self._key).random_raw(len(self._rows))
        return self._rows[
            np.argsort(cpu_group, kind="stable") if self._windows is None else np.lexsort((cpu_group, self._windows))
        ]

    def size(self, step: int) -> int:
        """Crops in batch `step` over all processes."""
        return sum(int(self._edges[g + 1] - self._edges[g]) for g in self._groups(step))

    def samples(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """This process's share of batch `step`: (b,) rows and (b,) crop numbers, in the order of the pixels."""
        shares = [self._share(group) for group in self._groups(step)]
        crops = np.repeat(self.epoch_group.crops, [len(share) for share in shares])
        if self._stride == 0:  # One decoded group: the loader's own order, image by image.
            return np.repeat(shares[0], len(shares)), np.tile(self.epoch_group.crops, len(shares[0]))
        return np.concatenate(shares), crops

    def requests(self, cut: Cut, start: int = 0) -> Iterator[CropRequest]:
        """What to decode, in order; `cut` is asked for each request's boxes as its turn comes."""
        for _, groups in self._decodes(start):
            images = np.concatenate([self._share(group) for group in groups])
            boxes, flips = cut(images)
            crops = np.tile(np.array(self.epoch_group.crops, np.int64), (len(images), 1))
            yield CropRequest(images=images, crops=crops, boxes=boxes, flips=flips)

    def batches(self, decoded: Iterable[CropBatch], start: int = 0) -> Iterator[CropBatch]:
        """The batches start, start + 1, ... from what the loader made of `requests(..., start)`."""
        if self._stride == 0:
            yield from decoded
            return
        arrivals = iter(decoded)
        due = dict(self._decodes(start))
        held: dict[tuple[int, int], CropBatch] = {}
        for step in range(start, self.steps):
            if step in due:
                held |= self._taken_apart(next(arrivals), due[step], step)
            yield _joined([held.pop((group, j)) for j, group in enumerate(self._groups(step))])

    def _groups(self, step: int) -> list[int]:
        return [(step - j * self._stride) % self.steps for j in range(len(self.epoch_group.crops))]

    def _share(self, group: int) -> np.ndarray:
        first, size = int(self._edges[group]), int(self._edges[group + 1] - self._edges[group])
        return self._images[first + size * self._rank // self._world : first + size * (self._rank + 1) // self._world]

    def _decodes(self, start: int) -> Iterator[tuple[int, list[int]]]:
        """(step, groups that must be decoded for it) where there are any; a resume decodes again what was waiting."""
        seen: set[int] = set()
        for step in range(start, self.steps):
            new = [group for group in dict.fromkeys(self._groups(step)) if group not in seen]
            seen.update(new)
            if new:
                yield step, new

    def _taken_apart(self, batch: CropBatch, groups: list[int], step: int) -> dict[tuple[int, int], CropBatch]:
        """The decoded groups by (group, place of the crop), without crops whose batch is already past."""
        parts: dict[tuple[int, int], CropBatch] = {}
        count, first = len(self.epoch_group.crops), 0
        for group in groups:
            last = first + len(self._share(group)) * count
            for j in range(count):
                if (group + j * self._stride) % self.steps >= step:
                    parts[group, j] = _rows(batch, slice(first + j, last, count))
            first = last
        return parts


def _edges(images: int, batch_size: int, crops: int) -> np.ndarray:
    """Where groups begin and end: all of batch_size // crops images, the last two sharing what remains. One image that
    is left over after groups of two joins the last of them."""
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
    if not mix_window or crops == 1:
        return 0
    if mix_window < crops or steps < crops:
        raise UserError(
            f"mix_window {mix_window}: {crops} crops need a window of {crops} batches or more, and an epoch as long "
            f"(it has {steps}); enlarge it, lower batch_size, or set it to 0"
        )
    return min(mix_window, steps) // crops


def _rows(batch: CropBatch, rows: slice) -> CropBatch:
    """A copy, so that what has been used gives its memory back."""
    copies = {
        side: pixels.permute(0, 2, 3, 1)[rows].clone().permute(0, 3, 1, 2) for side, pixels in batch.pixels.items()
    }
    return CropBatch(pixels=copies, images=batch.images[rows], crops=batch.crops[rows])


def _joined(parts: list[CropBatch]) -> CropBatch:
    sides = parts[0].pixels
    return CropBatch(
        pixels={s: torch.cat([p.pixels[s].permute(0, 2, 3, 1) for p in parts]).permute(0, 3, 1, 2) for s in sides},
        images=torch.cat([p.images for p in parts]),
        crops=torch.cat([p.crops for p in parts]),
    )
