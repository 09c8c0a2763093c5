"""From a teacher's logits to what is stored, and back: top-k ids, log-probabilities, log-tails.

With p = softmax(z) and S the k most probable classes, a row is log p over S, then for each stored temperature t
log of sum over the classes outside S of p^(1/t). Tempering the tail as one atom, tail^(1/t), would be another
number. All of it is computed in float32: 1 - sum(p) in half precision is wrong by up to 6e-4, and negative at times.

Log-probabilities are at least `LEAST`, which is a probability of 0 at every temperature in use: so a masked class,
whose logit is -inf, can be among the k, and log p is finite wherever the loss multiplies it by p.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from repcon.config import Tail

LEAST = -65_504.0
"""The smallest number of float16, in which rows are stored."""


def id_dtype(classes: int) -> type[np.uint16] | type[np.uint32]:
    """The stored type of class ids; its largest value is the poison that no class may take."""
    return np.uint16 if classes <= 65_535 else np.uint32


def encode(logits: Tensor, k: int, temperatures: Sequence[float]) -> tuple[Tensor, Tensor]:
    """(B, C) logits to (B, k) int64 ids and (B, k + T) float32 log-probabilities and log-tails; k becomes min(k, C).

    Ids are by falling probability, the lower id first where two are equal, on every device. Where k = C nothing
    is left outside and the log-tails are -inf.
    """
    logits = logits.detach().float() + 0.0  # -0.0 becomes 0.0, so that the two tie
    k = min(k, logits.shape[1])
    ids = _ranked(logits, k)
    # The largest first: logsumexp of logits around 20,000 has no digits left below 0.001.
    logits = logits - logits.gather(1, ids[:, :1])
    log_total = logits.logsumexp(1, keepdim=True)
    top = (logits.gather(1, ids) - log_total).clamp(min=LEAST)  # NaN stays NaN
    outside = (logits - log_total).scatter(1, ids, float("-inf"))
    tails = [(outside / temperature).logsumexp(1, keepdim=True) for temperature in temperatures]
    return ids, torch.cat([top, *tails], 1)


def _ranked(logits: Tensor, k: int) -> Tensor:
    """The ids of the k largest, ties to the lower id: each logit becomes an integer of the same order, above its id."""
    bits = logits.view(torch.int32)
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
    below = torch.arange(logits.shape[1] - 1, -1, -1, device=logits.device)
    keys = ((ordered << 32) | below).topk(k, dim=1).values
    return logits.shape[1] - 1 - (keys & 0xFFFFFFFF)


def dense(ids: Tensor, logp: Tensor, classes: int, temperature_index: int, temperature: float, tail: Tail) -> Tensor:
    """Stored rows as (B, C) float32 probabilities at a stored temperature; the plain reference, for inspection.

    `bucket` leaves the classes outside the top k at zero: what a row lacks to one is the tail's mass. `renormalise`
    makes the top k sum to one; `uniform` spreads the tail evenly over the classes outside.
    """
    ids, logp = ids.long(), logp.float()
    k = ids.shape[1]
    top = (logp[:, :k] / temperature).exp()
    rest = logp[:, k + temperature_index, None].exp()
    if tail == "renormalise":
        rest = torch.zeros_like(rest)
    total = top.sum(1, keepdim=True) + rest
    spread = rest / total / max(classes - k, 1) if tail == "uniform" else torch.zeros_like(rest)
    return spread.expand(-1, classes).scatter(1, ids, top / total)
