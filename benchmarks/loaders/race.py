"""Contenders taking turns: each epoch right after one of the floor's, the ratio of both is the figure."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

from benchmarks.harness.records import put
from benchmarks.loaders.contenders import FLOOR, FLOOR_ODD, MAKERS, OURS, Case, Contender, Maker, Opened, present
from repcon.images.pack import ImagePack


class Race:
    """All contenders, open at the same time, and the figures that they make."""

    def __init__(self, threads: int, figures: dict[str, Any], others: Mapping[str, Maker] | None = None) -> None:
        """others: contenders that take part beside those of `contenders.py` that are present."""
        self._threads, self._figures = threads, figures
        self._makers = MAKERS | dict(others or {})
        self.kinds = (*present(), *(others or {}))
        self.ours = tuple(kind for kind in self.kinds if kind in OURS)
        self.seconds: Mapping[str, list[float]] = {}
        """Of the last case, an epoch per round."""
        self._contenders = {kind: self._contender(kind) for kind in (FLOOR, FLOOR_ODD, *self.kinds)}

    def _contender(self, kind: str) -> Contender:
        return Contender(kind, self._makers[kind], self._threads)

    def run(self, case: Case, rounds: int, *, kinds: Sequence[str], name: str) -> Mapping[str, Opened]:
        """Adds rates and ratios of a case; `name` holds a {} where a contender's own name goes."""
        images = len(ImagePack.open(case.pack))
        opened = {kind: self._contenders[kind].open(case) for kind in (FLOOR, *kinds)}
        self.seconds = seconds = {kind: list[float]() for kind in kinds}
        floor: dict[str, list[float]] = {kind: [] for kind in kinds}
        for _ in range(rounds):
            for kind in kinds:
                floor[kind].append(self._contenders[FLOOR].epoch())
                seconds[kind].append(self._contenders[kind].epoch())
        put(self._figures, f"{name.format(FLOOR)}_images_per_second", _rates(images, list(chain(*floor.values()))))
        for kind in kinds:
            pairs = zip(floor[kind], seconds[kind], strict=True)
            put(self._figures, f"{name.format(kind)}_over_decode", [bare / taken for bare, taken in pairs])
            put(self._figures, f"{name.format(kind)}_images_per_second", _rates(images, seconds[kind]))
        return opened

    def first_batches(self, case: Case, opened: Mapping[str, Opened], openings: int) -> None:
        """Adds the times to the first batch, of `opened` and of more processes, `openings` in all; and the memory."""
        for kind in self.kinds:
            samples = [opened[kind].first_batch_seconds]
            for _ in range(openings - 1):
                fresh = self._contender(kind)
                samples.append(fresh.open(case).first_batch_seconds)
                fresh.close()
            put(self._figures, f"{kind}_first_batch_seconds", samples)
        for kind in (FLOOR, *self.kinds):
            self._figures[f"{kind}_peak_memory_bytes"] = self._contenders[kind].memory_bytes()

    def checks(self, case: Case, rounds: int) -> None:
        """Adds what comparing every image with its content hash costs the first epoch."""
        for kind in self.ours:
            contender = self._contenders[kind]
            ratios = []
            for _ in range(rounds):
                on, off = (contender.open(replace(case, check=check)).first_epoch_seconds for check in (True, False))
                ratios.append(on / off)
            put(self._figures, f"{kind}_checked_over_unchecked", ratios)

    def close(self) -> None:
        """Ends all processes."""
        for contender in self._contenders.values():
            contender.close()


def _rates(images: int, seconds: Sequence[float]) -> list[float]:
    return [images / taken for taken in seconds]
