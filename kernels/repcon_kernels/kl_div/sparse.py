"""The loss in torch operations, for training on a CPU.

The teacher's distribution is never made dense, and the logits are not kept, only their gradient. The logits outside S
(the stored classes) are exponentiated in the gradient's memory with S masked out, so that the student's tail is a sum
of its own terms: the difference 1 - sum_S q would lose all digits where the tail is small.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from repcon_kernels.kl_div.heads import LOG_TAIL_FLOOR, HeadSpec, gather_ids, widths


def multi_head_kl(
    logits: Tensor,
    gradient: Tensor | None,
    heads: Sequence[HeadSpec],
    ids: Sequence[Tensor],
    logp: Sequence[Tensor],
    rows: Tensor | None,
    weights: Tensor,
    tail: str,
    loss_scale: float,
    gradient_scale: float,
) -> Tensor:
    """Losses (H,) float32 (float64 for float64 logits): weight x t^2 x loss_scale x sum over rows.

    Where `gradient` (B, columns) is given, dL/dlogits x gradient_scale / loss_scale is written into it; it may be the
    logits' own memory.
    """
    precision = torch.float64 if logits.dtype == torch.float64 else torch.float32
    losses = []
    for number, (head, width) in enumerate(zip(heads, widths(heads, logits.shape[1]), strict=True)):
        columns = slice(head.start, head.stop)
        head_gradient = None if gradient is None else gradient[:, columns]
        head_logp = (logp[number] if rows is None else logp[number].index_select(0, rows)).to(precision)
        scale = weights[number].to(precision) * (head.temperature * gradient_scale)
        row_losses = _head_kl(
            logits[:, columns], head_gradient, gather_ids(ids[number], rows), head_logp, head, tail, scale
        )
        losses.append(row_losses.sum() * (head.temperature**2 * loss_scale))
        if gradient is not None and width > head.classes:
            gradient[:, head.stop : head.start + width] = 0
    if gradient is not None and heads[0].start > 0:
        gradient[:, : heads[0].start] = 0
    return torch.stack(losses) * weights.to(precision)


def _head_kl(
    logits: Tensor, gradient: Tensor | None, ids: Tensor, logp: Tensor, head: HeadSpec, tail: str, scale: Tensor
) -> Tensor:
    """KL of each row (B,). logits (B, C), ids (B, k) int64, logp (B, k + T); `gradient` is set to gradient x scale."""
    log_p = _teacher(logp, head, tail)
    scaled = logits.gather(1, ids).to(logp.dtype) / head.temperature
    if head.k == head.classes:
        return _whole_kl(scaled, log_p[:, : head.k], gradient, ids, scale)
    if gradient is not None and gradient.dtype == logp.dtype:
        buffer = gradient
    else:
        buffer = torch.empty_like(logits, dtype=logp.dtype)
    rest = _rest(logits, buffer, ids, head.temperature, tail == "uniform")
    # The rest counts as one class. The largest logit is subtracted first, so that large logits lose no digits.
    log_q = torch.cat([scaled, rest.top], dim=1)
    log_q -= log_q.amax(dim=1, keepdim=True)
    log_q[:, -1:] += rest.mass.log()
    log_q = log_q.log_softmax(dim=1)
    p, q, outside = log_p.exp(), log_q.exp(), head.classes - head.k
    # Outside S the gradient is matched x q - pull x (q within the rest) - even; inside it is matched x q - p.
    p_tail, log_q_tail = p[:, -1:], log_q[:, -1:]
    pull, matched = torch.zeros_like(p_tail), torch.ones_like(p_tail)
    if rest.total is None:
        pull = p_tail.masked_fill(log_q_tail <= LOG_TAIL_FLOOR, 0)
        matched = 1 - p_tail + pull
        log_q_tail.clamp_(min=LOG_TAIL_FLOOR)
    else:
        log_total = rest.top + rest.mass.log() - log_q_tail
        log_q_tail.copy_(rest.total / outside - log_total + math.log(outside))
    if gradient is not None:
        tiny = torch.finfo(buffer.dtype).tiny
        buffer.mul_((matched * q[:, -1:] - pull) / rest.mass.clamp(min=tiny) * scale)
        if rest.total is not None:
            buffer.sub_(p_tail / outside * scale)
        buffer.scatter_(1, ids, (matched * q[:, :-1] - p[:, :-1]) * scale)
        if buffer is not gradient:
            gradient.copy_(buffer)
    return _divergence(log_p, log_q, p)


def _whole_kl(scaled: Tensor, log_p: Tensor, gradient: Tensor | None, ids: Tensor, scale: Tensor) -> Tensor:
    """`_head_kl` of a head whose classes are all stored: logits z/t and log_p (B, C) in the order of `ids`."""
    log_q = scaled.log_softmax(dim=1)
    if gradient is not None:
        gradient.scatter_(1, ids, ((log_q.exp() - log_p.exp()) * scale).to(gradient.dtype))
    return _divergence(log_p, log_q, log_p.exp())


class _Rest(NamedTuple):
    """Per row (B, 1), of the classes outside S: largest z/t, sum of exp(z/t - top), and sum of z/t where needed."""

    top: Tensor
    mass: Tensor
    total: Tensor | None


def _rest(logits: Tensor, buffer: Tensor, ids: Tensor, temperature: float, with_total: bool) -> _Rest:
    """Fill `buffer` (B, C), which may be the logits, with exp(z/t - top) outside S and 0 inside."""
    buffer.copy_(logits)
    if temperature != 1:
        buffer.div_(temperature)
    total = buffer.scatter_(1, ids, 0).sum(dim=1, keepdim=True) if with_total else None
    buffer.scatter_(1, ids, -torch.inf)
    # If all are -inf, a finite maximum makes their exponentials 0 instead of NaN.
    top = buffer.amax(dim=1, keepdim=True).clamp_(min=torch.finfo(buffer.dtype).min)
    return _Rest(top, buffer.sub_(top).exp_().sum(dim=1, keepdim=True), total)


def _teacher(logp: Tensor, head: HeadSpec, tail: str) -> Tensor:
    """The teacher's log-probabilities of S and of the tail (B, k + 1), tempered; `renormalise` has no tail."""
    log_u = logp[:, : head.k] / head.temperature
    if tail == "renormalise" or head.k == head.classes:
        log_tail = torch.full_like(log_u[:, :1], -torch.inf)
    else:
        log_tail = logp[:, head.k + head.tail_column, None]
    return torch.cat([log_u, log_tail], dim=1).log_softmax(dim=1)


def _divergence(log_p: Tensor, log_q: Tensor, p: Tensor) -> Tensor:
    """Sum of p log(p / q) by rows, without the terms whose p is 0."""
    return torch.where(p == 0, 0, p * (log_p - log_q)).sum(dim=1)


def scale_heads(gradient: Tensor, factors: Tensor, factor_scale: float, starts: Sequence[int]) -> None:
    """gradient[:, head] *= factors[head] x factor_scale, in place; on a CPU a factor of exactly 1 costs nothing."""
    for number, (start, stop) in enumerate(zip(starts, [*starts[1:], gradient.shape[1]], strict=True)):
        factor = factors[number].to(torch.promote_types(gradient.dtype, torch.float32)) * factor_scale
        if gradient.device.type == "cpu" and factor == 1:
            continue
        part = gradient[:, start:stop]
        # Not mul_: it would round the factor, a loss scale perhaps, to the gradient's own precision.
        part.copy_(part.to(factor.dtype) * factor)
