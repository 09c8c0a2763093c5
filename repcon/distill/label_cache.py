"""Stored labels in memory: whole slabs, beside the training step, from which batches are gathered."""

import dataclasses
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from repcon.distill.sampler import cut_of
from repcon.labels.store import LabelStore, LabelTable
from repcon.runtime.console import console
from repcon.runtime.errors import UserError

Pair = tuple[torch.Tensor, torch.Tensor]

GPU_SHARE = 0.2
"""Slabs lie in GPU memory while they take at most this share of what is free; else each batch's labels travel."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CachedLabels:
    """The labels of some crops of n images: crop place j of image place i is entry j * n + i."""

    crops: tuple[int, ...]
    images: np.ndarray
    """(n,) int64 rising rows of the pack."""
    boxes: list[np.ndarray]
    """Per crop of ALL the pack's N images (N, 4) uint16."""
    flips: list[np.ndarray]
    """Per crop of all images (N,) uint8."""
    heads: dict[str, Pair]
    """Per head (len(crops) * n, k) ids and (len(crops) * n, k + T) float16 values, on the CPU or on the device."""
    tables: LabelTable | None
    """Where they lie, if that is memory that other processes are to find while somebody holds it."""

    def gather(
        self, images: torch.Tensor, crops: torch.Tensor, device: torch.device
    ) -> tuple[torch.Tensor, dict[str, Pair]]:
        """(rows, labels) for these crops: the tables as they lie on the device, or a batch gathered for it."""
        rows = places_of(crops.numpy(), self.crops) * len(self.images) + np.searchsorted(self.images, images.numpy())
        resident = all(ids.device == device for ids, _ in self.heads.values())
        if resident:
            return to_device(torch.from_numpy(rows), device), self.heads
        gathered = {
            name: (_taken(ids, rows, device), _taken(values, rows, device))
            for name, (ids, values) in self.heads.items()
        }
        return torch.arange(len(rows), device=device), gathered

    def crop_boxes(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Boxes (n, c, 4) and flips (n, c) of these images."""
        return cut_of(self.boxes, self.flips)(images)

    def subset(self, images: np.ndarray) -> "CachedLabels":
        """Those of one crop for some rising rows: a small table of its own, that may be kept."""
        assert len(self.crops) == 1
        places = np.searchsorted(self.images, images)
        heads = {
            name: (_taken(ids, places, ids.device), _taken(values, places, ids.device))
            for name, (ids, values) in self.heads.items()
        }
        boxes, flips = [self.boxes[0].copy()], [self.flips[0].copy()]
        return dataclasses.replace(self, images=images, boxes=boxes, flips=flips, heads=heads, tables=None)


def places_of(crops: np.ndarray, held: Sequence[int]) -> np.ndarray:
    """Where each of the (b,) crop numbers stands among those held, which may be in any order."""
    numbers = np.array(held)
    order = np.argsort(numbers)
    return order[np.searchsorted(numbers, crops, sorter=order)]


class LabelCache:
    """Reads labels, keeps those in use, and reads the next ones in a thread meanwhile.

    shared: one copy for all processes of this machine that ask for the same; said and done without where there is no
    shared memory for it.
    """

    def __init__(self, store: LabelStore, heads: tuple[str, ...], device: torch.device, *, shared: bool) -> None:
        self._store, self._heads, self._device, self._shared = store, heads, device, shared
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="repcon-labels")
        self._lock = threading.Lock()
        self._held: CachedLabels | None = None
        self._next: tuple[tuple[int, ...], Future[CachedLabels]] | None = None

    def get(self, crops: tuple[int, ...]) -> CachedLabels:
        """The labels of these crop numbers. Raises UserError where the store is damaged or not finished."""
        with self._lock:
            if self._held is not None and self._held.crops == crops:
                return self._held
            future = self._fetched(crops)
        try:
            labels = future.result()
        except BaseException:
            with self._lock:
                self._next = None  # so that asking again reads again
            raise
        with self._lock:
            self._held, self._next = labels, None
        return labels

    def fetch(self, crops: tuple[int, ...]) -> None:
        """Begins to read, unless it has begun or is held."""
        with self._lock:
            if self._held is None or self._held.crops != crops:
                self._fetched(crops)

    def _fetched(self, crops: tuple[int, ...]) -> Future[CachedLabels]:
        if self._next is None or self._next[0] != crops:
            self._next = (crops, self._pool.submit(self.read, crops))
        return self._next[1]

    def close(self) -> None:
        """Ends the thread."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def read(self, crops: Sequence[int]) -> CachedLabels:
        """Decodes each slab straight into its part of one table per head."""
        tables = self._tables(crops)
        slabs = [tables.crop_labels(place) for place in range(len(crops))]
        heads = {name: (torch.from_numpy(ids), torch.from_numpy(logp)) for name, (ids, logp) in tables.labels.items()}
        return CachedLabels(
            crops=tuple(crops),
            images=np.arange(self._store.images),
            boxes=[crop_labels.boxes for crop_labels in slabs],
            flips=[crop_labels.flips for crop_labels in slabs],
            heads=self._placed(heads),
            tables=tables if self._shared else None,
        )

    def _tables(self, crops: Sequence[int]) -> LabelTable:
        if self._shared:
            try:
                return self._store.reader.table(crops, self._heads, shared=True)
            except (OSError, UserError) as error:
                console.print(f"labels: not shared, each process reads its own ({error})", markup=False)
                self._shared = False
        return self._store.reader.table(crops, self._heads)

    def _placed(self, heads: dict[str, Pair]) -> dict[str, Pair]:
        """On the GPU where they fit, so that the loss gathers there by row number."""
        if self._device.type != "cuda":
            return heads
        size = sum(tensor.nbytes for pair in heads.values() for tensor in pair)
        if size > GPU_SHARE * torch.cuda.mem_get_info(self._device)[0]:
            return heads
        return {name: (ids.to(self._device), values.to(self._device)) for name, (ids, values) in heads.items()}


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy to a GPU that the CPU does not wait for; the tensor itself where it is there already."""
    if tensor.device.type == device.type or device.type == "cpu":
        return tensor
    return (tensor if tensor.is_pinned() else tensor.pin_memory()).to(device, non_blocking=True)


def _taken(table: torch.Tensor, rows: np.ndarray, device: torch.device) -> torch.Tensor:
    return to_device(torch.from_numpy(table.cpu().numpy()[rows]), device)
