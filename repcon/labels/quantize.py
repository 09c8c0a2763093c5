"""Eight-bit values: log-probabilities as quantised gaps, tails as quantised angles; decoded to the float16 layout.

A row of k log-probabilities and T log-tails becomes k bytes, and one more per stored temperature other than 1:
- byte 0 is the mass m outside the top k at temperature 1, and bytes k on are the tempered tail's share
  m_t = tail_t / (sum of p^(1/t) over the top k + tail_t). A share is stored as its angle asin(sqrt(m)) in 253 steps:
  equal steps of angle cost equal KL, about 2 (step/2)^2 <= 2e-5 nat, so a tail cannot saturate at any temperature.
- bytes 1 to k-1 are the differences of the falling log-probabilities, each taken from the decoded value before it, so
  that errors do not add up: in steps of 0.04 nat up to 5 nat, then in steps that grow by 5.5 % each, rounded down so
  that the next class makes up for the rest. What lies far below weighs little, yet tempering brings it back: at
  temperature 4 a class 20 nat below the first still counts. Only above 600 nat a difference saturates.
The level of the first log-probability follows from the mass outside, so it needs no byte. Bytes are stored slot by
slot, (width, rows), which compresses better than row by row and is what decoding wants.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

FILL = 255
STEP_NAT = 0.04
LARGEST = 253
_ANGLE = np.pi / 2 / LARGEST
_LINEAR, _GROWTH = 127, 1.055
_LEVELS = 1 << 14
_FINE = 16  # the first log-probability is rounded to a sixteenth of a step


_EXPONENTS = np.arange(LARGEST + 1 - _LINEAR)
# Steps of a difference by its byte; the fill value's is never used.
_STEPS = np.concatenate(
    [np.arange(_LINEAR), _LINEAR + np.rint((_GROWTH**_EXPONENTS - 1) / (_GROWTH - 1)), [0, 0]]
).astype(np.intp)  # fmt: skip


def width(k: int, temperatures: Sequence[float]) -> int:
    """Bytes per row."""
    return k + sum(t != 1.0 for t in temperatures)


def encode(logp: np.ndarray, k: int, temperatures: Sequence[float]) -> np.ndarray:
    """(m, r, k + T) float log-probabilities and log-tails to (m, width, r) uint8; NaN rows become fill values."""
    slots = np.moveaxis(logp.astype(np.float32), -1, 0).copy()
    missing = np.isnan(slots).any(0)
    slots[:, missing] = -1.0
    top, tails = slots[:k], slots[k:]
    codes = np.empty((width(k, temperatures), *missing.shape), np.uint8)
    inside = np.exp(top).sum(0)
    outside = np.exp(tails[temperatures.index(1.0)]) if 1.0 in temperatures else (1.0 - inside).clip(min=0.0)
    codes[0] = _angle_code(outside, inside)
    steps = np.zeros(missing.shape, np.intp)
    for slot in range(1, k):
        wanted = np.rint((top[0] - top[slot]) / STEP_NAT).clip(max=_LEVELS - 1).astype(np.intp)
        codes[slot] = np.searchsorted(_STEPS[: LARGEST + 1], (wanted - steps).clip(min=0), side="right") - 1
        steps += _STEPS[codes[slot]]
    tempered = [(tail, t) for tail, t in zip(tails, temperatures, strict=True) if t != 1.0]
    for slot, (tail, t) in enumerate(tempered, start=k):
        # Relative to the first class: at low temperatures p^(1/t) itself is outside the range of float32.
        codes[slot] = _angle_code(np.exp(tail - top[0] / t), np.exp((top - top[0]) / t).sum(0))
    codes[:, missing] = FILL
    return np.ascontiguousarray(np.moveaxis(codes, 0, 1))


def _angle_code(outside: np.ndarray, inside: np.ndarray) -> np.ndarray:
    share = (outside / (outside + inside)).clip(0.0, 1.0)
    return np.rint(np.arcsin(np.sqrt(share)) / _ANGLE).astype(np.uint8)


def decode(codes: np.ndarray, k: int, classes: int, temperatures: tuple[float, ...], out: np.ndarray) -> None:
    """(width, R) uint8 to (R, k + T) float16 in `out`; fill values become NaN. Log-tails are -inf for k = classes."""
    tables = _tables(temperatures)
    rows = codes.shape[1]
    levels = np.zeros((k, rows), np.intp)
    for slot in range(1, k):
        np.take(_STEPS, codes[slot], out=levels[slot], mode="clip")
        levels[slot] += levels[slot - 1]
    sums = {t: _sum_of(power, levels) for t, power in tables.power.items()}
    is_complete = k == classes
    # exp(first) * sum of exp(level - first) = 1 - m
    first = -np.log(sums[1.0]) + (0.0 if is_complete else tables.log_inside[codes[0]])
    levels *= _FINE
    levels += np.rint(first * (-_FINE / STEP_NAT)).astype(np.intp)
    decoded = np.empty((k, rows), np.float16)
    np.take(tables.level, levels, mode="clip", out=decoded)
    out[:, :k] = decoded.T
    slot = k
    for place, t in enumerate(temperatures, start=k):
        if is_complete:
            out[:, place] = -np.inf
        elif t == 1.0:
            out[:, place] = tables.log_outside[codes[0]]
        else:
            out[:, place] = np.log(sums[t]) + tables.log_odds[codes[slot]] + first / t
        slot += t != 1.0
    if codes[0].max(initial=0) == FILL:
        out[codes[0] == FILL] = np.nan


def _sum_of(table: np.ndarray, levels: np.ndarray) -> np.ndarray:
    total, term = np.zeros(levels.shape[1], np.float32), np.empty(levels.shape[1], np.float32)
    for level in levels:
        total += np.take(table, level, mode="clip", out=term)
    return total


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tables:
    level: np.ndarray
    """Log-probability by level, in sixteenths of a step: float16."""
    power: dict[float, np.ndarray]
    """Per temperature, p^(1/t) relative to the first class by level, in steps."""
    log_inside: np.ndarray
    """log(1 - m) by angle code, and below log m and log(m / (1 - m))."""
    log_outside: np.ndarray
    log_odds: np.ndarray


@lru_cache(maxsize=16)
def _tables(temperatures: tuple[float, ...]) -> _Tables:
    levels = -STEP_NAT * np.arange(_LEVELS)
    angle = np.arange(256) * _ANGLE
    # The ends stand for all that rounds to them: half of the half step, so that nothing is decoded as impossible.
    angle[0], angle[LARGEST:] = _ANGLE / 4, np.pi / 2 - _ANGLE / 4
    return _Tables(
        level=(-STEP_NAT / _FINE * np.arange(_LEVELS * _FINE)).astype(np.float16),
        power={t: np.exp(levels / t).astype(np.float32) for t in {1.0, *temperatures}},
        log_inside=np.log(np.cos(angle) ** 2).astype(np.float32),
        log_outside=np.log(np.sin(angle) ** 2).astype(np.float16),
        log_odds=np.log(np.tan(angle) ** 2).astype(np.float32),
    )


def saturated(codes: np.ndarray, k: int) -> int:
    """Number of gaps of (..., width, R) codes at the largest step, which may stand for a larger one."""
    return int((codes[..., 1:k, :] == LARGEST).sum())
