"""95 % intervals of accuracies and of paired differences, with exact tests.

No interval has zero width, also where all answers agree.
"""

from collections.abc import Mapping, Sequence
from itertools import product

import numpy as np
from scipy.stats import binomtest, norm
from scipy.stats import t as student_t

LEVEL = 0.05
Z = float(norm.ppf(1 - LEVEL / 2))
ENUMERATED = 12
"""Differing images up to which all sign flips are enumerated; with more, `RESAMPLES` are drawn."""
RESAMPLES = 4999


def accuracy(correct: np.ndarray) -> dict[str, float]:
    """Accuracy in per cent of (n,) right (1) or wrong (0) answers, with Wilson's interval over the images.

    Of (d, n) answers, repeated by d draws, an image counts by its mean, and the draws' own interval (Student's) is
    added, as an independent part.
    """
    draws = np.atleast_2d(np.asarray(correct, np.float64))
    values = draws.mean(axis=0)
    mean = float(values.mean())
    low, high = _wilson(mean, _effective(values))
    half = _half(draws.mean(axis=1)) if len(draws) > 1 else 0.0
    return _percent(mean, max(mean - np.hypot(mean - low, half), 0.0), min(mean + np.hypot(high - mean, half), 1.0))


def difference(first: np.ndarray, second: np.ndarray) -> dict[str, float]:
    """Paired difference `first - second` in points of (n,) or (d, n) answers to the same images, with `p`.

    `p` is that of McNemar's exact test, or of the exact sign-flip test where answers are means over draws. The interval
    is Bonett and Price's (one image added for, one against), with the draws' own interval (Student's) as an independent
    part. It holds zero wherever the test does not reject at 5 %: what leaves zero out is significant.
    """
    draws = np.atleast_2d(np.asarray(first, np.float64) - np.asarray(second, np.float64))
    values = draws.mean(axis=0)
    mean, p = float(values.mean()), _p(values)
    extended = np.append(values, [1.0, -1.0])
    centre, error = extended.mean(), Z * extended.std() / np.sqrt(len(extended))
    half = _half(draws.mean(axis=1)) if len(draws) > 1 else 0.0
    low = mean - np.hypot(mean - min(centre - error, mean), half)
    high = mean + np.hypot(max(centre + error, mean) - mean, half)
    if p >= LEVEL:
        low, high = min(low, 0.0), max(high, 0.0)
    return _percent(mean, max(low, -1.0), min(high, 1.0)) | {"p": p}


def over_draws(values: np.ndarray) -> dict[str, float]:
    """Mean of (n,) repeated measurements in percent, with Student's interval; unbounded where nothing tells the spread:
    of a single measurement, and of ones that are all equal."""
    values = np.asarray(values, np.float64)
    half = _half(values) if len(values) > 1 else 0.0
    half = half if half > 0 else np.inf
    return _percent(values.mean(), values.mean() - half, values.mean() + half)


def mean_over_sets(parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of independent figures of several data sets, each counted alike, with its 95 % interval.

    The distances from each mean to its bounds are added as squares (Zou and Donner's method of variance estimates
    recovery), so that it holds for intervals of any kind; of one part it is that part.
    """
    means, lows, highs = (np.array([part[key] for part in parts]) for key in ("mean", "low", "high"))
    below, above = (np.sqrt(np.square(apart).sum()) / len(parts) for apart in (means - lows, highs - means))
    mean = float(means.mean())
    return {"mean": mean, "low": float(mean - below), "high": float(mean + above)}


def _wilson(mean: float, count: float) -> tuple[float, float]:
    centre = (mean + Z**2 / (2 * count)) / (1 + Z**2 / count)
    half = Z / (1 + Z**2 / count) * np.sqrt(mean * (1 - mean) / count + Z**2 / (4 * count**2))
    return min(centre - half, mean), max(centre + half, mean)


def _effective(values: np.ndarray) -> float:
    """Independent right-or-wrong answers that tell as much as these (n,) means: n, or more where the means vary less.

    The variance of what may only be right or wrong is added as that of one more image, so that n equal means do not
    count as certainty.
    """
    count, mean = len(values), float(values.mean())
    if (most := mean * (1 - mean)) <= 0:
        return count
    return count * (count + 1) / (count * min(float(values.var()) / most, 1.0) + 1)


def _p(values: np.ndarray) -> float:
    """Two-sided p of no difference, (n,) differences from -1 to 1; 1.0 where none differs."""
    moved = values[values != 0]
    if not len(moved):
        return 1.0
    if np.all(np.abs(moved) == 1):
        return float(binomtest(int((moved > 0).sum()), len(moved)).pvalue)
    seen = abs(moved.sum()) - 1e-9
    if len(moved) <= ENUMERATED:
        signs = np.array(list(product((-1.0, 1.0), repeat=len(moved))))
        return float((np.abs(signs @ moved) >= seen).mean())
    generator = np.random.default_rng([0, len(moved)])
    flipped = sum(
        int((np.abs(generator.choice((-1.0, 1.0), size=(size, len(moved))) @ moved) >= seen).sum())
        for size in np.diff([*range(0, RESAMPLES, 100), RESAMPLES])
    )
    return (1 + flipped) / (1 + RESAMPLES)


def _half(values: np.ndarray) -> float:
    """Half of the 95 % interval (Student's) of the mean of two or more repeated measurements."""
    return float(student_t.ppf(1 - LEVEL / 2, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values)))


def _percent(mean: float, low: float, high: float) -> dict[str, float]:
    return {"mean": 100 * float(mean), "low": 100 * float(low), "high": 100 * float(high)}


def plus_minus(interval: Mapping[str, float], *, signed: bool = False) -> str:
    """`87.5 ± 1.6`: the mean and the larger half of the interval, in points."""
    half = max(interval["high"] - interval["mean"], interval["mean"] - interval["low"])
    return f"{interval['mean']:{'+' if signed else ''}.1f} ± {half:.1f}"
