"""Search for the averaging weights of several models' parameters, scored on the stored labels of a few crops.

A candidate is a weighted mean of the teachers' backbones, followed by each teacher's own classifier. Its KL from the
stored labels, head by head, measures how much of each teacher it keeps; no labels of the task are needed. In a
candidate, a model's averaging weight is called its share: `init_weights` in a recipe.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from copy import deepcopy
from dataclasses import dataclass, replace

import torch
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table
from torch import nn

from repcon.distill.labelled_sample import LabelledSample
from repcon.distill.loss import MultiHeadKLLoss
from repcon.models.merge import SplitModel, average
from repcon.models.preprocessing import Preprocessing, normalise
from repcon.runtime.console import console

CROPS = 512
"""Crops that candidates are scored on."""
GRID_STEPS = 10
"""Two models are searched on a grid: shares 0, 1/10, 2/10, ... 1."""
MOVES = (0.2, 0.1)
"""Three or more models are searched greedily: the share that one model gives to another in a move, in turn."""
MAX_CANDIDATES = 40
"""Of the greedy search, besides the single models."""
MAX_ROWS = 12
"""Candidates that are printed."""

Shares = dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A weighted mean that was scored."""

    shares: Shares
    kl: dict[str, float]
    """Per head, in nat at temperature 1 where its tail is stored."""
    score: float = math.nan
    """The lowest wins."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchResult:
    """The chosen shares, and all candidates in the order of their scores."""

    shares: Shares
    candidates: list[Candidate]
    crops: int
    seconds: float


def largest_kl(single_models: Sequence[Candidate]) -> dict[str, float]:
    """Per head, the largest KL of a single model."""
    return {head: max(1e-9, *(model.kl[head] for model in single_models)) for head in single_models[0].kl}


def balanced_score(candidate: Candidate, single_models: Sequence[Candidate]) -> float:
    """The sum over heads of KL / largest KL of a single model."""
    largest = largest_kl(single_models)
    return sum(kl / largest[head] for head, kl in candidate.kl.items())


def balanced_weights(result: SearchResult) -> dict[str, float]:
    """Loss weights per head in inverse proportion to `largest_kl`, the largest being 1."""
    largest = largest_kl([candidate for candidate in result.candidates if _is_single_model(candidate)])
    return {head: min(largest.values()) / kl for head, kl in largest.items()}


def search_shares(
    members: Mapping[str, SplitModel],
    loss: MultiHeadKLLoss,
    sample: LabelledSample,
    *,
    autocast: Callable[[], AbstractContextManager[object]],
) -> SearchResult:
    """The shares of the candidate with the lowest score.

    members: two or more. loss: unweighted, of those with a linear classifier, in their order. sample: uint8 pixels, on
    the loss's device.
    """
    started = time.monotonic()
    names, first = list(members), next(iter(members.values()))
    classifiers = [member.classifier for name in loss.names if (member := members[name]).classifier is not None]
    backbone, *classifiers = (deepcopy(module).to(loss.device) for module in (first.backbone, *classifiers))

    def measure(shares: Shares) -> Candidate:
        backbone.load_state_dict(average(members, shares))
        kl = _measure_kl(backbone, first.preprocessing, classifiers, loss, sample, autocast)
        return Candidate(shares=shares, kl=kl)

    single_models = {_key(shares): measure(shares) for shares in _single_models(names)}

    def scored(shares: Shares) -> Candidate:
        candidate = single_models.get(_key(shares)) or measure(shares)
        return replace(candidate, score=balanced_score(candidate, list(single_models.values())))

    candidates = _grid_search(names, scored) if len(names) == 2 else _greedy_search(names, scored)
    ordered = sorted(candidates, key=lambda candidate: candidate.score)
    seconds = time.monotonic() - started
    return SearchResult(
        shares=ordered[0].shares, candidates=ordered, crops=sum(map(len, sample.batches)), seconds=seconds
    )


def _single_models(names: Sequence[str]) -> list[Shares]:
    return [{other: float(other == name) for other in names} for name in names]


def _is_single_model(candidate: Candidate) -> bool:
    return max(candidate.shares.values()) > 1 - 1e-6


def _grid_search(names: Sequence[str], scored: Callable[[Shares], Candidate]) -> list[Candidate]:
    first, second = names
    grid = [step / GRID_STEPS for step in range(GRID_STEPS + 1)]
    return [scored({first: share, second: rest}) for share, rest in zip(grid, reversed(grid), strict=True)]


def _greedy_search(names: Sequence[str], scored: Callable[[Shares], Candidate]) -> list[Candidate]:
    """From equal shares, repeat the best move of a share from one model to another until none helps."""
    candidates = {_key(shares): scored(shares) for shares in _single_models(names)}
    limit = len(candidates) + MAX_CANDIDATES

    def get(shares: Shares) -> Candidate:
        key = _key(shares)
        if key not in candidates:
            candidates[key] = scored(shares)
        return candidates[key]

    current = get(dict.fromkeys(names, 1 / len(names)))
    for size in MOVES:
        while len(candidates) < limit:
            neighbours = [get(shares) for shares in _moves(current.shares, size) if len(candidates) < limit]
            best = min(neighbours, key=lambda candidate: candidate.score, default=current)
            if best.score >= current.score:
                break
            current = best
    return list(candidates.values())


def _key(shares: Shares) -> tuple[float, ...]:
    return tuple(round(share, 6) for share in shares.values())


def _moves(shares: Shares, size: float) -> Iterator[Shares]:
    """All shares that differ by a move of up to `size` from one model to another."""
    for source, share in shares.items():
        moved = min(size, share)
        for target in shares:
            if target != source and moved > 1e-6:
                yield shares | {source: share - moved, target: shares[target] + moved}


@torch.no_grad()
def _measure_kl(
    backbone: nn.Module,
    preprocessing: Preprocessing,
    classifiers: Sequence[nn.Module],
    loss: MultiHeadKLLoss,
    sample: LabelledSample,
    autocast: Callable[[], AbstractContextManager[object]],
) -> dict[str, float]:
    """The mean KL per head over the sample, in nat."""
    totals, start = torch.zeros(len(loss.names)), 0
    for pixels in sample.batches:
        images = normalise(pixels, preprocessing, torch.float32)
        with autocast():
            features = backbone(images)
            logits = torch.cat([classifier(features) for classifier in classifiers], dim=1).float()
        rows = torch.arange(start, start + len(pixels), device=pixels.device)
        totals += loss(logits, sample.labels, rows).cpu() * len(pixels)
        start += len(pixels)
    heads = zip(loss.names, loss.specs, totals.tolist(), strict=True)
    return {name: total / start / head.temperature**2 for name, head, total in heads}


def print_candidates(result: SearchResult) -> None:
    """Print the best candidates and the single models."""
    title = f"Start: mean of the teachers' weights, KL in nat on {result.crops:,} crops ({result.seconds:.0f} s)"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    shares, heads = result.candidates[0].shares, result.candidates[0].kl
    for name in shares:
        table.add_column(f"{escape(name)}\nshare", justify="right")
    for name in heads:
        table.add_column(f"{escape(name)}\nKL", justify="right")
    table.add_column("score", justify="right")
    for rank, candidate in enumerate(result.candidates):
        if rank < MAX_ROWS or _is_single_model(candidate):
            cells = [f"{share:.2f}" for share in candidate.shares.values()]
            cells += [f"{kl:.3f}" for kl in candidate.kl.values()]
            table.add_row(*cells, f"{candidate.score:.3f}", style="bold green" if rank == 0 else "")
    console.print(table)
