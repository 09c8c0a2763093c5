"""The Triton kernel against the specification: shapes, precisions, modes, extremes."""

from dataclasses import replace

import pytest
import torch
from kernel_cases import Case, assert_meets, compute, make
from repcon_kernels import TAILS, multi_head_kl
from repcon_kernels.functional import head_specs


def check(case: Case, device: str, tail: str = "bucket", *, in_place: bool = False) -> None:
    assert_meets(case, tail, *compute(case.to(device), tail, "triton", in_place=in_place))


@pytest.mark.parametrize("batch", [1, 3, 41])
@pytest.mark.parametrize("gathered", [False, True])
def test_batches(batch: int, gathered: bool, device: str) -> None:
    check(make(batch, [(196, 7), (45, 16), (2, 1)], gathered=gathered), device)


@pytest.mark.parametrize(
    "shape", [(2, 1), (2, 2), (45, 16), (45, 45), (196, 1), (401, 7), (1000, 16), (1000, 1000), (4096, 7), (4097, 16)]
)
@pytest.mark.parametrize("tail", TAILS)
def test_shapes(shape: tuple[int, int], tail: str, device: str) -> None:
    check(make(3, [shape]), device, tail)


@pytest.mark.parametrize("shape", [(21841, 16), (9000, 4500), (4100, 4100)])
@pytest.mark.parametrize("in_place", [False, True])
def test_rows_and_labels_that_no_tile_holds(shape: tuple[int, int], in_place: bool, device: str) -> None:
    check(make(2, [shape, (1000, 16)]), device, in_place=in_place)


def test_the_widest_head(device: str) -> None:
    """65,536 classes, whose last one's id is the largest uint16."""
    case = make(2, [(65536, 16)])
    ids = case.ids[0].long()
    ids[0, 0] = 65535
    for dtype in (torch.uint16, torch.uint32):
        check(replace(case, ids=(ids.to(dtype),)), device)


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("in_place", [False, True])
def test_precisions(tail: str, dtype: torch.dtype, in_place: bool, device: str) -> None:
    case = make(5, [(1000, 16), (196, 7), (45, 45), (196, 7)], dtype=dtype, gap=3, gathered=True)
    check(case, device, tail, in_place=in_place)


def test_labels_of_other_widths(device: str) -> None:
    case = make(3, [(100, 5), (300, 7)])
    for ids in (torch.uint32, torch.int32, torch.int64):
        for logp in (torch.float32, torch.bfloat16):
            changed = replace(
                case,
                ids=tuple(part.long().to(ids) for part in case.ids),
                logp=tuple(part.to(logp) for part in case.logp),
            )
            check(changed, device)


@pytest.mark.parametrize("shapes", [[(100, 5), (300, 7)], [(300, 7), (300, 7), (400, 5)]])
def test_heads_whose_labels_differ_in_width(shapes: list[tuple[int, int]], device: str) -> None:
    """Also where the heads are alike in all else."""
    case = make(3, shapes)
    ids, logp = list(case.ids), list(case.logp)
    ids[1] = ids[1].long().to(torch.uint32)
    check(replace(case, ids=tuple(ids)), device)
    logp[0] = logp[0].float()
    check(replace(case, ids=tuple(ids), logp=tuple(logp)), device)


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("spread", [30, 1e4])
@pytest.mark.filterwarnings("ignore:overflow encountered in:RuntimeWarning")
def test_large_logits(spread: float, tail: str, device: str) -> None:
    case = make(6, [(50, 5), (12, 12), (5000, 5)], spread=spread)
    losses, gradient = compute(case.to(device), tail, "triton")
    assert_meets(case, tail, losses, gradient)
    assert losses.isfinite().all() and gradient.isfinite().all()


def test_every_column_is_written_and_nothing_else(device: str) -> None:
    """Poison in the output and around the logits neither stays nor gets in."""
    case = make(5, [(196, 7), (5000, 5), (1000, 16)], gap=5).to(device)
    columns = case.logits.shape[1]
    around = torch.full((7, columns), torch.nan, device=device)
    around[1:6] = case.logits
    gradient = torch.full((7, columns), 7.0, device=device)
    specs = [(head.start, head.classes, head.tail_column, head.temperature) for head in case.heads]
    heads = head_specs(case.ids, *zip(*specs, strict=True))
    from repcon_kernels.kl_div import launch

    losses = launch.multi_head_kl(
        around[1:6], gradient[1:6], heads, case.ids, case.logp, None, case.weights, "bucket", 1 / 5, 1 / 5
    )
    launch.scale_heads(gradient[1:6], case.upstream, 1.0, [head.start for head in heads])
    assert (gradient[[0, 6]] == 7.0).all()
    assert_meets(case, "bucket", losses.cpu(), gradient[1:6].cpu())


def test_the_same_bits_every_time(device: str) -> None:
    """Whichever program is the last to finish adds the partial sums in the same order."""
    case = make(9, [(1000, 16), (45, 7)]).to(device)
    arguments = case.logits, case.heads, case.ids, case.logp
    runs = [multi_head_kl(*arguments, weights=case.weights, implementation="triton") for _ in range(2)]
    assert torch.equal(runs[0], runs[1])


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
def test_values_out_of_range_cost_the_loss_and_not_the_process(device: str) -> None:
    case = make(4, [(196, 7), (45, 45)], gathered=True)
    assert case.rows is not None
    for row in (-1, 11, 2**40):
        rows = case.rows.clone()
        rows[2] = row
        losses, gradient = compute(replace(case, rows=rows).to(device), "bucket", "triton")
        assert losses.isnan().all() and gradient[2].isnan().all() and gradient[[0, 1, 3]].isfinite().all()
    poisoned = case.ids[0].clone()
    poisoned[int(case.rows[1])] = 65535
    losses, _ = compute(replace(case, ids=(poisoned, case.ids[1])).to(device), "bucket", "triton")
    assert losses.isnan().tolist() == [True, False]
