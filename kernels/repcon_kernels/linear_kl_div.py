"""`linear_kl`: linear layer and loss in one operator.

The logits of one chunk of rows exist at a time, until their part of the gradients has been added.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from repcon_kernels.functional import (
    LABELS,
    backward_gradient,
    empty_losses,
    library,
    multi_head_kl,
    operator_labels,
    register,
    run_implementation,
    stored_scale,
    validate_implementation,
)
from repcon_kernels.kl_div.heads import LOGIT_DTYPES, HeadSpec, check_values, describe, validate_targets

CHUNK_BYTES = 64 * 2**20
"""Size of the logits of a chunk."""

library.define(
    f"linear_kl(Tensor features, Tensor weight, Tensor? bias, {LABELS}, int chunk_rows, bool with_gradient) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def linear_kl(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    heads: Sequence[HeadSpec],
    ids: Sequence[Tensor],
    logp: Sequence[Tensor],
    *,
    rows: Tensor | None = None,
    weights: Tensor,
    tail: str = "uniform",
    implementation: str = "torch",
    chunk_rows: int = 0,
    check: bool = False,
) -> tuple[Tensor, Tensor]:
    """(loss, losses): `multi_head_kl` of features @ weight.T + bias without all logits in memory.

    features: (B, D); weight: (columns, D); bias: (columns,) or None; all of one dtype, or as autocast makes them.
    chunk_rows: rows whose logits exist at a time; 0 takes as many as fill 64 MiB.
    The others are as for `multi_head_kl`. `loss` () is the sum of `losses` and differentiable by features, weight and
    bias; `losses` (H,) are not differentiable, since the features' gradient is not kept per head.
    """
    kind = features.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        features, weight = _cast(features, dtype), _cast(weight, dtype)
        bias = None if bias is None else _cast(bias, dtype)
    _validate_layer(features, weight, bias, chunk_rows)
    validate_targets(features.shape[0], weight.shape[0], features.device, heads, ids, logp, rows, weights, tail)
    validate_implementation(implementation)
    if check:
        check_values(heads, ids, rows)
    if implementation == "reference":
        logits = torch.nn.functional.linear(features, weight, bias)
        losses = multi_head_kl(
            logits, heads, ids, logp, rows=rows, weights=weights, tail=tail, implementation="reference"
        )
        return losses.sum(), losses.detach()
    labels = operator_labels(heads, ids, logp, rows, weights, tail, implementation)
    needed = any(tensor is not None and tensor.requires_grad for tensor in (features, weight, bias))
    with_gradient = needed and torch.is_grad_enabled()
    loss, losses, *_ = torch.ops.repcon_kernels.linear_kl(features, weight, bias, *labels, chunk_rows, with_gradient)
    return loss, losses


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast as autocast does, which leaves float64 unchanged."""
    return tensor if tensor.dtype == torch.float64 else tensor.to(dtype)


def _validate_layer(features: Tensor, weight: Tensor, bias: Tensor | None, chunk_rows: int) -> None:
    """Raises ValueError where the shapes, dtypes or devices of the layer's tensors do not fit together."""
    if features.ndim != 2 or features.shape[0] == 0 or features.dtype not in LOGIT_DTYPES:
        raise ValueError(f"features must be (B, D) floating point with B > 0, not {describe(features)}")
    if weight.ndim != 2 or weight.shape[1] != features.shape[1]:
        raise ValueError(f"weight must be (columns, {features.shape[1]}), not {describe(weight)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be ({weight.shape[0]},), not {describe(bias)}")
    others = [weight] if bias is None else [weight, bias]
    if any(other.dtype != features.dtype or other.device != features.device for other in others):
        raise ValueError(f"the layer's tensors differ: {', '.join(map(describe, [features, *others]))}")
    if chunk_rows < 0:
        raise ValueError(f"chunk_rows must not be negative, not {chunk_rows}")


def _linear_kl(
    features: Tensor, weight: Tensor, bias: Tensor | None, *labels_and_flags: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    ids, logp, rows, *others, chunk_rows, with_gradient = labels_and_flags
    batch, columns = features.shape[0], weight.shape[0]
    step = min(batch, chunk_rows or max(1, CHUNK_BYTES // (columns * features.element_size())))
    losses = empty_losses(features, others[0]).zero_()
    d_features, d_weight, d_bias = _gradients(features, weight, bias, with_gradient)
    for start in range(0, batch, step):
        chunk = slice(start, min(start + step, batch))
        logits = torch.nn.functional.linear(features[chunk], weight, bias)
        if rows is None:
            labels = [part[chunk] for part in ids], [part[chunk] for part in logp], None
        else:
            labels = ids, logp, rows[chunk]
        losses += run_implementation(logits, logits if with_gradient else None, batch, *labels, *others)
        if with_gradient:
            torch.mm(logits, weight, out=d_features[chunk])
            d_weight += _product(logits.T, features[chunk], d_weight.dtype)
            if bias is not None:
                d_bias += logits.sum(dim=0, dtype=d_bias.dtype)
        del logits  # before those of the next chunk are made
    return losses.sum(), losses, d_features, d_weight, d_bias


def _product(left: Tensor, right: Tensor, wide: torch.dtype) -> Tensor:
    """left @ right; float16 in `wide`, since stored gradients lack the factor 1 / B and their sums would overflow."""
    if left.dtype == torch.float16:
        left, right = left.to(wide), right.to(wide)
    return left @ right


def _gradients(
    features: Tensor, weight: Tensor, bias: Tensor | None, with_gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Memory for the three gradients; those summed over chunks are at least float32."""
    if not with_gradient:
        return features.new_empty(0), features.new_empty(0), features.new_empty(0)
    wide = torch.promote_types(features.dtype, torch.float32)
    d_bias = features.new_empty(0) if bias is None else torch.zeros_like(bias, dtype=wide)
    return torch.empty_like(features), torch.zeros_like(weight, dtype=wide), d_bias


def _fake(features: Tensor, weight: Tensor, bias: Tensor | None, ids, logp, rows, weights: Tensor, *others: Any):
    losses = empty_losses(features, weights)
    return losses.new_empty(()), losses, *_gradients(features, weight, bias, others[-1])


class _LinearKl(torch.autograd.Function):
    """Autograd of `linear_kl`: by features, weight and bias, of the loss alone."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, weight: Tensor, bias: Tensor | None, *labels_and_flags: Any):
        with torch._C._AutoDispatchBelowAutograd():
            output = torch.ops.repcon_kernels.linear_kl(features, weight, bias, *labels_and_flags)
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*output[2:])
        ctx.factor_scale = 1 / stored_scale(features.dtype, features.shape[0])
        ctx.starts = [0]
        ctx.implementation, ctx.dtype, ctx.has_bias = labels_and_flags[9], weight.dtype, bias is not None
        return output

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> tuple[Tensor | None, ...]:
        if upstream[0] is None:
            return (None,) * 15
        factors = upstream[0].reshape(1)
        d_features, d_weight, d_bias = ctx.saved_tensors
        d_features = backward_gradient(ctx, d_features, factors)
        d_weight = backward_gradient(ctx, d_weight, factors).to(ctx.dtype)
        if ctx.has_bias:
            d_bias = backward_gradient(ctx, d_bias[None], factors)[0].to(ctx.dtype)
        return d_features, d_weight, d_bias if ctx.has_bias else None, *[None] * 12


register("linear_kl", _linear_kl, _fake)
library.impl("linear_kl", _LinearKl.apply, "Autograd")
