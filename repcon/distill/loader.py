"""The training data loader: decoded crops together with the labels that are stored for them."""

from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch

from repcon.config import LoaderKind
from repcon.decode.base import CropBatch, CropRequest
from repcon.decode.factory import open_loader
from repcon.distill.label_cache import CachedLabels, LabelCache, to_device
from repcon.distill.sampler import CropBatchSampler, EpochGroup, epoch_groups, split_train_validation
from repcon.distill.windowed_label_cache import WindowedLabelCache
from repcon.images.pack import ImagePack
from repcon.labels.store import LabelStore
from repcon.runtime.device import indexed, stream_context
from repcon.runtime.errors import UserError
from repcon.runtime.prefetch import Prefetcher

LabelSource = CachedLabels | WindowedLabelCache
"""Where crops' boxes and labels come from: all of them in memory, or windows that are read in turn."""
PREFETCH_BATCHES = 2
"""Batches that wait for the training step, besides the one that is being prepared."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """One step's data for this rank, on the device."""

    pixels: torch.Tensor
    """(B, 3, S, S) uint8, channels-last in memory; `models.preprocessing.normalise` makes floats of them."""
    labels: dict[str, tuple[torch.Tensor, torch.Tensor]]
    """Per head the stored labels of R >= B crops: (R, k) class ids by falling probability, uint16 or uint32, and
    (R, k + T) float16 log-probabilities and log-tails."""
    rows: torch.Tensor
    """(B,) int64: each crop's row of the labels."""
    images: torch.Tensor
    """(B,) int64 rows of the pack, on the CPU."""
    crops: torch.Tensor
    """(B,) int64 crop numbers, on the CPU."""
    total: int
    """Crops in this batch over all ranks."""

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        """Keep the tensors' GPU memory until the work that is queued on `stream` is done."""
        for tensor in (self.pixels, self.rows, *(table for pair in self.labels.values() for table in pair)):
            tensor.record_stream(stream)


class DistillLoader:
    """All batches of a training run, addressed by epoch group and batch number, so that a run can resume anywhere.

    heads: names among the store's, None for all. batch_size: crops over all `world_size` ranks.
    label_cache_gib: GiB for labels in this process; where two groups' labels take more, they are read in windows. With
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
        world_size: int = 1,
    ) -> None:
        store.require_pack(pack.fingerprint, len(pack))
        if label_cache_gib < 0:
            raise UserError(f"label_cache_gib {label_cache_gib}: give the GiB for labels, or 0 to hold them whole")
        self._size, self._device = size, indexed(device)
        self._batch_size, self._mix_window = batch_size, mix_window
        self.seed = seed
        self._rank, self._world_size = rank, world_size
        self.epoch_groups = epoch_groups(epochs, crops_per_decode, store.crops)
        train, validation = split_train_validation(pack.hashes, val_fraction, seed)
        heads = tuple(store.heads if heads is None else heads)
        missing = store.completion.missing_rows(heads)
        self.train_rows = np.setdiff1d(train, missing)
        self.validation_rows = np.setdiff1d(validation, missing)
        self.group_steps = self._count_steps()
        """Batches of each epoch group."""
        self._store, self._heads, self._label_bytes = store, heads, int(label_cache_gib * 2**30)
        self._label_cache = LabelCache(store, heads, self._device, shared=world_size > 1)
        self._validation_labels: CachedLabels | None = None
        self._loader = open_loader(loader, pack, (size,), num_workers=num_workers, device=str(self._device))
        self._copy_stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None

    @property
    def steps(self) -> int:
        """Batches of all epoch groups."""
        return sum(self.group_steps)

    def batches(self, group: int, start: int = 0) -> Generator[Batch]:
        """The batches of one epoch group from number `start` on, prefetched by a thread that ends with the loop."""
        with closing(self.groups(group, start, stop=group + 1)) as groups:
            for _, batches in groups:
                yield from batches

    def groups(
        self, group: int = 0, start: int = 0, *, stop: int | None = None
    ) -> Generator[tuple[int, Iterator[Batch]]]:
        """(number, batches) of the epoch groups from batch `start` of `group` on, up to group `stop`.

        All batches of a group must be consumed before the next group is requested. Prefetching continues from one
        group into the next; its thread ends with the loop over the groups.
        """
        stop = len(self.epoch_groups) if stop is None else stop
        while group < stop:
            last = group
            while last + 1 < stop and self._prefetches_into_next(last):
                last += 1
            with self._prefetch(self._prepare_groups(group, last + 1, start)) as batches:
                for number in range(group, last + 1):
                    of_group = islice(batches, self.group_steps[number] - start)
                    yield number, self._with_label_prefetch(number, of_group)
                    if next(of_group, None) is not None:
                        raise RuntimeError(f"epoch group {number} was left before its last batch")
                    start = 0
            group = last + 1

    def _prefetches_into_next(self, group: int) -> bool:
        """Whether one thread prepares this group and the next.

        Not where labels are read in windows: validation needs their memory in between. Nor if all batches of the next
        group can wait in the queue: the thread would then read a third group's labels.
        """
        return self._caches_with_next(group) and self.group_steps[group + 1] > PREFETCH_BATCHES

    def _prepare_groups(self, group: int, stop: int, start: int) -> Iterator[Batch]:
        for number in range(group, stop):
            epoch_group = self.epoch_groups[number]
            if self._uses_windows(epoch_group.crops):
                with closing(self._windows(epoch_group.crops, epoch_group.epoch)) as windows:
                    sampler = self._sampler(epoch_group, windows.window_numbers[self.train_rows])
                    yield from self._prepare_group(sampler, windows, start)
            else:
                labels = self._label_cache.get(epoch_group.crops)
                yield from self._prepare_group(self._sampler(epoch_group), labels, start)
            start = 0

    def _prepare_group(self, sampler: CropBatchSampler, labels: LabelSource, start: int) -> Iterator[Batch]:
        totals = (sampler.size(step) for step in range(start, sampler.steps))
        decoded = self._loader.batches(sampler.requests(labels.crop_boxes, start))
        return self._add_labels(sampler.batches(decoded, start), labels, totals)

    def _with_label_prefetch(self, group: int, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Read the next group's labels from the first batch on: those of the group before are not in use any more."""
        for batch in batches:
            if self._caches_with_next(group):
                self._label_cache.prefetch(self.epoch_groups[group + 1].crops)
            yield batch

    def _caches_with_next(self, group: int) -> bool:
        """Whether there is a next group, and the labels of both are cached whole."""
        pair = self.epoch_groups[group : group + 2]
        return len(pair) == 2 and not any(self._uses_windows(epoch_group.crops) for epoch_group in pair)

    def _uses_windows(self, crops: tuple[int, ...]) -> bool:
        if not self._label_bytes:
            return False
        return 2 * len(crops) * self._store.reader.crop_labels_bytes(self._heads) > self._label_bytes

    def _windows(self, crops: tuple[int, ...], epoch: int) -> WindowedLabelCache:
        seed = [self.seed, epoch]
        return WindowedLabelCache(self._store, self._heads, crops, seed=seed, memory_bytes=self._label_bytes)

    def _sampler(self, group: EpochGroup, windows: np.ndarray | None = None) -> CropBatchSampler:
        return CropBatchSampler(
            self.train_rows, group, seed=self.seed, batch_size=self._batch_size, mix_window=self._mix_window,
            windows=windows, rank=self._rank, world_size=self._world_size,
        )  # fmt: skip

    def _count_steps(self) -> list[int]:
        """Batches of each epoch group, which depend on its number of crops alone."""
        by_length = {len(group.crops): group for group in self.epoch_groups}
        steps = {length: self._sampler(group).steps for length, group in by_length.items()}
        return [steps[len(group.crops)] for group in self.epoch_groups]

    def validation_batches(self) -> Generator[Batch]:
        """This rank's part of the validation images, crop 0 of each; the prefetching thread ends with the loop."""
        if len(self.validation_rows):
            with self._prefetch(self._prepare_validation()) as batches:
                yield from batches

    def _prepare_validation(self) -> Iterator[Batch]:
        if not self._uses_windows((0,)) and self._validation_labels is None:
            self._validation_labels = self._label_cache.read((0,)).subset(self.validation_rows)
        rows, labels = self.validation_rows, self._validation_labels
        yield from self._prepare_first_crops(rows, labels, self._rank, self._world_size)

    def first_crops(self, images: np.ndarray) -> Generator[Batch]:
        """Crop 0 of these ascending rows of the pack, all for this rank; the prefetching thread ends with the loop."""
        with self._prefetch(self._prepare_first_crops(images, None, rank=0, world_size=1)) as batches:
            yield from batches

    def _prepare_first_crops(
        self, images: np.ndarray, labels: CachedLabels | None, rank: int, world_size: int
    ) -> Iterator[Batch]:
        """This rank's part of them. labels: those of these images; None reads them."""
        if labels is None and self._uses_windows((0,)):
            with closing(self._windows((0,), 0)) as windows:
                by_window = images[np.argsort(windows.window_numbers[images], kind="stable")]
                yield from self._prepare_in_order(windows, by_window[rank::world_size], world_size)
        else:
            labels = labels or self._label_cache.read((0,)).subset(images)
            yield from self._prepare_in_order(labels, images[rank::world_size], world_size)

    def _prepare_in_order(self, labels: LabelSource, images: np.ndarray, world_size: int) -> Iterator[Batch]:
        size = max(1, self._batch_size // world_size)
        chunks = [images[first : first + size] for first in range(0, len(images), size)]

        def requests() -> Iterator[CropRequest]:
            for chunk in chunks:
                boxes, flips = labels.crop_boxes(chunk)
                yield CropRequest(images=chunk, crops=np.zeros((len(chunk), 1), np.int64), boxes=boxes, flips=flips)

        return self._add_labels(self._loader.batches(requests()), labels, map(len, chunks))

    def _add_labels(self, batches: Iterator[CropBatch], labels: LabelSource, totals: Iterable[int]) -> Iterator[Batch]:
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

    @contextmanager
    def _prefetch(self, prepared: Iterator[Batch]) -> Iterator[Iterator[Batch]]:
        """The same batches, taken from `prepared` ahead of the training step by a thread that ends with the block.

        On a GPU the thread has a stream of its own, so that its copies overlap with the training step, and each batch
        is handed over to the stream that is current where it is used.
        """
        stream = self._copy_stream

        def copied() -> Iterator[tuple[Batch, torch.cuda.Event | torch.Event | None]]:
            with stream_context(stream):
                for batch in prepared:
                    yield batch, None if stream is None else stream.record_event()

        def handed_over(items: Iterable[tuple[Batch, torch.cuda.Event | torch.Event | None]]) -> Iterator[Batch]:
            for batch, event in items:
                if event is not None:
                    current = torch.cuda.current_stream(self._device)
                    current.wait_event(event)
                    batch.record_stream(current)
                yield batch

        with Prefetcher(copied(), PREFETCH_BATCHES) as items:
            yield handed_over(items)

    def close(self) -> None:
        """Stop the decoding and the reading of labels."""
        self._loader.close()
        self._label_cache.close()
