"""Check a model's outputs: logits of the expected shape, deterministic, independent of the rest of the batch."""

from collections.abc import Callable

import torch

from repcon.runtime.device import out_of_memory
from repcon.runtime.errors import UserError

REPEAT_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 2e-2, torch.float16: 1e-2}
"""By the weights' dtype: largest difference between two outputs for one batch, relative to the outputs' range."""
BATCH_TOLERANCE = {torch.float32: 2e-2, torch.bfloat16: 1e-1, torch.float16: 5e-2}
"""The same between batches of different size, for which other kernels with other rounding (also TF32) are chosen."""
BATCH_INDEPENDENCE_ROWS = 6
"""Images of a batch that are run again in a smaller batch."""
SUM_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 2e-2, torch.float16: 5e-3}
"""Largest distance of a sum of probabilities from one."""
Model = Callable[[torch.Tensor], torch.Tensor]


def call_model(model: Model, inputs: torch.Tensor, who: str, failure: str = "") -> torch.Tensor:
    """The module's outputs. Raises UserError naming `who` where it fails, except for out-of-memory errors.

    failure: what the message says then, in place of the number of images.
    """
    try:
        return model(inputs)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # the user's code may raise anything, and may call exit()
        if out_of_memory(error):
            raise
        what = f"{type(error).__name__}: {str(error).strip()}".splitlines()[0][:300]
        failure = failure or f"its module failed with a batch of {len(inputs)}"
        raise UserError(f"{who}: {failure}: {what}") from error


def check_logits_shape(outputs: object, shape: tuple[int, int], who: str) -> torch.Tensor:
    """Gives the outputs back. Raises UserError unless they are a floating-point tensor of the shape (B, C)."""
    if not isinstance(outputs, torch.Tensor):
        kind = f"{type(outputs).__module__}.{type(outputs).__qualname__}".removeprefix("builtins.")
        hint = "wrap it in a module that returns its logits alone"
        raise UserError(f"{who}: it answers with a {kind}, and must answer (B, C) logits; {hint}")
    if outputs.shape != shape:
        raise UserError(f"{who}: its answer is {tuple(outputs.shape)}, and should be {shape}")
    if not outputs.is_floating_point():
        kind = str(outputs.dtype).removeprefix("torch.")
        raise UserError(f"{who}: its answers are {kind}, and must be logits in floating point")
    return outputs


@torch.inference_mode()
def check_deterministic(model: Model, inputs: torch.Tensor, outputs: torch.Tensor, who: str) -> None:
    """Raises UserError unless the model repeats its outputs (B, C) for the same inputs, and in smaller batches.

    inputs: those of `outputs`, in the dtype of the weights.
    """
    rows = inputs[:BATCH_INDEPENDENCE_ROWS]
    first, second = (call_model(model, rows.clone(), who).float() for _ in range(2))
    single = call_model(model, inputs[:1].clone(), who).float()
    differs = f"{who}: it answers otherwise"
    if _difference(first, second, outputs) > REPEAT_TOLERANCE[inputs.dtype]:
        cause = "dropout or other random numbers are at work, or a state that changes; call eval() on every part"
        raise UserError(f"{differs} when it is asked the same again: {cause}")
    in_batch = _difference(first, outputs[: len(first)], outputs), _difference(single, outputs[:1], outputs)
    if max(in_batch) > BATCH_TOLERANCE[inputs.dtype]:
        cause = "statistics of the batch are used, as by a batch norm in training mode; call eval() on every part"
        raise UserError(f"{differs} about an image when other images are beside it: {cause}")


def _difference(a: torch.Tensor, b: torch.Tensor, outputs: torch.Tensor) -> float:
    """The largest difference, relative to the range of the outputs plus an allowance for their rounding."""
    finite = outputs.float()
    finite = finite[finite.isfinite()]
    difference = (a.float() - b.float()).abs()
    difference = difference[difference.isfinite()]
    if not len(finite) or not len(difference):
        return 0.0
    scale = float(finite.max() - finite.min()) + 1e-3 * float(finite.abs().max()) + 1e-6
    return float(difference.max()) / scale


def check_not_probabilities(outputs: torch.Tensor, dtype: torch.dtype, who: str) -> str:
    """Raises UserError where outputs (B, C) are probabilities; returns a warning where they may be, else ''.

    dtype: the one that they were computed in.
    """
    values = outputs.float()
    if not bool((values >= 0).all()) or not values.shape[1] > 1:
        return ""
    sums = values.sum(1)
    for total, kind in ((1.0, "probabilities"), (100.0, "percentages")):
        if bool(((sums - total).abs() <= total * SUM_TOLERANCE[dtype]).all()):
            remedy = "return the logits before softmax, or the logarithms of the probabilities"
            raise UserError(f"{who}: its answers are {kind} (none negative, each row sums to {total:.0f}); {remedy}")
    if bool((values <= 1).all()):
        return f"{who}: all its answers lie between 0 and 1; if it ends in a sigmoid, return what goes into it"
    return ""


def mutual_information(logits: torch.Tensor) -> float:
    """Between image and predicted class, in nat: the mean KL of the rows' softmax (B, C) from their mean."""
    log_p = logits.float().log_softmax(1)
    mean = log_p.logsumexp(0) - torch.tensor(float(len(log_p))).log()
    terms = log_p.exp() * (log_p - mean)
    return float(terms.nan_to_num(0.0).sum(1).mean())
