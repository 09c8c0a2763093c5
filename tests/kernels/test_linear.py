"""Linear layer and loss in one, against the two apart."""

from dataclasses import replace

import pytest
import torch
from kernel_cases import Case, make
from repcon_kernels import linear_kl
from torch import Tensor

BOTH = pytest.mark.parametrize("implementation", ["torch", "triton"])


def layer(columns: int, batch: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Features (batch, 12), weight (columns, 12), bias (columns,), all leaves."""
    torch.manual_seed(1)
    shapes = ((batch, 12), (columns, 12), (columns,))
    return tuple(torch.randn(shape, dtype=dtype, device=device).requires_grad_() for shape in shapes)


def run(case: Case, parts: tuple[Tensor, Tensor, Tensor | None], implementation: str, chunk_rows: int = 0):
    """Loss, losses and gradients of 3 x loss."""
    loss, losses = linear_kl(
        *parts,
        case.heads,
        case.ids,
        case.logp,
        rows=case.rows,
        weights=case.weights,
        implementation=implementation,
        chunk_rows=chunk_rows,
        check=True,
    )
    return loss, losses, torch.autograd.grad(3 * loss, [part for part in parts if part is not None])


@BOTH
@pytest.mark.parametrize("chunk_rows", [0, 1, 3, 100])
@pytest.mark.parametrize("gathered", [False, True])
def test_it_is_the_two_apart(implementation: str, chunk_rows: int, gathered: bool, device: str) -> None:
    case = make(7, [(30, 5), (20, 20)], gathered=gathered, gap=2).to(device)
    parts = layer(54, 7, torch.float32, device)
    loss, losses, gradients = run(case, parts, implementation, chunk_rows)
    wanted_loss, wanted_losses, wanted = run(case, parts, "reference")
    torch.testing.assert_close(loss, wanted_loss)
    torch.testing.assert_close(losses, wanted_losses)
    assert not losses.requires_grad
    for gradient, expected in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)


@BOTH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(implementation: str, dtype: torch.dtype, device: str) -> None:
    """No further from the float32 result than twice the layer and the specification run in `dtype` are."""
    case = make(40, [(30, 5), (20, 20)]).to(device)
    parts = layer(50, 40, torch.float32, device)
    low = tuple(part.detach().to(dtype).requires_grad_() for part in parts)
    same = tuple(part.detach().float().requires_grad_() for part in low)
    _, _, exact = run(case, same, "reference")
    _, _, coarse = run(case, low, "reference")
    _, _, gradients = run(case, low, implementation, chunk_rows=16)
    for gradient, rough, expected in zip(gradients, coarse, exact, strict=True):
        assert gradient.dtype == dtype
        room = 2 * (rough.float() - expected).norm() + torch.finfo(dtype).eps * expected.norm()
        assert (gradient.float() - expected).norm() <= room


def test_autocast_without_bias_and_frozen_parts(device: str) -> None:
    case = make(7, [(30, 5)])
    features, weight, _ = layer(30, 7, torch.float32, "cpu")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = linear_kl(features.detach(), weight, None, case.heads, case.ids, case.logp, weights=case.weights)
    loss.backward()
    assert weight.grad is not None and weight.grad.dtype == torch.float32
    with torch.no_grad():
        again, _ = linear_kl(features, weight, None, case.heads, case.ids, case.logp, weights=case.weights)
    assert not again.requires_grad and float(again) == pytest.approx(float(loss.detach()), rel=0.02)


def test_a_retained_graph_and_a_second_derivative(device: str) -> None:
    case = make(7, [(30, 5)])
    parts = layer(30, 7, torch.float32, "cpu")
    loss, _ = linear_kl(*parts, case.heads, case.ids, case.logp, weights=case.weights)
    first = torch.autograd.grad(2 * loss, parts, retain_graph=True)
    second = torch.autograd.grad(4 * loss, parts, retain_graph=True)
    for one, two in zip(first, second, strict=True):
        torch.testing.assert_close(2 * one, two)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, parts, create_graph=True)


def test_compiled(device: str) -> None:
    case = make(7, [(30, 5)])
    parts = layer(30, 7, torch.float32, "cpu")
    compiled = torch.compile(
        lambda *parts: linear_kl(*parts, case.heads, case.ids, case.logp, weights=case.weights)[0],
        fullgraph=True,
        backend="aot_eager",
    )
    wanted = run(case, parts, "torch")[2]
    for gradient, expected in zip(torch.autograd.grad(3 * compiled(*parts), parts), wanted, strict=True):
        torch.testing.assert_close(gradient, expected)


def test_the_logits_are_never_whole() -> None:
    """Peak memory of both passes: the gradients and a chunk, not (B, columns) twice."""
    case = make(256, [(3000, 8)])
    parts = layer(3000, 256, torch.float32, "cpu")
    whole = 256 * 3000 * 4
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        loss, _ = linear_kl(*parts, case.heads, case.ids, case.logp, weights=case.weights, chunk_rows=16)
        loss.backward()
    held = highest = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            highest = max(highest, held)
    gradients = sum(part.nbytes for part in parts)
    assert highest < 3 * gradients + 3 * whole * 16 / 256


def test_mistakes(device: str) -> None:
    case = make(7, [(30, 5)])
    features, weight, bias = layer(30, 7, torch.float32, "cpu")

    def refused(match: str, features: Tensor, weight: Tensor, bias: Tensor, case: Case = case, **others: int) -> None:
        with pytest.raises(ValueError, match=match):
            linear_kl(features, weight, bias, case.heads, case.ids, case.logp, weights=case.weights, **others)

    refused("features must be", features[:, 0], weight, bias)
    refused(r"weight must be \(columns, 12\)", features, weight[:, :4], bias)
    refused(r"bias must be \(30,\)", features, weight, bias[:4])
    refused("tensors differ", features, weight.double(), bias)
    refused("chunk_rows", features, weight, bias, chunk_rows=-1)
    refused("7 rows of ids.*for 3 rows", features[:3], weight, bias)
    refused("1 heads, but 2 tensors", features, weight, bias, replace(case, ids=(*case.ids, *case.ids)))


def test_the_weights_gradient_in_float16_does_not_overflow(device: str) -> None:
    """65,536 rows that pull the same way, as at the start of training."""
    case = make(2, [(10, 4)]).to(device)
    rows = torch.zeros(2**16, dtype=torch.int64, device=device)
    case = replace(case, rows=rows, heads=tuple(replace(head, temperature=4.0) for head in case.heads))
    features = torch.full((len(rows), 12), 2.0, dtype=torch.float16, device=device).requires_grad_()
    weight = torch.zeros(10, 12, dtype=torch.float16, device=device).requires_grad_()
    *_, (_, found) = run(case, (features, weight, None), "torch")
    wide = [part.detach().float().requires_grad_() for part in (features, weight)]
    *_, (_, wanted) = run(case, (wide[0], wide[1], None), "torch")
    torch.testing.assert_close(found.float(), wanted, rtol=2e-2, atol=2e-2)


def test_autocast_leaves_float64_alone(device: str) -> None:
    case = make(3, [(10, 4)]).to(device)
    parts = layer(10, 3, torch.float64, device)
    with torch.autocast(device, torch.bfloat16):
        loss, _, _ = run(case, parts, "torch")
    assert loss.dtype == torch.float64
