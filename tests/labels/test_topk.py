import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from repcon.labels import topk


def rows(count: int, classes: int, seed: int = 0, scale: float = 4.0) -> torch.Tensor:
    return scale * torch.randn(count, classes, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=40, deadline=None)
@given(
    classes=st.integers(2, 400), k=st.integers(1, 450), seed=st.integers(0, 10**6), scale=st.sampled_from([0.1, 4, 60])
)
def test_rows_agree_with_float64_arithmetic(classes, k, seed, scale):
    logits, temperatures = rows(3, classes, seed, scale), (1.0, 2.0, 0.5)
    ids, logp = topk.encode(logits, k, temperatures)
    k = min(k, classes)
    exact = logits.double().log_softmax(1)
    order = exact.sort(1, descending=True)
    assert ids.shape == (3, k) and logp.shape == (3, k + 3) and logp.dtype == torch.float32
    torch.testing.assert_close(logp[:, :k].double(), order.values[:, :k], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(exact.gather(1, ids), order.values[:, :k], rtol=1e-6, atol=1e-6)
    assert all(len(set(row.tolist())) == k for row in ids)
    for column, temperature in enumerate(temperatures, start=k):
        outside = exact.scatter(1, ids, float("-inf")) / temperature
        torch.testing.assert_close(logp[:, column].double(), outside.logsumexp(1), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("k", [1, 3, 8])
def test_truncated_rows_are_those_of_a_smaller_k(k):
    logits, temperatures = rows(4, 50), (1.0, 2.0)
    _, wide = topk.encode(logits, 8, temperatures)
    torch.testing.assert_close(topk.truncate(wide, k, temperatures), topk.encode(logits, k, temperatures)[1])


def test_the_tempered_tail_is_not_the_tail_tempered():
    _, logp = topk.encode(rows(8, 50), 5, (1.0, 2.0))
    assert (logp[:, 6] - logp[:, 5] / 2).abs().min() > 0.1


def test_a_small_head_is_stored_whole_and_its_tail_is_nothing():
    ids, logp = topk.encode(rows(4, 3), 16, (1.0, 4.0))
    assert ids.shape == (4, 3) and bool((logp[:, 3:] == float("-inf")).all())
    torch.testing.assert_close(logp[:, :3].exp().sum(1), torch.ones(4))


@pytest.mark.parametrize("values", [[0.0, -0.0, 0.0, 1.0, 1.0], [-3.0] * 5, [2.0, -0.0, 0.0, -1.0, 2.0]])
def test_equal_logits_go_to_the_lower_id_first(values):
    ids, _ = topk.encode(torch.tensor([values]), 4, (1.0,))
    wanted = sorted(range(5), key=lambda i: (-values[i], i))[:4]
    assert ids[0].tolist() == wanted


def test_half_precision_logits_are_widened_before_anything():
    logits = rows(16, 1000).half()
    wide = topk.encode(logits.float(), 8, (1.0,))
    narrow = topk.encode(logits, 8, (1.0,))
    assert all(torch.equal(a, b) for a, b in zip(wide, narrow, strict=True))


def test_ids_above_the_range_of_int16_survive():
    logits = torch.zeros(1, 70_000)
    logits[0, 65_534], logits[0, 69_999] = 9, 8
    assert topk.encode(logits, 2, (1.0,))[0].tolist() == [[65_534, 69_999]]
    assert (topk.id_dtype(65_535), topk.id_dtype(65_536)) == (np.uint16, np.uint32)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_dense_rows(temperature):
    logits = rows(6, 30)
    ids, logp = topk.encode(logits, 7, (1.0, 2.0))
    exact = (logits / temperature).softmax(1)
    index = (1.0, 2.0).index(temperature)
    bucket, renormalised, uniform = (
        topk.dense(ids, logp, 30, index, temperature, tail) for tail in ("bucket", "renormalise", "uniform")
    )
    torch.testing.assert_close(bucket.gather(1, ids), exact.gather(1, ids), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(uniform.gather(1, ids), exact.gather(1, ids), rtol=1e-5, atol=1e-7)
    inside = exact.gather(1, ids)
    torch.testing.assert_close(renormalised.gather(1, ids), inside / inside.sum(1, keepdim=True), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(uniform.sum(1), torch.ones(6))
    torch.testing.assert_close(1 - bucket.sum(1), 1 - inside.sum(1), rtol=1e-4, atol=1e-6)
    assert bool(((uniform > 0).sum(1) == 30).all())


def test_dense_of_a_whole_head_is_the_softmax():
    logits = rows(5, 6)
    ids, logp = topk.encode(logits, 6, (1.0,))
    for tail in ("bucket", "renormalise", "uniform"):
        torch.testing.assert_close(topk.dense(ids, logp, 6, 0, 1.0, tail), logits.softmax(1))


@pytest.mark.parametrize("offset", [5e3, 1e5])
def test_logits_around_a_large_offset_lose_no_digits(offset):
    logits = rows(64, 1000) + offset
    _, logp = topk.encode(logits, 8, (1.0,))
    wanted = logits.double().log_softmax(1).topk(8).values
    torch.testing.assert_close(logp[:, :8].double(), wanted, rtol=0, atol=2e-5)
    torch.testing.assert_close(logp[:, :8].exp().sum(1) + logp[:, 8].exp(), torch.ones(64), rtol=0, atol=1e-5)


@pytest.mark.parametrize("k", [3, 6, 16])
@pytest.mark.parametrize("values", [[2.0, -np.inf, 1.0, -np.inf, -np.inf, 0.0], [3.0] + [-np.inf] * 5])
def test_masked_classes_have_no_probability_wherever_they_stand(values, k):
    """A logit of -inf, as of a class that the teacher rules out: outside the k, and among them."""
    logits = torch.tensor([values])
    ids, logp = topk.encode(logits, k, (1.0, 4.0))
    top = logp[:, : min(k, 6)]
    assert bool((top >= topk.MIN_LOGP).all()) and not bool(logp.isnan().any())
    torch.testing.assert_close(top.exp(), logits.softmax(1).gather(1, ids))
    for index, temperature in enumerate((1.0, 4.0)):
        wanted = (logits / temperature).softmax(1)
        held = topk.dense(ids, logp.half(), 6, index, temperature, "bucket").gather(1, ids)
        torch.testing.assert_close(held, wanted.gather(1, ids), rtol=1e-3, atol=1e-6)


def test_what_is_not_a_number_stays_so():
    for bad in (float("nan"), float("inf")):
        assert bool(topk.encode(torch.tensor([[0.0, bad, 1.0]]), 2, (1.0,))[1].isnan().any())
    assert bool(topk.encode(torch.full((1, 3), -torch.inf), 2, (1.0,))[1].isnan().any())
