"""Means with 95 % intervals, and paired differences: how sure a comparison is."""

from collections.abc import Mapping

import numpy as np
from scipy.stats import t as student_t

RESAMPLES = 2000


def over_images(correct: np.ndarray) -> dict[str, float]:
    """Mean of (n,) values per test image in percent, with a bootstrap interval over the images.

    Give answers from 0 to 1 for an accuracy, or their differences for a paired comparison on the same images. Of
    (d, n) values, repeated by d draws, the draws' own interval is added, as an independent part.
    """
    draws = np.atleast_2d(np.asarray(correct, np.float64))
    values = draws.mean(axis=0)
    distinct, counts = np.unique(values, return_counts=True)
    generator = np.random.default_rng([0, len(values)])
    # Resampling n images is drawing how often each distinct value comes up, which is much quicker.
    drawn = generator.multinomial(len(values), counts / len(values), size=RESAMPLES)
    means = drawn @ distinct / len(values)
    mean = values.mean()
    below, above = np.abs(np.quantile(means, (0.025, 0.975)) - mean)
    half = _half(draws.mean(axis=1)) if len(draws) > 1 else 0.0
    low, high = np.clip([mean - np.hypot(below, half), mean + np.hypot(above, half)], draws.min(), draws.max())
    return _percent(mean, low, high)


def over_draws(values: np.ndarray) -> dict[str, float]:
    """Mean of (n,) repeated measurements in percent, with Student's interval; of one, the interval is unbounded."""
    values = np.asarray(values, np.float64)
    if len(values) < 2:
        return _percent(values.mean(), -np.inf, np.inf)
    half = _half(values)
    return _percent(values.mean(), values.mean() - half, values.mean() + half)


def _half(values: np.ndarray) -> float:
    """Half of the 95 % interval (Student's) of the mean of two or more repeated measurements."""
    return float(student_t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values)))


def _percent(mean: float, low: float, high: float) -> dict[str, float]:
    return {"mean": 100 * float(mean), "low": 100 * float(low), "high": 100 * float(high)}


def show(interval: Mapping[str, float], *, signed: bool = False) -> str:
    """`87.5 ± 1.6`: the mean and the larger half of the interval, in points."""
    half = max(interval["high"] - interval["mean"], interval["mean"] - interval["low"])
    return f"{interval['mean']:{'+' if signed else ''}.1f} ± {half:.1f}"
