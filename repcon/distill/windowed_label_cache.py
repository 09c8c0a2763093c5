"""Stored labels in windows of images, for stores of which two crop numbers do not fit into the label memory.

The images of an epoch group come window by window (`distill.sampler`). A batch's labels are copied out of their window
when its images are sent to the decoder and wait for the pixels, so that windows are read once, one after the other.
"""

import threading
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from repcon.distill.label_cache import LabelPair, crop_indices, to_device
from repcon.labels.store import LabelStore

MAX_WINDOWS = 3
"""Windows in memory."""

Arrays = list[np.ndarray]
"""Boxes, flips, then ids and values of each head; each (c, n, ...) for c crops of n images."""


@dataclass(slots=True, kw_only=True)
class _PendingLabels:
    """Labels of one request's images, waiting for their pixels."""

    images: np.ndarray
    """(n,) ascending rows of the pack."""
    arrays: Arrays
    """As `Arrays`, without boxes and flips."""
    remaining: int
    """Crops that no batch has had yet."""


class WindowedLabelCache:
    """Labels of one epoch group's crops, read in windows.

    Call `crop_boxes` for images in the order of decoding, `gather` for those of each batch.

    Up to three windows are in memory: the current one, the one before it (where the crops of an image are spread over
    batches, the first batches also hold images of the last window), and the next one, which a thread reads. Together
    they stay within `memory_bytes`, if three single shards do. seed: one or two integers.
    """

    def __init__(
        self, store: LabelStore, heads: tuple[str, ...], crops: tuple[int, ...], *, seed: list[int], memory_bytes: int
    ) -> None:
        self._store, self._heads, self._crops = store, heads, crops
        plan_bytes = memory_bytes * 2 // MAX_WINDOWS  # `window_plan` counts two windows.
        self.window_numbers = np.empty(store.images, np.int32)
        """(N,) the window that holds each image."""
        self._count = 0
        for rows in store.reader.window_plan(crops, heads, seed=seed, memory_bytes=plan_bytes):
            self.window_numbers[rows] = self._count
            self._count += 1
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="repcon-windows")
        self._windows: OrderedDict[int, Future[tuple[np.ndarray, Arrays]]] = OrderedDict()
        self._pending: list[_PendingLabels] = []
        self._lock = threading.Lock()

    def crop_boxes(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Boxes (n, c, 4) and flips (n, c) of these images, whose labels are kept until `gather` has returned them."""
        rows, inverse = np.unique(images, return_inverse=True)
        boxes, flips, *labels = self._read_images(rows)
        pending = _PendingLabels(images=rows, arrays=labels, remaining=len(rows) * len(self._crops))
        with self._lock:
            self._pending.append(pending)
        return boxes[:, inverse].swapaxes(0, 1), flips[:, inverse].T

    def gather(
        self, images: torch.Tensor, crops: torch.Tensor, device: torch.device
    ) -> tuple[torch.Tensor, dict[str, LabelPair]]:
        """(rows, labels) of these crops, as `CachedLabels.gather` gives them.

        Raises RuntimeError where `crop_boxes` has not been called for one of the images.
        """
        with self._lock:
            pending = list(self._pending)
        rows, crop_index = images.numpy(), crop_indices(crops.numpy(), self._crops)
        places = [np.flatnonzero(np.isin(rows, part.images)) for part in pending]
        if missing := len(rows) - sum(map(len, places)):
            raise RuntimeError(f"{missing} crops of a batch have no labels: call crop_boxes for them first")
        out = [np.empty((len(rows), *array.shape[2:]), array.dtype) for array in pending[0].arrays]
        for part, here in zip(pending, places, strict=True):
            image_index = np.searchsorted(part.images, rows[here])
            for target, array in zip(out, part.arrays, strict=True):
                target[here] = array[crop_index[here], image_index]
            part.remaining -= len(here)
        with self._lock:
            self._pending = [part for part in self._pending if part.remaining]
        tensors = [to_device(torch.from_numpy(array), device) for array in out]
        pairs = zip(tensors[::2], tensors[1::2], strict=True)
        return torch.arange(len(rows), device=device), dict(zip(self._heads, pairs, strict=True))

    def close(self) -> None:
        """End the thread."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _read_images(self, images: np.ndarray) -> Arrays:
        """The arrays of ascending rows of the pack, out of their windows."""
        numbers = self.window_numbers[images]
        out: Arrays = []
        for number in np.unique(numbers):
            here = np.flatnonzero(numbers == number)
            rows, window = self._window(int(number))
            index = np.searchsorted(rows, images[here])
            out = out or [np.empty((len(array), len(images), *array.shape[2:]), array.dtype) for array in window]
            for target, array in zip(out, window, strict=True):
                target[:, here] = array[:, index]
        return out

    def _window(self, number: int) -> tuple[np.ndarray, Arrays]:
        """A window's rows and arrays; starts to read the next window."""
        self._load(number)
        window = self._windows[number].result()
        if number + 1 < self._count:
            self._load(number + 1)
            self._windows.move_to_end(number)
        return window

    def _load(self, number: int) -> None:
        """Start to read a window that is not in memory, in place of the least recently used one."""
        if number not in self._windows:
            while len(self._windows) >= MAX_WINDOWS:
                self._windows.popitem(last=False)[1].cancel()
            self._windows[number] = self._pool.submit(self._read_window, number)
        self._windows.move_to_end(number)

    def _read_window(self, number: int) -> tuple[np.ndarray, Arrays]:
        """The window's ascending rows, and their arrays."""
        rows = np.flatnonzero(self.window_numbers == number)
        tables = self._store.reader.window(self._crops, rows, self._heads)
        labels = [array for name in self._heads for array in tables.labels[name]]
        shape = (len(self._crops), len(rows))
        return rows, [array.reshape(*shape, *array.shape[1:]) for array in (tables.boxes, tables.flips, *labels)]
