import numpy as np
import pytest
import torch
from store_builder import teacher_metadata

from repcon.labels import topk
from repcon.labels.layout import HeadInfo
from repcon.labels.truncation import bucket_kl, entropy, probabilities, stored_losses, truncation


def rows(count: int, classes: int, scale: float = 3.0) -> torch.Tensor:
    return scale * torch.randn(count, classes, generator=torch.Generator().manual_seed(0))


def head(classes: int, k: int, temperatures: tuple[float, ...]) -> HeadInfo:
    return HeadInfo("head", classes, k, temperatures, teacher_metadata("head", classes))


def spread_kl(p: np.ndarray, k: int) -> np.ndarray:
    """KL(p || top k exact, the rest even), row by row, the slow way."""
    lost = []
    for row in p:
        order = np.argsort(-row)
        q = np.full(len(row), row[order[k:]].sum() / max(len(row) - k, 1))
        q[order[:k]] = row[order[:k]]
        held = row > 0
        lost.append((row[held] * np.log(row[held] / q[held])).sum())
    return np.array(lost)


@pytest.mark.parametrize("classes", [5, 40])
def test_a_samples_losses_are_those_of_the_definition(classes):
    logits = rows(50, classes)
    p = logits.double().softmax(1).numpy()
    found = truncation(logits, (1.0, 2.0), ks=(2, 4, 64))
    for k, figures in found.items():
        kept = min(k, classes)
        exact = spread_kl(p, kept)
        assert figures["kl"] == pytest.approx(exact.mean(), abs=1e-6)
        assert figures["kl_worst"] == pytest.approx(exact.max(), abs=1e-5)
        assert figures["mass"] == pytest.approx(np.sort(p, 1)[:, ::-1][:, :kept].sum(1).mean(), abs=1e-5)
    assert found[64]["kl"] == pytest.approx(0, abs=1e-6)


def test_both_encodings_are_sized_and_judged():
    found = truncation(rows(2000, 1000), (1.0, 4.0))
    assert set(found) == {4, 8, 16, 32, 64}
    for figures in found.values():
        plain, quantized8 = figures["float16"], figures["quantized8"]
        assert quantized8["bytes_per_crop"] < plain["bytes_per_crop"]
        assert plain["kl"] < 1e-6 and quantized8["kl"] < 1e-4 and quantized8["kl_worst"] < 1e-3
        assert plain["saturated"] == quantized8["saturated"] == 0
    sizes = [figures["float16"]["bytes_per_crop"] for figures in found.values()]
    assert sizes == sorted(sizes) and 9 < sizes[0] < 20


def test_a_stores_losses_are_those_of_its_own_rows_cut_shorter():
    logits, classes, k = rows(60, 30), 30, 8
    ids, logp = topk.encode(logits, k, (2.0, 1.0))
    own = topk.dense(ids, logp, classes, 1, 1.0, "uniform").double().numpy()
    mass, lost = stored_losses(*probabilities(head(classes, k, (2.0, 1.0)), logp.numpy()), classes)
    for kept in range(1, k + 1):
        assert lost[kept - 1] == pytest.approx(spread_kl(own, kept).mean(), abs=1e-5)
        assert mass[kept - 1] == pytest.approx(np.sort(own, 1)[:, ::-1][:, :kept].sum(1).mean(), abs=1e-5)
    assert lost[-1] == pytest.approx(0, abs=1e-6) and (np.diff(lost) <= 1e-9).all()


def test_a_whole_heads_losses_end_at_nothing():
    _, logp = topk.encode(rows(60, 6), 6, (1.0,))
    mass, lost = stored_losses(*probabilities(head(6, 6, (1.0,)), logp.numpy()), 6)
    assert mass[-1] == pytest.approx(1) and lost[-1] == pytest.approx(0, abs=1e-6)


def test_kl_between_versions_of_a_row():
    _, logp = topk.encode(rows(20, 30), 5, (1.0, 2.0))
    half = logp.numpy().astype(np.float16)
    assert np.abs(bucket_kl(logp.numpy(), logp.numpy(), 5, 1, 2.0)).max() < 1e-12
    assert 0 < bucket_kl(logp.numpy(), half, 5, 0, 1.0).mean() < 1e-6


def test_masked_classes_lose_nothing():
    logits = torch.tensor([[2.0, -torch.inf, 1.0, -torch.inf, -torch.inf, 0.0]])
    _, logp = topk.encode(logits, 5, (1.0, 2.0))
    infinite = np.where(logp.numpy() == topk.MIN_LOGP, -np.inf, logp.numpy())
    for index, temperature in enumerate((1.0, 2.0)):
        for left, right in ((logp.numpy(), infinite), (infinite, logp.numpy())):
            assert abs(bucket_kl(left, right, 5, index, temperature)).max() < 1e-9


@pytest.mark.parametrize("temperatures", [(2.0, 1.0), (2.0,)])
def test_probabilities_need_no_stored_tail_at_temperature_one(temperatures):
    logits = rows(40, 30)
    _, logp = topk.encode(logits, 5, temperatures)
    top, rest = probabilities(head(30, 5, temperatures), logp.numpy())
    exact = np.sort(logits.double().softmax(1).numpy(), 1)[:, ::-1]
    np.testing.assert_allclose(top, exact[:, :5], atol=1e-6)
    np.testing.assert_allclose(rest, exact[:, 5:].sum(1), atol=1e-6)


def test_entropy_reads_the_tail_as_spread_evenly():
    even = np.full((1, 4), 0.01)
    assert entropy(even, np.array([0.96]), 100) == pytest.approx(np.log(100))
    assert entropy(np.array([[1.0]]), np.array([0.0]), 5) == pytest.approx(0)
