"""The shares of several models in the mean that a student starts from, chosen by the stored labels of some crops.

A candidate is a mean of the teachers' backbones, followed by each teacher's own classifier. Its KL from the stored
labels, head by head, says how much of each teacher it keeps; no labels of the task are needed.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import asdict, dataclass

import torch
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table
from torch import nn

from repcon.distill.loss import MultiHeadKLLoss
from repcon.distill.sample import Sample
from repcon.models.merge import MergeMember, average
from repcon.models.preprocessing import normalise
from repcon.runtime.console import console

CROPS = 512
"""Crops that candidates are scored on."""
STEPS = 10
"""Two models are tried at 0, 1/STEPS, 2/STEPS, ... 1."""
MOVES = (0.2, 0.1)
"""Of more models, how much of the sum one of them gives to another; the smaller once the larger helps no more."""
MOST = 40
"""Candidates at most, beside the single models, where there are more than two."""
SHOWN = 12
"""Candidates shown on the screen."""

Shares = dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A mean that was tried."""

    shares: Shares
    kl: dict[str, float]
    """Per head, in nat at temperature 1 where its tail is stored."""
    score: float = math.nan
    """The lowest is taken."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mix:
    """The shares that were chosen, and every candidate in the order of their scores."""

    shares: Shares
    candidates: tuple[Candidate, ...]
    crops: int
    seconds: float

    def plain(self) -> dict[str, object]:
        """For results and checkpoints."""
        return {"candidates": [asdict(each) for each in self.candidates], "crops": self.crops, "seconds": self.seconds}


Score = Callable[[Candidate, Sequence[Candidate]], float]
"""(a candidate, the single models as candidates) to a figure; the lowest wins."""


def largest_kl(corners: Sequence[Candidate]) -> dict[str, float]:
    """Per head, the largest KL that a single model has."""
    return {head: max(1e-9, *(corner.kl[head] for corner in corners)) for head in corners[0].kl}


def balanced(candidate: Candidate, corners: Sequence[Candidate]) -> float:
    """Each head's KL over the largest that a single model has, summed."""
    largest = largest_kl(corners)
    return sum(kl / largest[head] for head, kl in candidate.kl.items())


def balanced_weights(mix: Mix) -> dict[str, float]:
    """Per head that was scored, what `balanced` divides by, upside down; the largest is 1. Empty without a search."""
    corners = [each for each in mix.candidates if max(each.shares.values()) > 1 - 1e-6]
    if not corners:
        return {}
    largest = largest_kl(corners)
    return {head: min(largest.values()) / kl for head, kl in largest.items()}


def search(
    members: Mapping[str, MergeMember],
    loss: MultiHeadKLLoss,
    sample: Sample,
    *,
    score: Score = balanced,
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> Mix:
    """The shares of the candidate that scores lowest; equal shares where no member has a linear classifier.

    loss: unweighted, of the members that have one, in their order. sample: of pixels, on the loss's device.
    """
    started = time.monotonic()
    names = list(members)
    uniform = dict.fromkeys(names, 1 / len(names))
    scored = [name for name in names if members[name].classifier is not None]
    if not scored or len(names) == 1:
        return Mix(shares=uniform, candidates=(), crops=0, seconds=0.0)
    measured = _Measured(members, loss, sample, autocast)
    corners = [measured(_corner(names, name)) for name in names]

    def judged(shares: Shares) -> Candidate:
        found = measured(shares)
        return Candidate(shares=found.shares, kl=found.kl, score=score(found, corners))

    tried = _grid(names, judged) if len(names) == 2 else _walk(names, judged)
    best = min(tried, key=lambda each: each.score)
    ordered = tuple(sorted(tried, key=lambda each: each.score))
    return Mix(shares=best.shares, candidates=ordered, crops=sample.crops, seconds=time.monotonic() - started)


def _corner(names: Sequence[str], name: str) -> Shares:
    return {each: float(each == name) for each in names}


def _grid(names: Sequence[str], judged: Callable[[Shares], Candidate]) -> list[Candidate]:
    first, second = names
    return [judged({first: n / STEPS, second: (STEPS - n) / STEPS}) for n in range(STEPS + 1)]


def _walk(names: Sequence[str], judged: Callable[[Shares], Candidate]) -> list[Candidate]:
    """From equal shares, the best move of a part of the sum from one model to another, until none helps."""
    tried = {_key(corner): judged(corner) for corner in (_corner(names, name) for name in names)}
    limit = len(tried) + MOST

    def get(shares: Shares) -> Candidate:
        key = _key(shares)
        if key not in tried:
            tried[key] = judged(shares)
        return tried[key]

    here = get(dict.fromkeys(names, 1 / len(names)))
    for size in MOVES:
        while len(tried) < limit:
            near = [get(shares) for shares in _moved(here.shares, size) if len(tried) < limit]
            best = min(near, key=lambda each: each.score, default=here)
            if best.score >= here.score:
                break
            here = best
    return list(tried.values())


def _key(shares: Shares) -> tuple[float, ...]:
    return tuple(round(share, 6) for share in shares.values())


def _moved(shares: Shares, size: float) -> Iterator[Shares]:
    for giver, held in shares.items():
        part = min(size, held)
        for taker in shares:
            if taker != giver and part > 1e-6:
                yield shares | {giver: held - part, taker: shares[taker] + part}


class _Measured:
    """Gives the KL of a mean; keeps what it has measured."""

    def __init__(
        self,
        members: Mapping[str, MergeMember],
        loss: MultiHeadKLLoss,
        sample: Sample,
        autocast: Callable[[], AbstractContextManager[object]],
    ) -> None:
        self._members, self._loss, self._sample, self._autocast = members, loss, sample, autocast
        first = next(iter(members.values()))
        self._preprocessing = first.preprocessing
        self._device = sample.parts[0].device
        self._backbone = _copy(first.backbone).to(self._device)
        self._classifiers = [
            _copy(members[name].classifier).to(self._device)
            for name in loss.names  # pyright: ignore[reportArgumentType]
        ]
        self._held: dict[tuple[float, ...], Candidate] = {}

    def __call__(self, shares: Shares) -> Candidate:
        key = _key(shares)
        if key not in self._held:
            self._backbone.load_state_dict(average(self._members, shares))
            self._held[key] = Candidate(shares=shares, kl=self._kl())
        return self._held[key]

    @torch.no_grad()
    def _kl(self) -> dict[str, float]:
        totals, start = torch.zeros(len(self._loss.names)), 0
        for pixels in self._sample.parts:
            images = normalise(pixels, self._preprocessing, torch.float32)
            with self._autocast():
                features = self._backbone(images)
                logits = torch.cat([classifier(features) for classifier in self._classifiers], dim=1).float()
            rows = torch.arange(start, start + len(pixels), device=pixels.device)
            totals += self._loss(logits, self._sample.labels, rows).cpu() * len(pixels)
            start += len(pixels)
        scale = [head.temperature**2 for head in self._loss.specs]
        return {
            name: float(total) / self._sample.crops / squared
            for name, total, squared in zip(self._loss.names, totals, scale, strict=True)
        }


def _copy(module: nn.Module | None) -> nn.Module:
    assert module is not None
    return deepcopy(module).eval().requires_grad_(False)


def show(mix: Mix) -> None:
    """Prints the best candidates and the single models."""
    if not mix.candidates:
        return
    title = f"Start: mean of the teachers' weights, KL in nat on {mix.crops:,} crops ({mix.seconds:.0f} s)"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    shares, heads = mix.candidates[0].shares, mix.candidates[0].kl
    for name in shares:
        table.add_column(f"{escape(name)}\nshare", justify="right")
    for name in heads:
        table.add_column(f"{escape(name)}\nKL", justify="right")
    table.add_column("score", justify="right")
    for place, each in enumerate(shown(mix.candidates)):
        cells = [*(f"{share:.2f}" for share in each.shares.values()), *(f"{kl:.3f}" for kl in each.kl.values())]
        table.add_row(*cells, f"{each.score:.3f}", style="bold green" if place == 0 else "")
    console.print(table)


def shown(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The best, and single models however they score."""
    return [each for place, each in enumerate(candidates) if place < SHOWN or max(each.shares.values()) > 1 - 1e-6]
