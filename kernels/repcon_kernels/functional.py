"""The loss `multi_head_kl` of logits: its arguments, and the registered operators with autograd behind it.

`linear_kl_div` adds an operator with the linear layer. Each operator takes the implementation by name.

The gradient is computed in the forward pass for an upstream gradient of 1; the backward pass multiplies it by the real
one (`scale_heads_`). In float16, where a probability / B would underflow, the stored gradient is larger by
`stored_scale`, a power of two near B.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from repcon_kernels.kl_div import sparse
from repcon_kernels.kl_div.heads import HeadSpec, check_values, describe, validate

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
    check: also check the values of ids and rows, which waits for the device. Without it, a value out of range gives a
        NaN loss with "triton", and an error of torch's with "torch".

    Returns float32 (float64 for float64 logits). Raises ValueError for shapes, dtypes, layouts and devices that do not
    fit, RuntimeError on a second derivative. NaN logits or labels make the loss NaN.
    """
    validate(logits, heads, ids, logp, rows, weights, tail)
    validate_implementation(implementation)
    if check:
        check_values(heads, ids, rows)
    if implementation == "reference":
        from repcon_kernels.kl_div import reference

        wide = logits if logits.dtype == torch.float64 else logits.float()
        return reference.multi_head_kl(wide, heads, ids, logp, rows=rows, weights=weights, tail=tail)
    labels = operator_labels(heads, ids, logp, rows, weights, tail, implementation)
    with_gradient = logits.requires_grad and torch.is_grad_enabled()
    return torch.ops.repcon_kernels.multi_head_kl(logits, *labels, with_gradient)[0]


def validate_implementation(implementation: str) -> None:
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation must be one of {', '.join(IMPLEMENTATIONS)}, not {implementation!r}")


def operator_labels(
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


LABELS = (
    "Tensor[] ids, Tensor[] logp, Tensor? rows, Tensor weights, int[] starts, int[] classes, int[] tail_columns, "
    "float[] temperatures, str tail, str implementation"
)

library = torch.library.Library("repcon_kernels", "DEF")
library.define(f"multi_head_kl(Tensor logits, {LABELS}, bool with_gradient) -> (Tensor, Tensor)")
library.define(
    "scale_heads_(Tensor(a!) gradient, Tensor factors, float factor_scale, int[] starts, str implementation) -> ()"
)


def implementation_module(implementation: str, values: Tensor) -> Any:
    """The module `sparse` or `launch`. Raises ValueError where Triton is asked for and cannot run on these tensors."""
    if implementation == "torch":
        return sparse
    try:
        from repcon_kernels.kl_div import launch
    except ImportError as error:
        raise ValueError(f"implementation 'triton' needs the package triton ({error}); 'torch' does without") from error
    if values.dtype == torch.float64:
        raise ValueError(f"implementation 'triton' takes float32, bfloat16 and float16 logits, not {describe(values)}")
    if values.device.type == "cpu" and not launch.interpreted():
        raise ValueError("implementation 'triton' needs a GPU (or TRITON_INTERPRET=1, slowly); 'torch' runs on the CPU")
    return launch


def head_specs(
    ids: Sequence[Tensor],
    starts: Sequence[int],
    classes: Sequence[int],
    tail_columns: Sequence[int],
    temperatures: Sequence[float],
) -> tuple[HeadSpec, ...]:
    """Head specifications from an operator's flat arguments."""
    columns = zip(ids, starts, classes, tail_columns, temperatures, strict=True)
    return tuple(
        HeadSpec(start=start, classes=count, k=head_ids.shape[1], temperature=temperature, tail_column=tail_column)
        for head_ids, start, count, tail_column, temperature in columns
    )


def stored_scale(dtype: torch.dtype, batch: int) -> float:
    """The factor by which stored gradients are larger than those for an upstream gradient of 1."""
    return float(1 << (int(batch).bit_length() - 1)) if dtype == torch.float16 else 1.0


def run_implementation(logits: Tensor, gradient: Tensor | None, batch: int, *labels: Any) -> Tensor:
    """Losses (H,), and the stored gradient where memory for it is given, of `logits`: all of the batch or a chunk."""
    ids, logp, rows, weights, starts, classes, tail_columns, temperatures, tail, implementation = labels
    heads = head_specs(ids, starts, classes, tail_columns, temperatures)
    run = implementation_module(implementation, logits).multi_head_kl
    scale = stored_scale(logits.dtype, batch) / batch
    return run(logits, gradient, heads, ids, logp, rows, weights, tail, 1 / batch, scale)


def _kl(logits: Tensor, *labels_and_flag: Any) -> tuple[Tensor, Tensor]:
    *labels, with_gradient = labels_and_flag
    gradient = torch.empty_like(logits) if with_gradient else None
    losses = run_implementation(logits, gradient, len(logits), *labels)
    return losses, logits.new_empty(0) if gradient is None else gradient


def empty_losses(logits: Tensor, weights: Tensor) -> Tensor:
    """(H,) uninitialised losses, at least float32."""
    return weights.new_empty(weights.shape, dtype=torch.promote_types(logits.dtype, torch.float32))


def _fake_kl(logits: Tensor, ids, logp, rows, weights: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    with_gradient = others[-1]
    return empty_losses(logits, weights), torch.empty_like(logits) if with_gradient else logits.new_empty(0)


def _scale(gradient: Tensor, factors: Tensor, factor_scale: float, starts: Sequence[int], implementation: str) -> None:
    implementation_module(implementation, gradient).scale_heads(gradient, factors, factor_scale, starts)


def backward_gradient(ctx: Any, gradient: Tensor, factors: Tensor) -> Tensor:
    """The stored gradient x the upstream `factors`, one for each of `ctx.starts`; in place if the graph is not kept.

    Raises RuntimeError under create_graph=True: the stored gradient has no derivative.
    """
    if torch.is_grad_enabled():
        raise RuntimeError("multi_head_kl has no second derivative: call backward without create_graph=True")
    # A retained graph may run backward again with other upstream gradients.
    retained = torch._C._autograd._get_current_graph_task_keep_graph()  # pyright: ignore[reportAttributeAccessIssue]
    result = gradient.clone() if retained else gradient
    torch.ops.repcon_kernels.scale_heads_(result, factors, ctx.factor_scale, ctx.starts, ctx.implementation)
    return result


class _MultiHeadKl(torch.autograd.Function):
    """Autograd of `multi_head_kl`."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, *labels_and_flag: Any) -> tuple[Tensor, Tensor]:
        with torch._C._AutoDispatchBelowAutograd():
            losses, gradient = torch.ops.repcon_kernels.multi_head_kl(logits, *labels_and_flag)
        ctx.mark_non_differentiable(gradient)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(gradient)
        ctx.factor_scale = 1 / stored_scale(gradient.dtype, gradient.shape[0])
        ctx.starts, ctx.implementation = labels_and_flag[4], labels_and_flag[9]
        return losses, gradient

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        if upstream[0] is None:
            return (None,) * 12
        return backward_gradient(ctx, gradient, upstream[0]), *[None] * 11


def register(name: str, run: Callable, fake: Callable) -> None:
    """Register one implementation for all devices, and a fake one for tensors without data."""
    library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"repcon_kernels::{name}", fake, lib=library)


register("multi_head_kl", _kl, _fake_kl)
register("scale_heads_", _scale, lambda *_: None)
library.impl("multi_head_kl", _MultiHeadKl.apply, "Autograd")
