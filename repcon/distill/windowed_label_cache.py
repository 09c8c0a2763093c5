"""Stored labels in windows: for a store of which not even two slabs fit in the memory that labels may take.

A pass's images come window by window (`distill/sampler.py`). What a batch needs is copied out of its window when its
images are sent to the loader and waits there for their pixels, so that windows are read once, one after the other.
"""

import threading
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from repcon.distill.label_cache import Pair, places_of, to_device
from repcon.labels.store import LabelStore

HELD = 3
"""Windows in memory."""

Arrays = list[np.ndarray]
"""Boxes, flips, then ids and values of each head; each (c, n, ...) for c crops of n images."""


@dataclass(slots=True, kw_only=True)
class _Chunk:
    """Labels of one request's images, waiting for their pixels."""

    images: np.ndarray
    """(n,) rising rows of the pack."""
    arrays: Arrays
    """As of `Arrays`, without boxes and flips."""
    left: int
    """Crops that no batch has had yet."""


class WindowedLabelCache:
    """Labels of one pass's crops, read in windows.

    Call `crop_boxes` for images in the order of decoding, `gather` for those of each batch.

    Up to three windows are in memory: the one in use, the one before it (where the crops of an image are spread over
    batches, the first batches also hold images of the last window), and the next one, which a thread reads. Together
    they stay within `memory_bytes`, if three single shards do. seed: one or two integers.
    """

    def __init__(
        self, store: LabelStore, heads: tuple[str, ...], crops: tuple[int, ...], *, seed: list[int], memory_bytes: int
    ) -> None:
        self._store, self._heads, self._crops = store, heads, crops
        share = memory_bytes * 2 // HELD  # The plan is made for two.
        self.numbers = np.empty(store.images, np.int32)
        """(N,) the window that holds each image."""
        self._count = 0
        for rows in store.reader.window_plan(crops, heads, seed=seed, memory_bytes=share):
            self.numbers[rows] = self._count
            self._count += 1
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="repcon-windows")
        self._held: OrderedDict[int, Future[tuple[np.ndarray, Arrays]]] = OrderedDict()
        self._chunks: list[_Chunk] = []
        self._lock = threading.Lock()

    def crop_boxes(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Boxes (n, c, 4) and flips (n, c) of these images, whose labels are kept until `gather` has given them all."""
        rising, places = np.unique(images, return_inverse=True)
        boxes, flips, *labels = self._gathered(rising)
        with self._lock:
            self._chunks.append(_Chunk(images=rising, arrays=labels, left=len(rising) * len(self._crops)))
        return boxes[:, places].swapaxes(0, 1), flips[:, places].T

    def gather(
        self, images: torch.Tensor, crops: torch.Tensor, device: torch.device
    ) -> tuple[torch.Tensor, dict[str, Pair]]:
        """(rows, labels) of these crops, as `CachedLabels.gather` gives them.

        Raises RuntimeError where `crop_boxes` has not been called for one of the images.
        """
        with self._lock:
            chunks = list(self._chunks)
        wanted, numbers = images.numpy(), places_of(crops.numpy(), self._crops)
        out = [np.empty((len(wanted), *array.shape[2:]), array.dtype) for array in chunks[0].arrays]
        found = 0
        for chunk in chunks:
            at = np.flatnonzero(np.isin(wanted, chunk.images))
            places = np.searchsorted(chunk.images, wanted[at])
            for target, array in zip(out, chunk.arrays, strict=True):
                target[at] = array[numbers[at], places]
            chunk.left -= len(at)
            found += len(at)
        if found != len(wanted):
            raise RuntimeError(f"{len(wanted) - found} crops of a batch have no labels: they were never asked for")
        with self._lock:
            self._chunks = [chunk for chunk in self._chunks if chunk.left]
        tensors = [to_device(torch.from_numpy(array), device) for array in out]
        pairs = zip(tensors[::2], tensors[1::2], strict=True)
        return torch.arange(len(wanted), device=device), dict(zip(self._heads, pairs, strict=True))

    def close(self) -> None:
        """Ends the thread."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _gathered(self, images: np.ndarray) -> Arrays:
        numbers = self.numbers[images]
        out: Arrays = []
        for number in np.unique(numbers):
            at = np.flatnonzero(numbers == number)
            rows, window = self._window(int(number))
            places = np.searchsorted(rows, images[at])
            out = out or [np.empty((len(array), len(images), *array.shape[2:]), array.dtype) for array in window]
            for target, array in zip(out, window, strict=True):
                target[:, at] = array[:, places]
        return out

    def _window(self, number: int) -> tuple[np.ndarray, Arrays]:
        self._fetch(number)
        window = self._held[number].result()
        if number + 1 < self._count:
            self._fetch(number + 1)
            self._held.move_to_end(number)
        return window

    def _fetch(self, number: int) -> None:
        """Begins to read unless it is held; the least recently used of three makes room."""
        if number not in self._held:
            while len(self._held) >= HELD:
                self._held.popitem(last=False)[1].cancel()
            self._held[number] = self._pool.submit(self._read, number)
        self._held.move_to_end(number)

    def _read(self, number: int) -> tuple[np.ndarray, Arrays]:
        """The window's rising rows, and what is stored for them."""
        rows = np.flatnonzero(self.numbers == number)
        tables = self._store.reader.window(self._crops, rows, self._heads)
        labels = [array for name in self._heads for array in tables.labels[name]]
        shape = (len(self._crops), len(rows))
        return rows, [array.reshape(*shape, *array.shape[1:]) for array in (tables.boxes, tables.flips, *labels)]
