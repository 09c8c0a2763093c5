"""Weighted mean of the weights of several models of one architecture.

    members = {name: split_classifier(model, size=128) for name, model in teachers.items()}
    state = average(members, {"birds": 0.4, "generalist": 0.6})

Parameters and floating-point buffers (batch-norm means and variances) are averaged with the same shares; integer
buffers (batch counts, index tables) are those of the first model.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from repcon.models.identity import architecture_of
from repcon.models.preprocessing import Preprocessing, preprocessing_of
from repcon.runtime.errors import UserError

SUM_TOLERANCE = 2e-3
"""How far shares may be from one in sum: thirds are written as 0.333."""
LINEAR_TOLERANCE = 1e-3
"""Largest difference, relative to the largest logit, between a model and its linear classifier on its features."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitModel:
    """A classifier in two parts, float32 and in evaluation mode."""

    backbone: nn.Module
    """Gives pooled features (B, F)."""
    classifier: nn.Linear | None
    """Features to logits (B, C); None where what follows the features is not one linear layer."""
    preprocessing: Preprocessing


@torch.no_grad()
def split_classifier(model: nn.Module, size: int = 0) -> SplitModel:
    """Take a timm classifier apart (the model itself is changed). `size`: input side in pixels, 0 for its own.

    The linear classifier counts only if it gives the model's own logits on a random input.
    """
    model = model.eval().float()
    preprocessing = preprocessing_of(model, size)
    found = getattr(model, "get_classifier", lambda: None)()
    side = preprocessing.size
    noise = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    logits = model(noise)
    model.reset_classifier(0)  # pyright: ignore[reportCallIssue]
    features = model(noise)
    linear = found if isinstance(found, nn.Linear) and _is_linear(found, features, logits) else None
    return SplitModel(backbone=model, classifier=linear, preprocessing=preprocessing)


def _is_linear(classifier: nn.Linear, features: torch.Tensor, logits: torch.Tensor) -> bool:
    if features.ndim != 2 or features.shape[1] != classifier.in_features:
        return False
    difference = (nn.functional.linear(features, classifier.weight, classifier.bias) - logits).abs().max()
    return bool(difference <= LINEAR_TOLERANCE * logits.abs().max() + 1e-6)


def check_shares(shares: Mapping[str, float], names: Iterable[str]) -> dict[str, float]:
    """The share of every name, 0 where none is given, divided by their sum.

    Raises UserError for an unknown name, a share that is negative or not finite, or a sum other than 1.
    """
    known = list(names)
    unknown = [name for name in shares if name not in known]
    if unknown:
        there = ", ".join(known) or "none"
        raise UserError(f"init_weights: no weights of {', '.join(unknown)} to average; there are {there}")
    for name, share in shares.items():
        if not (math.isfinite(share) and share >= 0):
            raise UserError(f"init_weights: {name} = {share}: a share must be a number of 0 or more")
    total = sum(shares.values())
    if abs(total - 1) > SUM_TOLERANCE:
        raise UserError(f"init_weights: the shares sum to {total:g}, not to 1; divide each of them by {total:g}")
    return {name: shares.get(name, 0.0) / total for name in known}


def check_mergeable(
    members: Mapping[str, SplitModel], field: str = "init", remedy: str = "use init = 'backbone'"
) -> None:
    """Raises UserError naming the first difference in architecture, tensors or input normalisation.

    field, remedy: the setting that the message names, and what it advises.
    """
    (first, reference), *others = members.items()
    held = reference.backbone.state_dict()
    kind, pixels = architecture_of(reference.backbone), reference.preprocessing
    for name, member in others:
        where = f"{field}: the weights of {name} and {first} cannot be averaged"
        if (other := architecture_of(member.backbone)) != kind:
            raise UserError(f"{where}: {other} is another architecture than {kind}; {remedy}")
        state = member.backbone.state_dict()
        odd = next((key for key in (*held, *state) if _shape(held, key) != _shape(state, key)), None)
        if odd is not None:
            shapes = f"{odd} is {_shape(state, odd)} and {_shape(held, odd)}"
            raise UserError(f"{where}: {shapes}, a tensor of another shape; {remedy}")
        given = member.preprocessing
        if not np.allclose([given.mean, given.std], [pixels.mean, pixels.std], rtol=0, atol=1e-4):
            what = f"their inputs are normalised by mean {given.mean}, std {given.std} and {pixels.mean}, {pixels.std}"
            raise UserError(f"{where}: {what}; {remedy}")


def _shape(state: Mapping[str, torch.Tensor], key: str) -> str:
    return " x ".join(map(str, state[key].shape)) or "a number" if key in state else "not there"


def average(members: Mapping[str, SplitModel], shares: Mapping[str, float]) -> dict[str, torch.Tensor]:
    """The state of a backbone whose every floating-point tensor is the mean of the members', weighted by `shares`.

    shares: as `check_shares` gives them. The members have equal shapes (`check_mergeable`). A member of share 1
    is given back to the bit.
    """
    used = [(member.backbone.state_dict(), shares[name]) for name, member in members.items() if shares[name] > 0]
    state = {}
    for key, first in next(iter(members.values())).backbone.state_dict().items():
        if not first.is_floating_point():
            state[key] = first.clone()
            continue
        total = used[0][0][key].to(torch.float32) * used[0][1]
        for tensors, share in used[1:]:
            total.add_(tensors[key], alpha=share)
        state[key] = total.to(first.dtype)
    return state
