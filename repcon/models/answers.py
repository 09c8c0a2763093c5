"""Check a model's answers: of the right form, the same each time, and whatever else is in the batch."""

from collections.abc import Callable

import torch

from repcon.runtime.device import out_of_memory
from repcon.runtime.errors import UserError

REPEAT = {torch.float32: 1e-3, torch.bfloat16: 2e-2, torch.float16: 1e-2}
"""Largest difference between two answers about one batch, as a share of the answers' range, by the weights' dtype."""
COMPANY = {torch.float32: 2e-2, torch.bfloat16: 1e-1, torch.float16: 5e-2}
"""The same between one batch and another: kernels are chosen by size, and round otherwise (TF32 among them)."""
COMPANY_ROWS = 6
SUMS = {torch.float32: 1e-3, torch.bfloat16: 2e-2, torch.float16: 5e-3}
"""How far sums of probabilities may be from one."""
Answer = Callable[[torch.Tensor], torch.Tensor]


def asked(answer: Answer, inputs: torch.Tensor, who: str) -> torch.Tensor:
    """What the user's module answers. Raises UserError naming `who`, where it fails; memory errors pass."""
    try:
        return answer(inputs)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # the user's code may raise anything, and may call exit()
        if isinstance(error, RuntimeError) and out_of_memory(error):
            raise
        what = f"{type(error).__name__}: {str(error).strip()}".splitlines()[0][:300]
        raise UserError(f"{who}: its module failed with a batch of {len(inputs)}: {what}") from error


def require_logits_of(answers: object, shape: tuple[int, int], who: str) -> torch.Tensor:
    """Gives back answers that are a floating-point tensor of the shape (B, C); raises UserError for anything else."""
    if not isinstance(answers, torch.Tensor):
        kind = f"{type(answers).__module__}.{type(answers).__qualname__}".removeprefix("builtins.")
        hint = "wrap it in a module that returns its logits alone"
        raise UserError(f"{who}: it answers with a {kind}, and must answer (B, C) logits; {hint}")
    if answers.shape != shape:
        raise UserError(f"{who}: its answer is {tuple(answers.shape)}, and should be {shape}")
    if not answers.is_floating_point():
        kind = str(answers.dtype).removeprefix("torch.")
        raise UserError(f"{who}: its answers are {kind}, and must be logits in floating point")
    return answers


@torch.inference_mode()
def require_repeatable(answer: Answer, inputs: torch.Tensor, first: torch.Tensor, who: str) -> None:
    """Raises UserError unless images are answered for as in `first` (B, C) again, and alone, and with fewer others.

    inputs: what `first` is the answer to, in the dtype of the weights.
    """
    rows = inputs[:COMPANY_ROWS]
    again, twice = (asked(answer, rows.clone(), who).float() for _ in range(2))
    alone = asked(answer, inputs[:1].clone(), who).float()
    place = f"{who}: it answers otherwise"
    if _apart(again, twice, first) > REPEAT[inputs.dtype]:
        cause = "dropout or other random numbers are at work, or a state that changes; call eval() on every part"
        raise UserError(f"{place} when it is asked the same again: {cause}")
    if max(_apart(again, first[: len(again)], first), _apart(alone, first[:1], first)) > COMPANY[inputs.dtype]:
        cause = "statistics of the batch are used, as by a batch norm in training mode; call eval() on every part"
        raise UserError(f"{place} about an image when other images are beside it: {cause}")


def _apart(one: torch.Tensor, other: torch.Tensor, all_answers: torch.Tensor) -> float:
    """The largest difference, as a share of the range of the answers, less what rounding of their size explains."""
    held = all_answers.float()
    held = held[held.isfinite()]
    difference = (one.float() - other.float()).abs()
    difference = difference[difference.isfinite()]
    if not len(held) or not len(difference):
        return 0.0
    scale = float(held.max() - held.min()) + 1e-3 * float(held.abs().max()) + 1e-6
    return float(difference.max()) / scale


def require_logits(answers: torch.Tensor, dtype: torch.dtype, who: str) -> str:
    """Raises UserError where answers (B, C) are probabilities, and gives a warning where they may be; else ''.

    dtype: the one that they were computed in.
    """
    values = answers.float()
    if not bool((values >= 0).all()) or not values.shape[1] > 1:
        return ""
    sums = values.sum(1)
    for whole, kind in ((1.0, "probabilities"), (100.0, "percentages")):
        if bool(((sums - whole).abs() <= whole * SUMS[dtype]).all()):
            remedy = "return the logits before softmax, or the logarithms of the probabilities"
            raise UserError(f"{who}: its answers are {kind} (none negative, each row sums to {whole:.0f}); {remedy}")
    if bool((values <= 1).all()):
        return f"{who}: all its answers lie between 0 and 1; if it ends in a sigmoid, return what goes into it"
    return ""


def information(answers: torch.Tensor) -> float:
    """How much of the answers (B, C) depends on the image, in nat: the mean KL from their mean to each of them."""
    log_p = answers.float().log_softmax(1)
    mean = log_p.logsumexp(0) - torch.tensor(float(len(log_p))).log()
    terms = log_p.exp() * (log_p - mean)
    return float(terms.nan_to_num(0.0).sum(1).mean())
