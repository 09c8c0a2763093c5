"""The implementation in torch operations: its hand-derived gradient, its precision, its extremes."""

import pytest
import torch
from kernel_cases import assert_meets, compute, make, specification
from repcon_kernels import TAILS, multi_head_kl


@pytest.mark.parametrize("tail", TAILS)
def test_gradcheck(tail: str) -> None:
    case = make(3, [(7, 2), (4, 4), (9, 8)], gap=1, gathered=True)
    logits = case.logits.double().requires_grad_()

    def losses(logits: torch.Tensor) -> torch.Tensor:
        return multi_head_kl(logits, case.heads, case.ids, case.logp, rows=case.rows, weights=case.weights, tail=tail)

    assert torch.autograd.gradcheck(losses, (logits,))


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("in_place", [False, True])
def test_it_meets_the_specification(tail: str, dtype: torch.dtype, in_place: bool) -> None:
    case = make(5, [(1000, 16), (2, 1), (45, 45), (196, 7)], dtype=dtype, gap=3, gathered=True)
    assert_meets(case, tail, *compute(case, tail, "torch", in_place=in_place))


@pytest.mark.parametrize("batch", [1, 41])
def test_batches(batch: int) -> None:
    case = make(batch, [(21841, 16), (3, 2)])
    assert_meets(case, "bucket", *compute(case, "bucket", "torch"))


@pytest.mark.parametrize("spread", [1e2, 1e4])
@pytest.mark.parametrize("tail", TAILS)
def test_large_logits(spread: float, tail: str) -> None:
    case = make(4, [(50, 5), (12, 12)], spread=spread)
    losses, gradient = compute(case, tail, "torch")
    assert_meets(case, tail, losses, gradient)
    assert losses.isfinite().all() and gradient.isfinite().all()


def test_memory_is_not_a_dense_targets() -> None:
    """One buffer of the logits' size (the gradient) and row-wise small change; a dense target would be a second."""
    case = make(64, [(4000, 8)])
    logits = case.logits.clone().requires_grad_()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        multi_head_kl(logits, case.heads, case.ids, case.logp, weights=case.weights)
    held = highest = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            highest = max(highest, held)
    assert highest < 1.1 * logits.nbytes


def test_the_specification_is_not_at_hand_to_fall_back_to() -> None:
    case = make(2, [(6, 2)])
    losses, _ = compute(case, "bucket", "torch")
    assert losses.dtype == torch.float32
    assert specification(case, "bucket")[0].dtype == torch.float64
