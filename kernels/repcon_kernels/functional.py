"""The public loss functions: `multi_head_kl` of logits, `linear_kl` of features and a linear layer."""

from collections.abc import Sequence

import torch
from torch import Tensor

from repcon_kernels import linear_kl_div
from repcon_kernels.kl_div.heads import HeadSpec, check_values, validate, validate_targets

IMPLEMENTATIONS = ("torch", "triton", "reference")


def multi_head_kl(
    logits: Tensor,
    heads: Sequence[HeadSpec],
    ids: Sequence[Tensor],
    logp: Sequence[Tensor],
    *,
    rows: Tensor | None = None,
    weights: Tensor,
    tail: str = "uniform",
    implementation: str = "torch",
    inplace_gradient: bool = False,
    check: bool = False,
) -> Tensor:
    """KL losses (H,) of all heads: weights[h] x temperature_h^2 x mean over rows of head h's KL. Minimise their sum.

    logits: (B, columns) float32, bfloat16, float16 (and float64, not for "triton"), contiguous. Sums are in float32.
    heads: H heads in the order of their columns; free columns between them get the gradient 0.
    ids: for each head (R, k) uint16, uint32, int32 or int64, as stored. Distinct within a row.
    logp: for each head (R, k + T) float16 or wider: log-probabilities at temperature 1, then the log-tails.
    rows: (B,) int64, the label row of each row of logits; None where R = B and they correspond.
    weights: (H,) float32.
    tail: how classes that are not stored count: "bucket", "renormalise" or "uniform", see `kl_div.reference`.
    implementation: "torch", "triton" (one launch for all heads) or "reference" (slow, dense).
    inplace_gradient: write the gradient over the logits, which must not be used afterwards.
    check: also check the values of ids and rows, which waits for the device. Without it, a value out of range gives a
        NaN loss with "triton", and an error of torch's with "torch".

    Returns float32 (float64 for float64 logits). Raises ValueError for shapes, dtypes, layouts and devices that do not
    fit, RuntimeError on a second derivative. NaN logits or labels make the loss NaN.
    """
    validate(logits, heads, ids, logp, rows, weights, tail)
    _validate_implementation(implementation)
    if check:
        check_values(heads, ids, rows)
    if implementation == "reference":
        from repcon_kernels.kl_div import reference

        wide = logits if logits.dtype == torch.float64 else logits.float()
        return reference.multi_head_kl(wide, heads, ids, logp, rows=rows, weights=weights, tail=tail)
    labels = _labels(heads, ids, logp, rows, weights, tail, implementation)
    with_gradient = logits.requires_grad and torch.is_grad_enabled()
    if inplace_gradient and with_gradient:
        base = logits._base
        if logits.is_leaf or (base is not None and base.is_leaf and base.requires_grad):
            raise ValueError("inplace_gradient would overwrite logits that are a leaf: nothing computed them")
        return torch.ops.repcon_kernels.multi_head_kl_(logits, *labels)
    return torch.ops.repcon_kernels.multi_head_kl(logits, *labels, with_gradient)[0]


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
    linear_kl_div.validate(features, weight, bias, chunk_rows)
    validate_targets(features.shape[0], weight.shape[0], features.device, heads, ids, logp, rows, weights, tail)
    _validate_implementation(implementation)
    if check:
        check_values(heads, ids, rows)
    if implementation == "reference":
        logits = torch.nn.functional.linear(features, weight, bias)
        losses = multi_head_kl(
            logits, heads, ids, logp, rows=rows, weights=weights, tail=tail, implementation="reference"
        )
        return losses.sum(), losses.detach()
    labels = _labels(heads, ids, logp, rows, weights, tail, implementation)
    needed = any(tensor is not None and tensor.requires_grad for tensor in (features, weight, bias))
    with_gradient = needed and torch.is_grad_enabled()
    loss, losses, *_ = torch.ops.repcon_kernels.linear_kl(features, weight, bias, *labels, chunk_rows, with_gradient)
    return loss, losses


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast as autocast does, which leaves float64 unchanged."""
    return tensor if tensor.dtype == torch.float64 else tensor.to(dtype)


def _validate_implementation(implementation: str) -> None:
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation must be one of {', '.join(IMPLEMENTATIONS)}, not {implementation!r}")


def _labels(
    heads: Sequence[HeadSpec],
    ids: Sequence[Tensor],
    logp: Sequence[Tensor],
    rows: Tensor | None,
    weights: Tensor,
    tail: str,
    implementation: str,
) -> tuple:
    """The arguments that all operators share."""
    starts = [head.start for head in heads]
    classes = [head.classes for head in heads]
    tail_columns = [head.tail_column for head in heads]
    temperatures = [float(head.temperature) for head in heads]
    return list(ids), list(logp), rows, weights, starts, classes, tail_columns, temperatures, tail, implementation
