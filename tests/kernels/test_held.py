"""Rows of wide heads that stay in registers, against the specification; `tiling.WIDE_ROWS` does not choose them yet."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from kernel_cases import assert_meets, compute, make
from repcon_kernels import TAILS
from repcon_kernels.kl_div import tiling

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")


@pytest.fixture(params=["held", "held_persistent", "held_unaligned"], autouse=True)
def wide_rows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The way through wide heads. Prefetching is the same but for an instruction that the interpreter does not know."""
    monkeypatch.setattr(tiling, "WIDE_ROWS", request.param)
    tiling.plan.cache_clear()
    yield
    tiling.plan.cache_clear()


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_wide_and_narrow_heads(tail: str, dtype: torch.dtype, device: str) -> None:
    """Rows begin at every distance from 16 bytes; free columns between the heads get no gradient."""
    case = make(5, [(45, 3), (5003, 5)], dtype=dtype, gap=3, gathered=True)
    assert_meets(case, tail, *compute(case.to(device), tail, "triton", in_place=dtype == torch.bfloat16))


@pytest.mark.parametrize("classes", [4097, 4100, 6144, 6145, 6151, 8191])
def test_every_column_of_a_row(classes: int, device: str) -> None:
    """Whole chunks, one column more, and rows whose last whole chunk depends on where they begin."""
    case = make(3, [(classes, 5)], dtype=torch.bfloat16)
    assert_meets(case, "uniform", *compute(case.to(device), "uniform", "triton"))


def test_rows_that_need_a_second_look(device: str) -> None:
    """A tail that the student has given up is summed term by term; a logit of -inf drowns no other."""
    case = make(2, [(5003, 5)])
    logits = case.logits.clone()
    logits[0] = torch.linspace(-1, 1, 5003)
    logits[0, case.ids[0][0].long()] = 40.0
    case = replace(case, logits=logits)
    assert_meets(case, "bucket", *compute(case.to(device), "bucket", "triton"))
    logits = logits.clone()
    outside = next(column for column in range(5003) if column not in case.ids[0][1].long())
    logits[1, outside] = -torch.inf
    losses, _ = compute(replace(case, logits=logits).to(device), "uniform", "triton")
    assert losses.tolist() == [torch.inf]


@pytest.mark.parametrize("column", [0, 5002])
def test_nan_in_nan_out(column: int, device: str) -> None:
    case = make(3, [(5003, 5), (45, 5)])
    logits = case.logits.clone()
    logits[1, column] = torch.nan
    losses, _ = compute(replace(case, logits=logits).to(device), "uniform", "triton")
    assert losses.isnan().tolist() == [True, False]


def test_heads_that_no_registers_hold_are_streamed(device: str) -> None:
    case = make(2, [(tiling.WIDEST_HELD + 1, 5)])
    layout = tiling.plan(case.heads, case.logits.shape[1], (7,), (0,), tiling.WIDE_ROWS)
    assert layout.groups[0][7] == 0 and layout.groups[0][5]
