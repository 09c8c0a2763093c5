"""Top-k labels from logits: class ids, log-probabilities and log-tails, and the dense probabilities they stand for.

With p = softmax(z) and S the k most probable classes, a row is log p over S, then for each stored temperature t its
log-tail: the log of the sum of p^(1/t) over the classes outside S (`log_tail`). Tempering the tail as one class,
tail^(1/t), would be another number. All of it is computed in float32: 1 - sum(p) in half precision is wrong by up to
6e-4, and sometimes negative.

Log-probabilities are at least `MIN_LOGP`, a probability of 0 at every temperature in use: a masked class, whose
logit is -inf, can then be among the k, and log p is finite wherever the loss multiplies it by p.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from repcon.config import Tail

MIN_LOGP = -65_504.0
"""The smallest number of float16, the dtype of stored rows."""


def id_dtype(classes: int) -> type[np.uint16] | type[np.uint32]:
    """The stored dtype of class ids; its largest value is the fill value, which is no class."""
    return np.uint16 if classes <= 65_535 else np.uint32


def encode(logits: Tensor, k: int, temperatures: Sequence[float]) -> tuple[Tensor, Tensor]:
    """(B, C) logits to (B, k) int64 ids and (B, k + T) float32 log-probabilities and log-tails; k becomes min(k, C).

    Ids are by falling probability, the lower id first where two are equal, on every device. Where k = C nothing
    is left outside and the log-tails are -inf.
    """
    logits = logits.detach().float() + 0.0  # -0.0 becomes 0.0, so that the two tie
    ids = _top_ids(logits, min(k, logits.shape[1]))
    # The largest becomes 0: logsumexp of logits around 20,000 has no digits left below 0.001.
    logits = logits - logits.gather(1, ids[:, :1])
    return ids, select(logits - logits.logsumexp(1, keepdim=True), ids, temperatures)


def select(logp: Tensor, ids: Tensor, temperatures: Sequence[float]) -> Tensor:
    """(B, C) log-probabilities to (B, k + T): those of the ids (B, k), and the log-tails of the other classes."""
    top = logp.gather(1, ids).clamp(min=MIN_LOGP)  # NaN stays NaN
    outside = logp.scatter(1, ids, float("-inf"))
    return torch.cat([top, *(log_tail(outside, t)[:, None] for t in temperatures)], 1)


def truncate(rows: Tensor, k: int, temperatures: Sequence[float]) -> Tensor:
    """Rows (B, k' + T) of `encode` cut to their first k classes; the tails take up the mass of the others."""
    count = rows.shape[1] - len(temperatures)
    kept, dropped, tails = rows[:, :k], rows[:, k:count].double(), rows[:, count:].double()
    added = torch.stack([log_tail(dropped, t) for t in temperatures], 1)
    return torch.cat([kept, torch.logaddexp(tails, added).to(rows.dtype)], 1)


def log_tail(logp: Tensor, temperature: float) -> Tensor:
    """(B, n) log-probabilities of the classes outside the top k to (B,): the log of the sum of p^(1/t)."""
    return (logp / temperature).logsumexp(1)


def _top_ids(logits: Tensor, k: int) -> Tensor:
    """Ids of the k largest, ties to the lower id: each logit becomes an integer of the same order, above its id."""
    bits = logits.view(torch.int32)
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
    reversed_ids = torch.arange(logits.shape[1] - 1, -1, -1, device=logits.device)
    keys = ((ordered << 32) | reversed_ids).topk(k, dim=1).values
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
