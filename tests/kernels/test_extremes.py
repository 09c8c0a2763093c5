"""Both fast implementations where numbers run out: tiny tails, empty masses, NaN."""

from dataclasses import replace

import pytest
import torch
from kernel_cases import Case, assert_meets, compute, make
from repcon_kernels import LOG_TAIL_FLOOR, TAILS, HeadSpec

# The kernel's gradient at the columns of S overflows before the right one is written there, which a GPU does not mind.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
BOTH = pytest.mark.parametrize("implementation", ["torch", "triton"])


def one_row(logits: list[float], ids: list[int], logp: list[float], tail: float, temperature: float = 1.0) -> Case:
    head = HeadSpec(start=0, classes=len(logits), k=len(ids), temperature=temperature)
    return Case(
        logits=torch.tensor([logits]),
        heads=(head,),
        ids=(torch.tensor([ids]),),
        logp=(torch.tensor([[*logp, tail]]),),
        weights=torch.ones(1),
        upstream=torch.ones(1),
    )


@BOTH
@pytest.mark.parametrize("gap", [1, 5, 10, 20, 40, 80, 500, 1e4])
@pytest.mark.parametrize("classes", [6, 5000])
def test_a_tail_that_the_student_has_given_up(implementation: str, gap: float, classes: int, device: str) -> None:
    """1 - sum_S q would be noise, and soon 0; the tail's own terms are not, whatever its size."""
    logits = [gap, gap, *torch.linspace(-1, 1, classes - 2).tolist()]
    case = one_row(logits, [1, 0], [-1.0, -2.0], -0.695)
    losses, gradient = compute(case.to(device), "bucket", implementation)
    assert_meets(case, "bucket", losses, gradient)
    assert gap < 20 or gradient[0, 2:].max() < 0, "the tail must be pulled up"


@BOTH
def test_the_floor(implementation: str, device: str) -> None:
    """A tail that cannot have mass costs p_tail x 1e6 and gives no gradient, where the true loss would be infinite."""
    case = one_row([1.0, 2.0, -torch.inf, -torch.inf], [1, 0], [-1.0, -2.0], -0.695)
    losses, gradient = compute(case.to(device), "bucket", implementation)
    assert_meets(case, "bucket", losses, gradient)
    p_tail = torch.tensor([-0.695, -1.0, -2.0]).double().softmax(0)[0]
    assert float(losses) == pytest.approx(-LOG_TAIL_FLOOR * float(p_tail), rel=1e-5)
    assert (gradient[0, 2:] == 0).all() and gradient.isfinite().all()


@BOTH
@pytest.mark.parametrize("tail", TAILS)
def test_teachers_without_mass_somewhere(implementation: str, tail: str, device: str) -> None:
    empty_tail = one_row([0.3, -1.0, 2.0, 0.0, 1.0], [2, 0], [-0.1, -2.0], -torch.inf)
    assert_meets(empty_tail, tail, *compute(empty_tail.to(device), tail, implementation))
    empty_class = one_row([0.3, -1.0, 2.0, 0.0, 1.0], [2, 0, 1], [-0.1, -3.0, -torch.inf], -3.5)
    assert_meets(empty_class, tail, *compute(empty_class.to(device), tail, implementation))
    impossible = replace(empty_class, logits=torch.tensor([[0.3, -torch.inf, 2.0, 0.0, 1.0]]))
    assert_meets(impossible, tail, *compute(impossible.to(device), tail, implementation))


@BOTH
@pytest.mark.parametrize("tail", TAILS)
def test_a_whole_answer_has_no_tail_whatever_is_stored_for_it(implementation: str, tail: str, device: str) -> None:
    logits, ids, logp = [0.3, -1.0, 2.0, 0.0], [2, 0, 1, 3], [-0.4, -1.5, -2.5, -4.0]
    with_tail, without = (one_row(logits, ids, logp, mass, 2.0) for mass in (-1.0, -torch.inf))
    losses, gradient = compute(with_tail.to(device), tail, implementation)
    assert_meets(without, tail, losses, gradient)
    assert_meets(with_tail, tail, losses, gradient)


@BOTH
@pytest.mark.parametrize("classes", [5, 5000])
@pytest.mark.parametrize("lost", ["outside", "inside", "inside, without mass", "both"])
def test_logits_of_minus_infinity_under_a_uniform_tail(
    implementation: str, classes: int, lost: str, device: str
) -> None:
    """They cost an infinite loss where the teacher has mass, nothing where it has none, and drown no other logit."""
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(classes, generator=generator)
    logits[3 if lost in ("outside", "both") else 1] = -torch.inf
    if lost == "both":
        logits[1] = -torch.inf
    log_p = [-0.7, -torch.inf if lost == "inside, without mass" else -1.9]
    case = one_row(logits.tolist(), [2, 1], log_p, -1.6)
    losses, gradient = compute(case.to(device), "uniform", implementation)
    if lost == "inside, without mass":
        assert_meets(case, "uniform", losses, gradient)
    else:
        assert losses.tolist() == [torch.inf]


@BOTH
@pytest.mark.parametrize("tail", TAILS)
def test_an_id_out_of_range_is_seen_even_without_mass(implementation: str, tail: str, device: str) -> None:
    if implementation == "torch":
        return  # raises what torch raises
    case = one_row([0.3, -1.0, 2.0, 0.0, 1.0], [2, 77], [-0.1, -200.0], -torch.inf)
    losses, _ = compute(case.to(device), tail, implementation)
    assert losses.isnan().all()


@BOTH
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("classes", [196, 5000])
def test_nan_in_nan_out(implementation: str, tail: str, classes: int, device: str) -> None:
    case = make(3, [(classes, 7), (45, 5)])
    for column in (0, classes - 1, int(case.ids[0][1, 0])):
        logits = case.logits.clone()
        logits[1, column] = torch.nan
        losses, _ = compute(replace(case, logits=logits).to(device), tail, implementation)
        assert losses.isnan().tolist() == [True, False]
    for slot in (0, 7):
        if tail == "renormalise" and slot == 7:
            continue
        logp = case.logp[0].clone()
        logp[2, slot] = torch.nan
        losses, _ = compute(replace(case, logp=(logp, case.logp[1])).to(device), tail, implementation)
        assert losses.isnan().tolist() == [True, False]


@BOTH
@pytest.mark.parametrize("tail", TAILS)
def test_ties(implementation: str, tail: str, device: str) -> None:
    case = make(3, [(64, 8), (5000, 8)])
    case = replace(case, logits=torch.zeros_like(case.logits))
    assert_meets(case, tail, *compute(case.to(device), tail, implementation))


@BOTH
@pytest.mark.parametrize("temperature", [0.05, 50.0])
def test_temperatures(implementation: str, temperature: float, device: str) -> None:
    torch.manual_seed(0)
    tail = -0.3 / temperature + 5
    case = one_row((3 * torch.randn(40)).tolist(), [7, 3, 11], [-0.2, -1.5, -3.0], tail, temperature)
    for mode in TAILS:
        assert_meets(case, mode, *compute(case.to(device), mode, implementation))


@BOTH
def test_a_head_without_weight_is_silent(implementation: str, device: str) -> None:
    case = make(3, [(20, 3), (30, 4)])
    case = replace(case, weights=torch.tensor([0.0, 1.0]))
    losses, gradient = compute(case.to(device), "bucket", implementation)
    assert losses[0] == 0 and (gradient[:, :20] == 0).all() and (gradient[:, 20:] != 0).any()
