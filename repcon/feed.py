"""The way from pack and store to the training step: decoded crops with the labels that were stored for them."""

import queue
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch

from repcon.config import LoaderKind
from repcon.errors import UserError
from repcon.images import Pack
from repcon.loaders import CropBatch, Request, open_loader
from repcon.loaders.order import Order, passes, split
from repcon.store import LabelStore

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """One step's data for this process, on the device."""

    pixels: torch.Tensor
    """(B, 3, S, S) uint8, channels-last in memory; `backbones.normalise` makes floats of them."""
    labels: dict[str, tuple[torch.Tensor, torch.Tensor]]
    """Per head: (B, k) int64 class ids by falling probability and (B, k + T) float16 log-probabilities and tails."""
    images: torch.Tensor
    """(B,) int64 rows of the pack, on the CPU."""
    crops: torch.Tensor
    """(B,) int64 crop numbers, on the CPU."""
    total: int
    """Crops in this batch over all processes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Labels:
    """The labels of a pass in memory: for crop place j and row i, entry j * N + i."""

    crops: tuple[int, ...]
    boxes: list[np.ndarray]
    flips: list[np.ndarray]
    heads: dict[str, tuple[np.ndarray, np.ndarray]]

    def of(self, batch: CropBatch) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """The labels stored for these very crops."""
        numbers = np.array(self.crops)
        rank = np.argsort(numbers)
        places = rank[np.searchsorted(numbers, batch.crops.numpy(), sorter=rank)]
        rows = places * len(self.flips[0]) + batch.images.numpy()
        return {
            name: (torch.from_numpy(ids[rows].astype(np.int64)), torch.from_numpy(logp[rows]))
            for name, (ids, logp) in self.heads.items()
        }


class Feed:
    """All batches of a training run, by pass and by batch number, so that a run can go on anywhere.

    heads: names out of the store's, None for all. Over `world` processes `batch_size` is the sum of their shares.
    Raises UserError where pack and store do not belong together or the sizes cannot be met.
    """

    def __init__(
        self,
        pack: Pack,
        store: LabelStore,
        *,
        size: int,
        batch_size: int,
        epochs: int,
        heads: Sequence[str] | None = None,
        crops_per_decode: int = 1,
        mix_window: int = 0,
        holdout: float = 0.0,
        seed: int = 0,
        loader: LoaderKind = "auto",
        workers: int = 0,
        device: torch.device | str = "cpu",
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if pack.fingerprint != store.manifest.pack_fingerprint:
            raise UserError(
                "pack: the store's labels were made for another pack's images; name the pack it was made from"
            )
        self._store, self._size, self._device = store, size, torch.device(device)
        self._heads = tuple(store.heads if heads is None else heads)
        self._settings = {"seed": seed, "batch_size": batch_size, "mix_window": mix_window}
        self._team = {"rank": rank, "world": world}
        self.passes = passes(epochs, crops_per_decode, store.crops)
        train, held = split(pack.hashes, holdout, seed)
        self.rows = np.setdiff1d(train, store.missing)
        self.held = np.setdiff1d(held, store.missing)
        self.orders = [Order(self.rows, part, **self._settings, **self._team) for part in self.passes]
        self._loader = open_loader(loader, pack, (size,), workers=workers, device=self._device.type)
        self._labels: Labels | None = None

    @property
    def steps(self) -> int:
        """Batches of all passes."""
        return sum(order.steps for order in self.orders)

    def batches(self, part: int, start: int = 0) -> Generator[Batch]:
        """The batches of pass `part` from number `start` on, prepared one ahead in a thread."""
        order = self.orders[part]
        labels = self._load(order.part.crops)
        decoded = self._loader.batches(order.requests(labels.boxes, labels.flips, start))
        totals = (order.size(step) for step in range(start, order.steps))
        return ahead(lambda: self._labelled(order.batches(decoded, start), labels, totals))

    def held_out(self) -> Generator[Batch]:
        """This process's share of the held-out images, crop 0 of each."""
        labels = self._load((0,))
        rank, world = self._team["rank"], self._team["world"]
        size = max(1, self._settings["batch_size"] // world)
        rows = self.held[rank::world]
        shares = [rows[first : first + size] for first in range(0, len(rows), size)]
        requests = (
            Request(
                images=share,
                crops=np.zeros((len(share), 1), np.int64),
                boxes=labels.boxes[0][share][:, None],
                flips=labels.flips[0][share][:, None],
            )
            for share in shares
        )
        return ahead(lambda: self._labelled(self._loader.batches(requests), labels, (len(share) for share in shares)))

    def close(self) -> None:
        """Stops the loader's workers."""
        self._loader.close()

    def _labelled(self, batches: Iterator[CropBatch], labels: Labels, totals: Iterator[int]) -> Iterator[Batch]:
        for batch, total in zip(batches, totals, strict=True):
            stored = {name: tuple(map(self._moved, pair)) for name, pair in labels.of(batch).items()}
            pixels = self._moved(batch.pixels[self._size])
            yield Batch(pixels=pixels, labels=stored, images=batch.images, crops=batch.crops, total=total)  # pyright: ignore[reportArgumentType]

    def _moved(self, tensor: torch.Tensor) -> torch.Tensor:
        if self._device.type == "cpu" or tensor.device.type != "cpu":
            return tensor
        return tensor.pin_memory().to(self._device, non_blocking=True)

    def _load(self, crops: tuple[int, ...]) -> Labels:
        """The slabs of these crops as one table per head; kept while the next pass uses the same."""
        if self._labels is not None and self._labels.crops == crops:
            return self._labels
        slabs = list(self._store.slabs(crops, self._heads))
        tables = {}
        for name in self._heads:
            parts = [slab.labels[name] for slab in slabs]
            tables[name] = tuple(p[0] if len(p) == 1 else np.concatenate(p) for p in zip(*parts, strict=True))
        boxes, flips = [slab.boxes for slab in slabs], [slab.flips for slab in slabs]
        self._labels = Labels(crops=crops, boxes=boxes, flips=flips, heads=tables)
        return self._labels


@dataclass(slots=True)
class Clock:
    """Time spent waiting for data and time spent on the rest, since the last `take`."""

    data_seconds: float = 0.0
    step_seconds: float = 0.0

    def timed(self, batches: Iterator[Item]) -> Iterator[Item]:
        """Passes items on; what the consumer does with one counts as its step."""
        while True:
            asked = time.perf_counter()
            item = next(batches, None)
            got = time.perf_counter()
            if item is None:
                return
            self.data_seconds += got - asked
            yield item
            self.step_seconds += time.perf_counter() - got

    def take(self) -> tuple[float, float]:
        """(data_seconds, step_seconds) so far; both start again at zero."""
        spent = (self.data_seconds, self.step_seconds)
        self.data_seconds = self.step_seconds = 0.0
        return spent


def ahead(source: Callable[[], Iterator[Item]], depth: int = 2) -> Generator[Item]:
    """Runs the iterator that `source` opens in a thread, up to `depth` items ahead; its errors are raised here.

    Leaving the loop early stops the thread.
    """
    items: queue.Queue[Any] = queue.Queue(depth)
    stop = threading.Event()
    thread = threading.Thread(target=_fill, args=(source, items, stop), daemon=True)
    thread.start()
    try:
        while True:
            item, error = items.get()
            if error is not None:
                raise error
            if item is None:
                return
            yield item
    finally:
        stop.set()
        while thread.is_alive():
            try:
                items.get(timeout=0.05)
            except queue.Empty:
                continue
        thread.join()


def _fill(source: Callable[[], Iterator[Any]], items: queue.Queue[Any], stop: threading.Event) -> None:
    opened = None
    try:
        opened = source()
        for item in opened:
            items.put((item, None))
            if stop.is_set():
                return
        items.put((None, None))
    except BaseException as error:
        items.put((None, error))
    finally:
        close = getattr(opened, "close", None)
        if close is not None:
            close()
