"""The operators: autograd, upstream gradients, memory, torch.compile, autocast."""

from dataclasses import replace

import pytest
import torch
from kernel_cases import Case, assert_meets, compute, make, specification
from repcon_kernels import functional, multi_head_kl
from torch import Tensor

BOTH = pytest.mark.parametrize("implementation", ["torch", "triton"])


def losses_of(case: Case, logits: Tensor, implementation: str = "torch") -> Tensor:
    return multi_head_kl(
        logits,
        case.heads,
        case.ids,
        case.logp,
        rows=case.rows,
        weights=case.weights,
        implementation=implementation,
    )


@BOTH
def test_a_retained_graph_takes_other_upstream_gradients(implementation: str, device: str) -> None:
    case = make(4, [(30, 5), (20, 20)], gap=2).to(device)
    leaf = case.logits.clone().requires_grad_()
    losses = losses_of(case, leaf * 1, implementation)
    parts = [torch.autograd.grad(loss, leaf, retain_graph=True)[0].cpu() for loss in losses.unbind()]
    upstream = case.upstream.cpu()
    assert_meets(case, "uniform", losses.detach().cpu(), parts[0] * upstream[0] + parts[1] * upstream[1])
    (again,) = torch.autograd.grad((losses * case.upstream).sum(), leaf)
    torch.testing.assert_close(again.cpu(), parts[0] * upstream[0] + parts[1] * upstream[1])


@BOTH
def test_a_second_derivative_is_refused(implementation: str, device: str) -> None:
    case = make(3, [(30, 5)]).to(device)
    leaf = case.logits.clone().requires_grad_()
    losses = losses_of(case, leaf * 1, implementation)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(losses.sum(), leaf, create_graph=True)


@BOTH
def test_without_autograd_nothing_is_overwritten_nor_kept(implementation: str, device: str) -> None:
    case = make(3, [(30, 5)]).to(device)
    logits = case.logits.clone()
    wanted, _ = specification(case, "uniform")
    for inputs in (logits, logits.requires_grad_()):
        with torch.no_grad():
            losses = losses_of(case, inputs, implementation)
        assert not losses.requires_grad
        torch.testing.assert_close(losses.cpu().double(), wanted, rtol=1e-5, atol=1e-6)
    assert torch.equal(logits, case.logits)


@BOTH
def test_half_precision_with_a_loss_scale(implementation: str, device: str) -> None:
    """As a gradient scaler has it: 1 / B of a small probability is nothing in float16, and its 65536-fold is much."""
    case = make(70, [(400, 4)], dtype=torch.float16, spread=1)
    case = replace(case, upstream=torch.full((1,), 65536.0))
    _, gradient = compute(case.to(device), "bucket", implementation)
    exact = specification(case, "bucket")[1]
    error = (gradient.double() - exact).norm() / exact.norm()
    assert error < 1e-3 and gradient.isfinite().all()
    untouched = (gradient == 0) & (exact.abs() > exact.abs().median())
    assert not untouched.any()


@BOTH
def test_the_operators_hold_what_they_promise(implementation: str, device: str) -> None:
    """torch's own checks. Tracing of both passes is below: here the operator's second result, the gradient that the
    backward pass scales where it lies, would come out too."""
    case = make(3, [(30, 5), (6, 6)], gathered=True).to(device)
    labels = functional.operator_labels(
        case.heads, case.ids, case.logp, case.rows, case.weights, "bucket", implementation
    )
    logits = case.logits.clone().requires_grad_()
    operator = torch.ops.repcon_kernels.multi_head_kl.default
    utilities = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(operator, (logits, *labels, True), test_utils=utilities)


@BOTH
def test_one_operator_in_a_compiled_graph(implementation: str, device: str) -> None:
    """No graph break, the same results, also when the compiled graph is walked a second time."""
    case = make(5, [(30, 5), (20, 20)]).to(device)
    features, weight = torch.randn(5, 8, device=device), torch.randn(50, 8, device=device)

    def total(weight: Tensor) -> Tensor:
        return (losses_of(case, features @ weight.T, implementation) * case.upstream).sum()

    results = []
    for function in (total, torch.compile(total, fullgraph=True, backend="aot_eager")):
        for _ in range(2):
            leaf = weight.clone().requires_grad_()
            loss = function(leaf)
            loss.backward()
            results.append((loss.detach(), leaf.grad))
    for loss, gradient in results[1:]:
        torch.testing.assert_close(loss, results[0][0])
        torch.testing.assert_close(gradient, results[0][1])


def test_inductor(device: str) -> None:
    case = make(5, [(30, 5)])
    weight = torch.randn(30, 8, requires_grad=True)

    @torch.compile(fullgraph=True)
    def total(features: Tensor) -> Tensor:
        return losses_of(case, torch.relu(features) @ weight.T).sum()

    features = torch.randn(5, 8)
    total(features).backward()
    assert weight.grad is not None
    compiled, weight.grad = weight.grad, None
    losses_of(case, torch.relu(features) @ weight.T).sum().backward()
    torch.testing.assert_close(compiled, weight.grad)


@BOTH
def test_under_autocast(implementation: str, device: str) -> None:
    """The layer's bfloat16 logits go in as they are; losses are float32."""
    case = make(4, [(30, 5)], dtype=torch.bfloat16).to(device)
    weight = torch.randn(30, 8, device=device, requires_grad=True)
    features = torch.randn(4, 8, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        logits = torch.nn.functional.linear(features, weight)
        losses = losses_of(case, logits, implementation)
    assert logits.dtype == torch.bfloat16 and losses.dtype == torch.float32
    losses.sum().backward()
    assert weight.grad is not None and weight.grad.dtype == torch.float32
    wanted, _ = specification(replace(case, logits=logits.detach()), "uniform")
    torch.testing.assert_close(losses.detach().cpu().double(), wanted, rtol=1e-5, atol=1e-6)


def test_undefined_upstream_gradients_are_none(device: str) -> None:
    case = make(3, [(30, 5)])
    leaf = case.logits.clone().requires_grad_()
    losses = losses_of(case, leaf)
    (gradient,) = torch.autograd.grad(losses, leaf, grad_outputs=torch.zeros(1))
    assert (gradient == 0).all()
