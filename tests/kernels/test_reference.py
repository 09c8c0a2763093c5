"""The specification against formulas written out in numpy, and against torch's own KL."""

import numpy as np
import pytest
import torch
from kernel_cases import make, specification, stored
from repcon_kernels import HeadSpec, multi_head_kl
from repcon_kernels.kl_div import reference


def by_hand(logits: np.ndarray, ids: np.ndarray, logp: np.ndarray, tail_log: float, t: float, tail: str) -> float:
    """One row, one head, in probabilities."""
    q = np.exp(logits / t) / np.exp(logits / t).sum()
    u = np.exp(logp / t)
    tail_mass = 0.0 if tail == "renormalise" else np.exp(tail_log)
    p, p_tail = u / (u.sum() + tail_mass), tail_mass / (u.sum() + tail_mass)
    loss = (p * np.log(p / q[ids])).sum()
    others = np.setdiff1d(np.arange(len(logits)), ids)
    if tail == "bucket":
        loss += p_tail * np.log(p_tail / q[others].sum())
    if tail == "uniform":
        each = p_tail / len(others)
        loss += (each * np.log(each / q[others])).sum()
    return t * t * loss


@pytest.mark.parametrize("tail", ["bucket", "renormalise", "uniform"])
def test_a_row_written_out(tail: str) -> None:
    generator = np.random.default_rng(0)
    logits, ids = generator.normal(size=7), np.array([5, 0, 3])
    logp, tail_log = np.log([0.5, 0.2, 0.1]), np.log(0.9)
    losses = reference.multi_head_kl(
        torch.tensor(logits)[None],
        [HeadSpec(start=0, classes=7, k=3, temperature=2.0)],
        [torch.tensor(ids)[None]],
        [torch.tensor([*logp, tail_log])[None]],
        weights=torch.tensor([0.5]),
        tail=tail,
    )
    assert losses.tolist() == pytest.approx([0.5 * by_hand(logits, ids, logp, tail_log, 2.0, tail)])


@pytest.mark.parametrize("tail", ["bucket", "renormalise", "uniform"])
def test_a_head_stored_whole_is_the_dense_loss(tail: str) -> None:
    torch.manual_seed(0)
    teacher, student, t = torch.randn(4, 9).double(), torch.randn(4, 9).double(), 3.0
    log_p, ids = teacher.log_softmax(1).sort(descending=True)
    dense = torch.nn.functional.kl_div(
        (student / t).log_softmax(1), (teacher / t).log_softmax(1), log_target=True, reduction="batchmean"
    )
    loss = reference.multi_head_kl(
        student,
        [HeadSpec(start=0, classes=9, k=9, temperature=t)],
        [ids],
        [torch.cat([log_p, torch.full((4, 1), -torch.inf)], dim=1)],
        weights=torch.ones(1),
        tail=tail,
    )
    assert loss.item() == pytest.approx(float(dense) * t * t)


def test_the_bucket_of_its_own_answer_costs_nothing_and_pulls_nowhere() -> None:
    logits = torch.randn(5, 30, dtype=torch.float64, requires_grad=True)
    log_p, ids = (logits.detach() / 1).log_softmax(1).topk(4)
    tail = logits.detach().log_softmax(1).scatter(1, ids, -torch.inf).logsumexp(1, keepdim=True)
    head = HeadSpec(start=0, classes=30, k=4)
    logp, weights = torch.cat([log_p, tail], dim=1), torch.ones(1)
    loss = reference.multi_head_kl(logits, [head], [ids], [logp], weights=weights, tail="bucket")
    loss.sum().backward()
    assert loss.item() == pytest.approx(0, abs=1e-12)
    assert logits.grad is not None and logits.grad.abs().max() < 1e-12


def test_the_loss_is_linear_in_weights_and_a_mean_over_rows() -> None:
    case = make(6, [(11, 3), (5, 5)])
    losses, _ = specification(case, "uniform")
    rows = [
        multi_head_kl(
            case.logits[i : i + 1].double(),
            case.heads,
            [part[i : i + 1] for part in case.ids],
            [part[i : i + 1] for part in case.logp],
            weights=torch.ones(2),
            implementation="reference",
        )
        for i in range(6)
    ]
    torch.testing.assert_close(losses, torch.stack(rows).mean(0) * case.weights)


def test_values_out_of_range_are_always_found() -> None:
    ids, logp = stored(torch.randn(4, 6), 2)
    head = HeadSpec(start=0, classes=6, k=2)
    wrong = ids.long()
    wrong[2, 1] = 6
    with pytest.raises(ValueError, match=r"class ids reach from \d to 6; it has 6 classes"):
        reference.multi_head_kl(torch.zeros(4, 6), [head], [wrong], [logp], weights=torch.ones(1))
    with pytest.raises(ValueError, match="rows 0 to 4 were asked for; the labels have 4"):
        reference.multi_head_kl(
            torch.zeros(2, 6), [head], [ids], [logp], rows=torch.tensor([0, 4]), weights=torch.ones(1)
        )
