import numpy as np
import pytest
import torch

from repcon.labels import quantize, topk


def stored(logits: torch.Tensor, k: int, temperatures) -> np.ndarray:
    return topk.encode(logits, k, temperatures)[1].numpy().astype(np.float16)[None]


def decoded(logp: np.ndarray, k: int, classes: int, temperatures) -> np.ndarray:
    codes = quantize.encode(logp, k, temperatures)
    assert codes.shape == (1, quantize.width(k, temperatures), logp.shape[1])
    out = np.empty(logp.shape[1:], np.float16)
    quantize.decode(codes[0], k, classes, temperatures, out)
    return out


def divergence(left: np.ndarray, right: np.ndarray, k: int, index: int, temperature: float) -> np.ndarray:
    """KL per row between the top k with one atom for the tail, at a temperature."""

    def distribution(rows: np.ndarray) -> np.ndarray:
        rows = rows.astype(np.float64)
        logs = np.concatenate([rows[:, :k] / temperature, rows[:, k + index, None]], 1)
        mass = np.exp(logs - logs.max(1, keepdims=True))
        return mass / mass.sum(1, keepdims=True)

    p, q = distribution(left), distribution(right)
    return np.where(p > 0, p * np.log(np.maximum(p, 1e-300) / np.maximum(q, 1e-300)), 0.0).sum(1)


@pytest.mark.parametrize("scale", [0.0, 0.3, 2.0, 8.0, 40.0])
@pytest.mark.parametrize(("classes", "k"), [(1000, 16), (45, 16), (10, 16), (200, 1), (300, 200)])
def test_the_loss_is_small_at_every_peakedness_and_temperature(scale, classes, k):
    k, temperatures = min(k, classes), (1.0, 2.0, 4.0, 0.5)
    logits = scale * torch.randn(500, classes, generator=torch.Generator().manual_seed(1))
    logp = stored(logits, k, temperatures)
    back = decoded(logp, k, classes, temperatures)
    for index, temperature in enumerate(temperatures):
        lost = divergence(logp[0], back, k, index, temperature)
        # A temperature below 1 stretches the steps.
        stretch = max(1.0, temperature**-2)
        assert lost.mean() <= 1e-4 * stretch and lost.max() <= 1e-3 * stretch


def test_decoded_rows_are_normalised():
    logp = stored(3 * torch.randn(200, 100), 8, (1.0,))
    mass = np.exp(decoded(logp, 8, 100, (1.0,)).astype(np.float64)).sum(1)
    assert np.abs(mass - 1).max() < 4e-3


def test_without_temperature_one_the_level_is_kept_too():
    logits = 3 * torch.randn(100, 50, generator=torch.Generator().manual_seed(0))
    logp = stored(logits, 8, (2.0,))
    back = decoded(logp, 8, 50, (2.0,))
    assert np.abs(back.astype(float) - logp[0]).max() < 0.1


@pytest.mark.parametrize(("height", "saturated"), [(50, 0), (1000, 10)])
def test_a_one_hot_teacher_costs_nothing_and_saturation_is_counted(height, saturated):
    logits = torch.zeros(10, 100)
    logits[:, 3] = height
    temperatures = (1.0, 2.0, 8.0)
    logp = stored(logits, 8, temperatures)
    assert quantize.saturated(quantize.encode(logp, 8, temperatures), 8) == saturated
    back = decoded(logp, 8, 100, temperatures)
    for index, temperature in enumerate(temperatures):
        assert divergence(logp[0], back, 8, index, temperature).max() < 1e-3


def test_missing_rows_become_fill_values_and_come_back_as_nan():
    logp = stored(torch.randn(6, 20), 4, (1.0,))
    logp[0, 2] = np.nan
    codes = quantize.encode(logp, 4, (1.0,))
    assert (codes[0, :, 2] == quantize.FILL).all() and (codes[0, :, :2] != quantize.FILL).all()
    back = decoded(logp, 4, 20, (1.0,))
    assert np.isnan(back[2]).all() and not np.isnan(back[[0, 1, 3, 4, 5]]).any()


def test_a_whole_heads_tail_stays_nothing():
    back = decoded(stored(torch.randn(6, 4), 4, (1.0, 3.0)), 4, 4, (1.0, 3.0))
    assert np.isneginf(back[:, 4:]).all()


def test_many_rows_are_decoded_as_few_are():
    logp = stored(9 * torch.randn(9000, 20, generator=torch.Generator().manual_seed(2)), 6, (1.0, 2.0))
    whole = decoded(logp, 6, 20, (1.0, 2.0))
    parts = [decoded(logp[:, start : start + 1000], 6, 20, (1.0, 2.0)) for start in range(0, 9000, 1000)]
    np.testing.assert_array_equal(whole, np.concatenate(parts))


@pytest.mark.parametrize("k", [4, 6])
def test_masked_classes_have_no_probability(k):
    logits = torch.tensor([[2.0, -torch.inf, 1.0, -torch.inf, -torch.inf, 0.0]])
    logp = stored(logits, k, (1.0, 2.0))
    back = decoded(logp, k, 6, (1.0, 2.0))
    np.testing.assert_allclose(
        np.exp(back[:, :k].astype(np.float32)), np.exp(logp[0, :, :k].astype(np.float32)), atol=3e-2
    )
