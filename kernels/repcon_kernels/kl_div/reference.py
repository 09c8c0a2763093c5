"""The specification: the loss as dense formulas in torch, with its gradient by autograd. Fast code never imports it.

Per row and head, with logits z (C,), temperature t, the stored set S of k classes with log-probabilities l, and the
stored log-tail at t (the log of the sum over the other classes of p^(1/t); where k = C there are none, tail = 0):

    u_j = exp(l_j / t) for j in S       U = sum_S u_j + tail        p_j = u_j / U       p_tail = tail / U
    q = softmax(z / t)                  q_tail = sum of q outside S

    bucket       sum_S p_j log(p_j / q_j) + p_tail log(p_tail / q_tail)
    renormalise  sum_S p_j log(p_j / q_j)                                    with p over S made to sum to one
    uniform      sum_i p_i log(p_i / q_i)                                    with p_i = p_tail / (C - k) outside S

loss_h = weight_h t_h^2 mean over rows. A class or tail without teacher mass counts for nothing (0 log 0 = 0).
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from repcon_kernels.kl_div.heads import LOG_TAIL_FLOOR, HeadSpec, check_values, gather_ids


def multi_head_kl(
    logits: Tensor,
    heads: Sequence[HeadSpec],
    ids: Sequence[Tensor],
    logp: Sequence[Tensor],
    *,
    rows: Tensor | None = None,
    weights: Tensor,
    tail: str = "uniform",
) -> Tensor:
    """Losses (H,) in the logits' own precision: float64 logits make this exact enough to test the others against.

    Raises ValueError where an id or a row number is out of range.
    """
    check_values(heads, ids, rows)
    losses = [
        head_kl(
            logits[:, head.start : head.stop],
            gather_ids(head_ids, rows),
            (head_logp if rows is None else head_logp[rows]).to(logits.dtype),
            head,
            tail,
        )
        for head, head_ids, head_logp in zip(heads, ids, logp, strict=True)
    ]
    return torch.stack(losses) * weights.to(logits.dtype)


def head_kl(logits: Tensor, ids: Tensor, logp: Tensor, head: HeadSpec, tail: str) -> Tensor:
    """One head's t^2 x mean KL. logits (B, C), ids (B, k) int64, logp (B, k + T), all floats of one dtype."""
    log_p, log_p_tail = teacher(logp, head, tail)
    log_q = (logits / head.temperature).log_softmax(dim=1)
    rows = kl_terms(log_p, log_q.gather(1, ids)).sum(dim=1)
    if tail != "renormalise" and head.k < head.classes:
        outside = torch.ones_like(log_q, dtype=torch.bool).scatter(1, ids, False)
        if tail == "bucket":
            rows = rows + kl_terms(log_p_tail, log_sum(log_q, outside).clamp(min=LOG_TAIL_FLOOR))
        else:
            log_p_each = log_p_tail - math.log(head.classes - head.k)
            terms = kl_terms(log_p_each[:, None].expand_as(log_q), log_q)
            rows = rows + terms.where(outside, 0).sum(dim=1)
    return head.temperature**2 * rows.mean()


def teacher(logp: Tensor, head: HeadSpec, tail: str) -> tuple[Tensor, Tensor]:
    """Tempered log-probabilities (B, k) and log-tail (B,); the tail is -inf where the mode leaves it out."""
    log_u = logp[:, : head.k] / head.temperature
    log_tail = torch.full_like(log_u[:, 0], -torch.inf)
    if tail != "renormalise" and head.k < head.classes:
        log_tail = logp[:, head.k + head.tail_column]
    log_mass = torch.cat([log_u, log_tail[:, None]], dim=1).logsumexp(dim=1)
    return log_u - log_mass[:, None], log_tail - log_mass


def log_sum(log_q: Tensor, chosen: Tensor) -> Tensor:
    """log of the sum of exp(log_q) over the chosen columns, by rows; where all are -inf, -inf without gradient."""
    terms = log_q.masked_fill(~chosen, -torch.inf)
    empty = terms.amax(dim=1) == -torch.inf
    return terms.masked_fill(empty[:, None], 0).logsumexp(dim=1).masked_fill(empty, -torch.inf)


def kl_terms(log_p: Tensor, log_q: Tensor) -> Tensor:
    """p log(p / q) by elements, 0 where p is 0."""
    empty = log_p == -torch.inf
    terms = log_p.exp() * (log_p - log_q).masked_fill(empty, 0)
    return terms.masked_fill(empty, 0)
