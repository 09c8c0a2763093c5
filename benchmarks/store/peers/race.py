"""All contenders in turns: a slab, a random batch, shuffled epochs."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from benchmarks.harness.records import put
from benchmarks.store.benchmark import RawFile
from benchmarks.store.labels import CROPS
from benchmarks.store.peers.contenders import Timed, ours_of
from benchmarks.store.peers.peer import BATCH, gather, gather_all, seconds

LEAST_TURNS = 3
EPOCHS = 4
"""Crops that a turn of shuffled epochs goes through."""


class Race:
    """Adds the figures of each part to `figures`."""

    def __init__(
        self, contenders: Mapping[str, Timed], raw: RawFile, turns: int, most_seconds: float, figures: dict[str, Any]
    ) -> None:
        """A contender that has taken `most_seconds` for a part takes no more turns in it, after the third."""
        self._contenders, self._raw, self._figures = contenders, raw, figures
        self._turns, self._most_seconds = turns, most_seconds
        self._images = max(each.images for each in contenders.values())
        self._random = np.random.default_rng(0)

    def slabs(self) -> None:
        """One crop of all images into memory."""

        def raw(turn: int) -> float:
            return seconds(lambda: [array.copy() for array in self._raw.arrays(turn % CROPS)]) / self._images

        def one(name: str, turn: int) -> float:
            return self._contenders[name].slab_seconds(turn % CROPS) / self._contenders[name].images

        self._part("slab", "memmap", self._turns, raw, one)

    def batches(self) -> None:
        """Random rows of a crop, from the files; without memory between them but that of the system's page cache."""

        def raw(turn: int) -> float:
            rows, arrays = self._rows(self._images), self._raw.arrays(turn % CROPS)
            return seconds(lambda: gather(arrays, rows))

        def one(name: str, turn: int) -> float:
            contender = self._contenders[name]
            return contender.batch_seconds(turn % CROPS, self._rows(contender.images))

        self._part("batch", "gather", self._turns, raw, one)

    def epochs(self) -> None:
        """All rows of some crops in random batches."""

        def raw(turn: int) -> float:
            order = self._random.permutation(self._images)
            arrays = [self._raw.arrays(crop) for crop in range(EPOCHS)]
            return seconds(lambda: [gather_all(each, order) for each in arrays]) / self._images

        def one(name: str, turn: int) -> float:
            images = self._contenders[name].images
            orders = [self._random.permutation(images) for _ in range(EPOCHS)]
            return self._contenders[name].epoch_seconds(orders) / images

        self._part("epoch", "gather", max(LEAST_TURNS, self._turns // EPOCHS), raw, one)

    def _rows(self, images: int) -> np.ndarray:
        return self._random.integers(0, images, BATCH)

    def _part(
        self, part: str, floor: str, turns: int, raw: Callable[[int], float], one: Callable[[str, int], float]
    ) -> None:
        """Rates over the memory-mapped file's, and times over those of repcon's reader, of the same turn."""
        for name in self._contenders:  # files are opened, pages cached
            one(name, 0)
        over_floor: dict[str, list[float]] = {name: [] for name in self._contenders}
        over_ours: dict[str, list[float]] = {name: [] for name in self._contenders}
        spent = dict.fromkeys(self._contenders, 0.0)
        for turn in range(turns):
            least, ours = raw(turn), {}
            for name, contender in self._contenders.items():
                if turn >= LEAST_TURNS and spent[name] >= self._most_seconds and name != ours_of(name):
                    continue
                taken = one(name, turn)
                spent[name] += taken * contender.images
                ours[name] = taken
                over_floor[name].append(least / taken)
                over_ours[name].append(taken / ours[ours_of(name)])
        for name in self._contenders:
            put(self._figures, f"{name}_{part}_over_{floor}", over_floor[name])
            if name != ours_of(name):
                put(self._figures, f"{name}_{part}_over_ours", over_ours[name])
