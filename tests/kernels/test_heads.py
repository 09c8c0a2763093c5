"""What is refused before anything is computed, and how it is said."""

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from kernel_cases import Case, make
from repcon_kernels import HeadSpec, multi_head_kl


def call(case: Case, **others: Any) -> torch.Tensor:
    return multi_head_kl(
        case.logits, case.heads, case.ids, case.logp, **{"rows": case.rows, "weights": case.weights, **others}
    )


CASE = make(4, [(30, 5), (20, 20)], gathered=True)
FIRST, SECOND = CASE.heads


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logits": CASE.logits[0]}, "logits must be (B, C) floating point with B > 0, not (50,) float32 on cpu"),
        ({"logits": CASE.logits[:0]}, "logits must be (B, C) floating point with B > 0, not (0, 50)"),
        ({"logits": CASE.logits.long()}, "int64"),
        ({"logits": CASE.logits.T.contiguous().T}, "logits must be contiguous, not of strides (1, 4)"),
        (
            {"logits": CASE.logits[:, :49].contiguous()},
            "head 1 takes the columns 30 to 50, which do not fit in 49 logits",
        ),
        (
            {"heads": (FIRST, replace(SECOND, start=29))},
            "head 0 takes the columns 0 to 30, which overlap the next head's",
        ),
        ({"heads": (SECOND, FIRST)}, "overlap"),
        ({"heads": ()}, "no heads were given"),
        ({"ids": CASE.ids[:1]}, "2 heads, but 1 tensors of ids and 2 of log-probabilities"),
        ({"ids": (CASE.ids[0][:, :4].contiguous(), CASE.ids[1])}, "head 0: ids must be contiguous (R, 5)"),
        ({"ids": (CASE.ids[0].long().T.contiguous().T, CASE.ids[1])}, "int64 on cpu, not contiguous"),
        ({"ids": (CASE.ids[0].float(), CASE.ids[1])}, "not (11, 5) float32"),
        ({"logp": (CASE.logp[0][:, :5].contiguous(), CASE.logp[1])}, "head 0: log-probabilities have 5 columns; k = 5"),
        ({"logp": (CASE.logp[0].long(), CASE.logp[1])}, "head 0: log-probabilities must be contiguous"),
        ({"logp": (CASE.logp[0][:7], CASE.logp[1])}, "head 0: 11 rows of ids and 7 of log-probabilities"),
        ({"ids": (CASE.ids[0][:7], CASE.ids[1]), "logp": (CASE.logp[0][:7], CASE.logp[1])}, "differ in their rows"),
        ({"rows": None}, "head 0: 11 rows of ids and 11 of log-probabilities for 4 rows of logits"),
        ({"rows": torch.zeros(3, dtype=torch.int64)}, "rows must be (4,) int64"),
        ({"rows": torch.zeros(4, dtype=torch.int32)}, "rows must be (4,) int64, not (4,) int32"),
        ({"weights": torch.ones(3)}, "weights must be (2,) float32"),
        ({"weights": torch.ones(2).requires_grad_()}, "without gradient"),
    ],
)
def test_what_does_not_fit_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        call(replace(CASE, **changes))


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ({"tail": "buckets"}, "tail must be one of bucket, renormalise, uniform, not 'buckets'"),
        ({"implementation": "cuda"}, "implementation must be one of torch, triton, reference, not 'cuda'"),
    ],
)
def test_unknown_names(others: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        call(CASE, **others)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": 31}, "k must lie between 1 and the head's 30 classes, not 31"),
        ({"k": 0}, "k must lie between 1"),
        ({"classes": 1, "k": 1}, "at least 2 classes"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"temperature": float("nan")}, "temperature must be positive"),
        ({"start": -1}, "must not be negative"),
        ({"tail_column": -1}, "must not be negative"),
    ],
)
def test_heads_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        HeadSpec(**{"start": 0, "classes": 30, "k": 5, **changes})


def test_values_are_checked_on_request() -> None:
    ids = CASE.ids[0].long()
    ids[int(CASE.rows[1]), 3] = -2
    wrong = replace(CASE, ids=(ids, CASE.ids[1]))
    with pytest.raises(ValueError, match="head 0: class ids reach from -2"):
        call(wrong, check=True)
    with pytest.raises(ValueError, match="rows 0 to 11 were asked for; the labels have 11"):
        call(CASE, rows=torch.tensor([0, 3, 11, 2]), check=True)
    call(CASE, check=True)


def test_triton_says_what_it_does_not_take(device: str) -> None:
    with pytest.raises(ValueError, match="'triton' takes float32, bfloat16 and float16 logits"):
        call(replace(CASE, logits=CASE.logits.double()).to(device), rows=CASE.rows.to(device), implementation="triton")


def test_renormalise_needs_no_tail() -> None:
    bare = replace(
        CASE, logp=tuple(part[:, : head.k].contiguous() for part, head in zip(CASE.logp, CASE.heads, strict=True))
    )
    torch.testing.assert_close(call(bare, tail="renormalise"), call(CASE, tail="renormalise"))
