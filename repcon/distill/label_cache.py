"""Stored labels in memory: whole crop numbers, read ahead by a thread, from which batches are gathered."""

import dataclasses
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from repcon.distill.sampler import box_lookup
from repcon.labels.store import CropLabels, LabelStore
from repcon.runtime.console import print_plain
from repcon.runtime.errors import UserError

LabelPair = tuple[torch.Tensor, torch.Tensor]
"""One head's class ids (R, k), and its log-probabilities with the log-tails (R, k + T)."""

GPU_MEMORY_FRACTION = 0.2
"""Labels lie in GPU memory while they take at most this fraction of what is free; else each batch's are copied."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CachedLabels:
    """The labels of c crops of n images: crop index j of image index i is row j * n + i."""

    crops: tuple[int, ...]
    images: np.ndarray
    """(n,) int64 ascending rows of the pack."""
    boxes: list[np.ndarray]
    """Per crop, for ALL N images of the pack, (N, 4) uint16."""
    flips: list[np.ndarray]
    """Per crop, for all N images, (N,) uint8."""
    heads: dict[str, LabelPair]
    """Per head (c * n, k) ids and (c * n, k + T) float16 values, on the CPU or on the device."""
    tables: CropLabels | None
    """The owner of the shared memory that the arrays view; kept so that other processes can attach to it."""

    def gather(
        self, images: torch.Tensor, crops: torch.Tensor, device: torch.device
    ) -> tuple[torch.Tensor, dict[str, LabelPair]]:
        """(rows, labels) for (b,) images and crops: all labels if they are on the device, else a copy of b rows."""
        rows = crop_indices(crops.numpy(), self.crops) * len(self.images) + np.searchsorted(self.images, images.numpy())
        if all(ids.device == device for ids, _ in self.heads.values()):
            return to_device(torch.from_numpy(rows), device), self.heads
        return torch.arange(len(rows), device=device), self._take(rows, device)

    def crop_boxes(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Boxes (n, c, 4) and flips (n, c) of these images."""
        return box_lookup(self.boxes, self.flips)(images)

    def subset(self, images: np.ndarray) -> "CachedLabels":
        """A copy for some ascending rows of the pack; for labels of one crop."""
        assert len(self.crops) == 1
        device = next(ids.device for ids, _ in self.heads.values())
        heads = self._take(np.searchsorted(self.images, images), device)
        boxes, flips = [self.boxes[0].copy()], [self.flips[0].copy()]
        return dataclasses.replace(self, images=images, boxes=boxes, flips=flips, heads=heads, tables=None)

    def _take(self, rows: np.ndarray, device: torch.device) -> dict[str, LabelPair]:
        return {
            name: (take_rows(ids, rows, device), take_rows(values, rows, device))
            for name, (ids, values) in self.heads.items()
        }


def crop_indices(crops: np.ndarray, cached: Sequence[int]) -> np.ndarray:
    """The index of each of the (b,) crop numbers in `cached`, which may be in any order."""
    numbers = np.array(cached)
    order = np.argsort(numbers)
    return order[np.searchsorted(numbers, crops, sorter=order)]


class LabelCache:
    """Reads labels, keeps the current ones, and reads the next ones in a thread.

    shared: one copy for all processes of this machine that read the same labels; where there is no shared memory for
    it, a line says so and each process reads its own.
    """

    def __init__(self, store: LabelStore, heads: tuple[str, ...], device: torch.device, *, shared: bool) -> None:
        self._store, self._heads, self._device, self._shared = store, heads, device, shared
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="repcon-labels")
        self._lock = threading.Lock()
        self._current: CachedLabels | None = None
        self._next: tuple[tuple[int, ...], Future[CachedLabels]] | None = None

    def get(self, crops: tuple[int, ...]) -> CachedLabels:
        """The labels of these crop numbers. Raises UserError where the store is damaged or not finished."""
        with self._lock:
            if self._current is not None and self._current.crops == crops:
                return self._current
            future = self._load(crops)
        try:
            labels = future.result()
        except BaseException:
            with self._lock:
                self._next = None  # so that the next call reads again
            raise
        with self._lock:
            self._current, self._next = labels, None
        return labels

    def prefetch(self, crops: tuple[int, ...]) -> None:
        """Start an asynchronous read, unless the labels are cached or being read."""
        with self._lock:
            if self._current is None or self._current.crops != crops:
                self._load(crops)

    def _load(self, crops: tuple[int, ...]) -> Future[CachedLabels]:
        if self._next is None or self._next[0] != crops:
            self._next = (crops, self._pool.submit(self.read, crops))
        return self._next[1]

    def close(self) -> None:
        """End the thread."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def read(self, crops: Sequence[int]) -> CachedLabels:
        """Read the labels without caching them."""
        tables = self._tables(crops)
        parts = [tables.of_crop(index) for index in range(len(crops))]
        heads = {name: (torch.from_numpy(ids), torch.from_numpy(logp)) for name, (ids, logp) in tables.labels.items()}
        return CachedLabels(
            crops=tuple(crops),
            images=np.arange(self._store.images),
            boxes=[part.boxes for part in parts],
            flips=[part.flips for part in parts],
            heads=self._to_gpu_if_small(heads),
            tables=tables if self._shared else None,
        )

    def _tables(self, crops: Sequence[int]) -> CropLabels:
        if self._shared:
            try:
                return self._store.reader.table(crops, self._heads, shared=True)
            except (OSError, UserError) as error:
                print_plain(f"labels: not shared, each process reads its own ({error})")
                self._shared = False
        return self._store.reader.table(crops, self._heads)

    def _to_gpu_if_small(self, heads: dict[str, LabelPair]) -> dict[str, LabelPair]:
        """On a GPU with enough memory, so that the loss gathers there by row number."""
        if self._device.type != "cuda":
            return heads
        size = sum(tensor.nbytes for pair in heads.values() for tensor in pair)
        if size > GPU_MEMORY_FRACTION * torch.cuda.mem_get_info(self._device)[0]:
            return heads
        return {name: (ids.to(self._device), values.to(self._device)) for name, (ids, values) in heads.items()}


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy to a GPU without blocking the CPU; the tensor itself where it is already there."""
    if tensor.device.type == device.type or device.type == "cpu":
        return tensor
    return (tensor if tensor.is_pinned() else tensor.pin_memory()).to(device, non_blocking=True)


def take_rows(table: torch.Tensor, rows: np.ndarray, device: torch.device) -> torch.Tensor:
    """A copy of some rows on the device; torch itself does not index tensors of all unsigned dtypes."""
    return to_device(torch.from_numpy(table.cpu().numpy()[rows]), device)
