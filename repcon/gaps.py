"""Eight-bit values: log-probabilities as quantised gaps, tails as quantised angles; decoded to the float16 layout.

A row of k log-probabilities and T log-tails becomes k bytes, and one more per stored temperature other than 1:
- byte 0 is the mass m outside the top k at temperature 1, and bytes k on are the tempered tail's share
  m_t = tail_t / (sum of p^(1/t) over the top k + tail_t). A share is stored as its angle asin(sqrt(m)) in 253 steps:
  equal steps of angle cost equal KL, about 2 (step/2)^2 <= 2e-5 nat, so a tail cannot saturate at any temperature.
- bytes 1 to k-1 are the differences of the falling log-probabilities in steps of 0.04 nat, each taken from the
  decoded value before it, so that errors stay within half a step. A difference above 253 steps (10.12 nat)
  saturates: the class then holds less than 4e-5 of the one before it, which bounds what the error can cost.
The level of the first log-probability follows from the mass outside, so it needs no byte.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

POISON = 255
STEP_NAT = 0.04
LARGEST = 253
_ANGLE = np.pi / 2 / LARGEST
_LEVELS = 1 << 14


def width(k: int, temperatures: Sequence[float]) -> int:
    """Bytes per row."""
    return k + sum(t != 1.0 for t in temperatures)


def encode(logp: np.ndarray, k: int, temperatures: Sequence[float]) -> np.ndarray:
    """(..., k + T) float log-probabilities and log-tails to (..., width) uint8; rows that hold a NaN become poison."""
    shape = logp.shape[:-1]
    values = logp.reshape(-1, logp.shape[-1]).astype(np.float32)
    whole = not np.isnan(values).any()
    missing = np.zeros(len(values), bool) if whole else np.isnan(values).any(1)
    values[missing] = -1.0
    codes = np.empty((len(values), width(k, temperatures)), np.uint8)
    top = values[:, :k]
    if 1.0 in temperatures:
        tail = np.exp(values[:, k + temperatures.index(1.0)])
        codes[:, 0] = _angle_code(tail, np.exp(top).sum(1))
    else:
        inside = np.exp(top).sum(1).clip(max=1.0)
        codes[:, 0] = _angle_code(1.0 - inside, inside)
    _encode_gaps(top, codes)
    others = [(i, t) for i, t in enumerate(temperatures) if t != 1.0]
    for column, (i, t) in enumerate(others, start=k):
        # Relative to the first class: at low temperatures p^(1/t) itself would leave the range of float32.
        tail = np.exp(values[:, k + i] - top[:, 0] / t)
        codes[:, column] = _angle_code(tail, np.exp((top - top[:, :1]) / t).sum(1))
    codes[missing] = POISON
    return codes.reshape(*shape, -1)


def _angle_code(outside: np.ndarray, inside: np.ndarray) -> np.ndarray:
    share = (outside / (outside + inside)).clip(0.0, 1.0)
    return np.rint(np.arcsin(np.sqrt(share)) / _ANGLE).astype(np.uint8)


def _encode_gaps(top: np.ndarray, codes: np.ndarray) -> None:
    reached = np.zeros(len(top), np.int32)
    for column in range(1, top.shape[1]):
        wanted = np.rint((top[:, 0] - top[:, column]) / STEP_NAT)
        gap = (np.minimum(wanted, _LEVELS - 1) - reached).clip(0, LARGEST).astype(np.int32)
        codes[:, column] = gap
        reached += gap


def decode(codes: np.ndarray, k: int, classes: int, temperatures: tuple[float, ...], out: np.ndarray) -> None:
    """(R, width) uint8 to (R, k + T) float16 in `out`; poison becomes NaN. With k = classes the log-tails are -inf."""
    columns = np.ascontiguousarray(codes.T)
    level_of, power_of, odds_of = _tables(temperatures)
    rows = len(codes)
    reached = np.zeros(rows, np.int32)
    levels = [reached]
    for column in range(1, k):
        levels.append(np.minimum(levels[-1] + columns[column], _LEVELS - 1))
    whole = k == classes
    sums = {t: sum((power_of[t][level] for level in levels), start=np.zeros(rows, np.float32)) for t in power_of}
    outside = odds_of[columns[0]] if not whole else np.zeros(rows, np.float32)
    # inside = 1 / (1 + odds), and inside = exp(first) * sum of exp(level - first)
    first = -np.log1p(outside) - np.log(sums[1.0])
    for column, level in enumerate(levels):
        out[:, column] = first + level_of[level]
    spare = k
    for i, t in enumerate(temperatures):
        share = columns[0] if t == 1.0 else columns[spare]
        spare += t != 1.0
        out[:, k + i] = -np.inf if whole else np.log(odds_of[share] * sums[t]) + first / t
    if columns[0].max(initial=0) == POISON:
        out[columns[0] == POISON] = np.nan


@lru_cache(maxsize=16)
def _tables(temperatures: tuple[float, ...]) -> tuple[np.ndarray, dict[float, np.ndarray], np.ndarray]:
    """Log-probability by level, p^(1/t) by level, and odds m / (1 - m) by angle code; all float32."""
    level_of = -STEP_NAT * np.arange(_LEVELS)
    power_of = {t: np.exp(level_of / t).astype(np.float32) for t in {1.0, *temperatures}}
    angle = np.arange(256) * _ANGLE
    # The ends stand for all that rounds to them: half of the half step, so that no tail is decoded as impossible.
    angle[0], angle[LARGEST:] = _ANGLE / 4, np.pi / 2 - _ANGLE / 4
    return level_of.astype(np.float32), power_of, (np.tan(angle) ** 2).astype(np.float32)


def saturated(codes: np.ndarray, k: int) -> int:
    """How many gaps are at the largest step, and so may stand for a larger one."""
    return int((codes[..., 1:k] == LARGEST).sum())
