"""The way from pack and store to the training step: decoded crops with the labels that were stored for them."""

import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

import numpy as np
import torch

from repcon.config import LoaderKind
from repcon.decode.base import CropBatch, CropRequest
from repcon.decode.factory import open_loader
from repcon.distill.label_cache import CachedLabels, LabelCache, to_device
from repcon.distill.sampler import CropBatchSampler, EpochGroup, epoch_groups, split
from repcon.distill.windowed_label_cache import WindowedLabelCache
from repcon.images.pack import ImagePack
from repcon.labels.store import LabelStore
from repcon.runtime.device import indexed, stream_context
from repcon.runtime.errors import UserError
from repcon.runtime.prefetch import Prefetcher

Item = TypeVar("Item")

AHEAD = 2
"""Batches that wait for the training step, beside the one that their thread holds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """One step's data for this process, on the device."""

    pixels: torch.Tensor
    """(B, 3, S, S) uint8, channels-last in memory; `backbone.normalise` makes floats of them."""
    labels: dict[str, tuple[torch.Tensor, torch.Tensor]]
    """Per head the stored labels of R >= B crops: (R, k) class ids by falling probability, uint16 or uint32, and
    (R, k + T) float16 log-probabilities and log-tails."""
    rows: torch.Tensor
    """(B,) int64: which of the R each crop's labels are."""
    images: torch.Tensor
    """(B,) int64 rows of the pack, on the CPU."""
    crops: torch.Tensor
    """(B,) int64 crop numbers, on the CPU."""
    total: int
    """Crops in this batch over all processes."""


class DistillLoader:
    """All batches of a training run, by pass and by batch number, so that a run can go on anywhere.

    heads: names out of the store's, None for all. Over `world` processes `batch_size` is the sum of their shares.
    label_cache_gib: GiB for labels in this process; where two passes' labels take more, they are read in windows. With
    0 they are held whole, one copy for all processes of a machine.
    Raises UserError where pack and store do not belong together or the sizes cannot be met.
    """

    def __init__(
        self,
        pack: ImagePack,
        store: LabelStore,
        *,
        size: int,
        batch_size: int,
        epochs: int,
        heads: Sequence[str] | None = None,
        crops_per_decode: int = 1,
        mix_window: int = 0,
        val_fraction: float = 0.0,
        label_cache_gib: float = 0.0,
        seed: int = 0,
        loader: LoaderKind = "auto",
        num_workers: int = 0,
        device: torch.device | str = "cpu",
        rank: int = 0,
        world: int = 1,
    ) -> None:
        store.require_pack(pack.fingerprint, len(pack))
        if label_cache_gib < 0:
            raise UserError(f"label_cache_gib {label_cache_gib}: give the GiB for labels, or 0 to hold them whole")
        self._size, self._device = size, indexed(device)
        self._batch_size, self._mix_window = batch_size, mix_window
        self.seed = seed
        self._rank, self._world = rank, world
        self.epoch_groups = epoch_groups(epochs, crops_per_decode, store.crops)
        train, held = split(pack.hashes, val_fraction, seed)
        names = tuple(store.heads if heads is None else heads)
        missing = store.completion.missing_rows(names)
        self.rows = np.setdiff1d(train, missing)
        self.held = np.setdiff1d(held, missing)
        alike = {len(part.crops): part for part in self.epoch_groups}
        steps = {crops: self._order(part).steps for crops, part in alike.items()}
        self.lengths = [steps[len(part.crops)] for part in self.epoch_groups]
        """Batches of each pass."""
        self._store, self._names, self._label_bytes = store, names, int(label_cache_gib * 2**30)
        self._label_cache = LabelCache(store, names, self._device, shared=world > 1)
        self._held_labels: CachedLabels | None = None
        self._loader = open_loader(loader, pack, (size,), num_workers=num_workers, device=str(self._device))
        # On a stream of their own, copies to a GPU go on beside the training step.
        self._stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None

    @property
    def steps(self) -> int:
        """Batches of all passes."""
        return sum(self.lengths)

    def batches(self, part: int, start: int = 0) -> Generator[Batch]:
        """The batches of pass `part` from number `start` on, prepared by a thread up to two ahead; it ends with the
        loop over them."""
        with closing(self.run(part, start, stop=part + 1)) as epoch_groups:
            for _, batches in epoch_groups:
                yield from batches

    def run(self, part: int = 0, start: int = 0, *, stop: int | None = None) -> Generator[tuple[int, Iterator[Batch]]]:
        """The passes from batch `start` of pass `part` on (up to pass `stop`), each with its batches, all of which must
        be taken before the next pass is asked for.

        As `batches` of one after the other, but the thread does not stop where a pass ends: the next one begins with
        batches that are there. It ends with the loop over the passes.
        """
        stop = len(self.epoch_groups) if stop is None else stop
        while part < stop:
            after = part + 1
            while after < stop and self._flows(after - 1):
                after += 1
            with Prefetcher(_marked(self._prepared(part, start, after), self._stream), AHEAD) as items:
                held = iter(items)
                for number in range(part, after):
                    mine = islice(held, self.lengths[number] - start)
                    yield number, self._of_pass(number, mine)
                    if next(mine, None) is not None:
                        raise RuntimeError(f"pass {number} was left before its last batch")
                    start = 0
            part = after

    def _flows(self, part: int) -> bool:
        """Whether pass `part` goes over into the next one in one thread.

        Not where labels are read in windows: in between, validation needs their memory. Nor into a pass so short that
        all its batches can wait: the thread would read a third pass's labels.
        """
        return self._whole(part) and self.lengths[part + 1] > AHEAD

    def _prepared(self, part: int, start: int, stop: int) -> Iterator[Batch]:
        """All batches of these passes, one after the other."""
        for number in range(part, stop):
            passed = self.epoch_groups[number]
            if self._in_windows(passed.crops):
                yield from self._through_windows(passed, start)
            else:
                yield from self._ordered(self._order(passed), self._label_cache.get(passed.crops), start)
            start = 0

    def _of_pass(self, part: int, items: Iterator[tuple[Batch, torch.cuda.Event | None]]) -> Iterator[Batch]:
        for batch in self._handed(items):
            if self._whole(part):  # From here on nothing of the pass before is in use: there is room.
                self._label_cache.fetch(self.epoch_groups[part + 1].crops)
            yield batch

    def _whole(self, part: int) -> bool:
        """Whether pass `part` has a next one, and the labels of both are held whole."""
        around = self.epoch_groups[part : part + 2]
        return len(around) == 2 and not any(self._in_windows(passed.crops) for passed in around)

    def _in_windows(self, crops: tuple[int, ...]) -> bool:
        return (
            bool(self._label_bytes)
            and 2 * len(crops) * self._store.reader.crop_labels_bytes(self._names) > self._label_bytes
        )

    def _through_windows(self, passed: EpochGroup, start: int) -> Iterator[Batch]:
        seed = [self.seed, passed.epoch]
        labels = WindowedLabelCache(self._store, self._names, passed.crops, seed=seed, memory_bytes=self._label_bytes)
        with closing(labels):
            yield from self._ordered(self._order(passed, labels.numbers[self.rows]), labels, start)

    def _ordered(
        self, order: CropBatchSampler, labels: CachedLabels | WindowedLabelCache, start: int
    ) -> Iterator[Batch]:
        totals = (order.size(step) for step in range(start, order.steps))
        decoded = self._loader.batches(order.requests(labels.crop_boxes, start))
        return self._labelled(order.batches(decoded, start), labels, totals)

    def _order(self, part: EpochGroup, windows: np.ndarray | None = None) -> CropBatchSampler:
        return CropBatchSampler(
            self.rows, part, seed=self.seed, batch_size=self._batch_size, mix_window=self._mix_window,
            windows=windows, rank=self._rank, world=self._world,
        )  # fmt: skip

    def held_out(self) -> Generator[Batch]:
        """This process's share of the held-out images, crop 0 of each; the thread that prepares them ends with the loop
        over them."""
        with Prefetcher(_marked(self._held_out(), self._stream), AHEAD) as items:
            yield from self._handed(iter(items))

    def _held_out(self) -> Iterator[Batch]:
        if not len(self.held):
            return
        if not self._in_windows((0,)) and self._held_labels is None:
            self._held_labels = self._label_cache.read((0,)).subset(self.held)
        yield from self._first_crops(self.held, self._held_labels, self._rank, self._world)

    def first_crops(self, images: np.ndarray) -> Generator[Batch]:
        """Crop 0 of these rising rows of the pack, for this process alone; the thread that prepares them ends with the
        loop over them."""
        with Prefetcher(_marked(self._first_crops(images, None, 0, 1), self._stream), AHEAD) as items:
            yield from self._handed(iter(items))

    def _first_crops(self, images: np.ndarray, labels: CachedLabels | None, rank: int, world: int) -> Iterator[Batch]:
        """This process's share of them, with these labels or, without any, with what is read for them."""
        if labels is None and self._in_windows((0,)):
            windows = WindowedLabelCache(
                self._store, self._names, (0,), seed=[self.seed, 0], memory_bytes=self._label_bytes
            )
            with closing(windows):
                ordered = images[np.argsort(windows.numbers[images], kind="stable")]
                yield from self._cropped(windows, ordered, rank, world)
            return
        yield from self._cropped(labels or self._label_cache.read((0,)).subset(images), images, rank, world)

    def _cropped(
        self, labels: CachedLabels | WindowedLabelCache, images: np.ndarray, rank: int, world: int
    ) -> Iterator[Batch]:
        size = max(1, self._batch_size // world)
        mine = images[rank::world]
        shares = [mine[first : first + size] for first in range(0, len(mine), size)]

        def requests() -> Iterator[CropRequest]:
            for share in shares:
                boxes, flips = labels.crop_boxes(share)
                yield CropRequest(images=share, crops=np.zeros((len(share), 1), np.int64), boxes=boxes, flips=flips)

        return self._labelled(self._loader.batches(requests()), labels, map(len, shares))

    def _handed(self, items: Iterator[tuple[Batch, torch.cuda.Event | None]]) -> Iterator[Batch]:
        """The batches, for the caller's stream."""
        for batch, whole in items:
            if whole is not None:
                _hand_over(batch, whole, torch.cuda.current_stream(self._device))
            yield batch

    def close(self) -> None:
        """Stops the loader's workers and the reading of labels."""
        self._loader.close()
        self._label_cache.close()

    def _labelled(
        self, batches: Iterator[CropBatch], labels: CachedLabels | WindowedLabelCache, totals: Iterable[int]
    ) -> Iterator[Batch]:
        for batch, total in zip(batches, totals, strict=True):
            rows, stored = labels.gather(batch.images, batch.crops, self._device)
            yield Batch(
                pixels=to_device(batch.pixels[self._size], self._device),
                labels=stored,
                rows=rows,
                images=batch.images,
                crops=batch.crops,
                total=total,
            )


def _marked(
    batches: Iterator[Batch], stream: torch.cuda.Stream | None
) -> Iterator[tuple[Batch, torch.cuda.Event | None]]:
    """Each batch, copied to a GPU on its stream, and the point in this from which on it lies there whole."""
    with stream_context(stream):
        for batch in batches:
            whole = None
            if stream is not None:
                whole = torch.cuda.Event()
                whole.record(stream)
            yield batch, whole


def _hand_over(batch: Batch, whole: torch.cuda.Event, stream: torch.cuda.Stream) -> None:
    """Has the stream wait for the batch, and its memory for the stream."""
    stream.wait_event(whole)
    for tensor in (batch.pixels, batch.rows, *(table for pair in batch.labels.values() for table in pair)):
        tensor.record_stream(stream)


class Clock:
    """Time spent waiting for data and time spent on the rest, since the last `take`."""

    def __init__(self) -> None:
        self._data = self._step = 0.0
        self._since = time.perf_counter()

    def timed(self, batches: Iterator[Item]) -> Iterator[Item]:
        """Passes items on; what the consumer does with one counts as its step."""
        self._since = time.perf_counter()
        while True:
            item = next(batches, None)
            self._data += self._lap()
            if item is None:
                return
            yield item
            self._step += self._lap()

    def take(self) -> tuple[float, float]:
        """(data_seconds, step_seconds) so far, asked for between two steps or in one; both start again at zero."""
        self._step += self._lap()
        spent = (self._data, self._step)
        self._data = self._step = 0.0
        return spent

    def _lap(self) -> float:
        before, self._since = self._since, time.perf_counter()
        return self._since - before
