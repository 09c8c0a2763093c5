"""Cost of storing k labels instead of all, in nat and in bytes: of a store's rows and of a sample of logits.

A row truncated to its top k' is read as its k' probabilities with the rest of the mass spread evenly over the other
classes; what is lost is KL(row || that). In a store the row itself ends at k, its tail spread the same way, so its
loss at k' = k is zero and the figures are those of a smaller k; a sample of logits has all classes.
"""

from collections.abc import Sequence
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from repcon.config import Codec, Values
from repcon.labels import quantize, topk
from repcon.labels.layout import HeadInfo, head_layouts
from repcon.labels.manifest import TeacherMetadata
from repcon.labels.zarr_encoding import compressed_bytes

KS = (4, 8, 16, 32, 64)
NOTHING = -50.0
"""Log-probability of what is impossible."""


def probabilities(head: HeadInfo, logp: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Stored rows (R, k + T) as float64 probabilities (R, k) and the mass (R,) of the classes outside."""
    top = np.exp(logp[:, : head.k].astype(np.float64))
    if 1.0 in head.temperatures:
        return top, np.exp(logp[:, head.k + head.temperatures.index(1.0)].astype(np.float64))
    return top, np.maximum(1.0 - top.sum(1), 0.0)


def stored_losses(top: np.ndarray, rest: np.ndarray, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Mass and mean KL per k' = 1..k of stored rows: probabilities (R, k), and (R,) the mass outside.

    Both are (k,) float64: the mass that the top k' hold, and the nat that truncation to them loses.
    """
    k, mass = top.shape[1], top.cumsum(1)
    # sum of p log p over the slots from k' on, and the tail's share, taken evenly over the classes outside the top k
    terms = _entropy_term(top, 1)
    beyond = terms.sum(1, keepdims=True) - terms.cumsum(1) + _entropy_term(rest, classes - k)[:, None]
    outside = np.maximum(top.sum(1, keepdims=True) - mass, 0.0) + rest[:, None]
    lost = beyond - _entropy_term(outside, classes - np.arange(1, k + 1))
    return mass.mean(0), np.maximum(lost, 0.0).mean(0)


def entropy(top: np.ndarray, rest: np.ndarray, classes: int) -> np.ndarray:
    """Entropy (R,) in nat of stored rows, the mass outside the top k spread evenly over the other classes."""
    return -_entropy_term(top, 1).sum(1) - _entropy_term(rest, classes - top.shape[1])


def _entropy_term(mass: np.ndarray, classes: int | np.ndarray) -> np.ndarray:
    """m log(m / C): mass m spread evenly over C classes."""
    return np.where(mass > 0, mass * np.log(np.maximum(mass, 1e-300) / np.maximum(classes, 1)), 0.0)


def truncation(
    logits: Tensor, temperatures: Sequence[float] = (1.0,), codec: Codec = "zstd", ks: Sequence[int] = KS
) -> dict[int, dict[str, Any]]:
    """Mass, KL and size by k of a sample of logits (B, C); a k above C counts as C.

    Per k: `mass` (mean probability of the top k), `kl` and `kl_worst` (nat lost by truncation, mean and worst row),
    and for each encoding of the values `bytes_per_crop` (compressed, this head alone; a small sample compresses a
    little worse than a full shard), `kl` and `kl_worst` (nat lost by the encoding, the worst over the
    temperatures), and `saturated` (the share of differences at the largest step).
    """
    found = {}
    for wanted in ks:
        ids, logp = topk.encode(logits, wanted, temperatures)
        k, classes = ids.shape[1], logits.shape[1]
        exact = logits.float().log_softmax(1)
        inside = exact.gather(1, ids).exp().sum(1)
        outside = (1 - inside).clamp(min=0).double()
        dropped = exact.scatter(1, ids, float("-inf")).double()
        spread = torch.log(outside.clamp(min=1e-300) / max(classes - k, 1))
        terms = torch.where(dropped.isinf(), 0.0, dropped.exp() * (dropped - spread[:, None]))
        lost = terms.sum(1).clamp(min=0)
        metadata = TeacherMetadata(
            name="sample", model="", architecture="", weight_hash="", preprocessing={}, num_classes=classes
        )
        head = HeadInfo("sample", classes, k, tuple(temperatures), metadata)
        both = encodings(head, ids.cpu().numpy(), logp.cpu().numpy(), codec)
        mass = float(inside.mean())
        found[wanted] = {"mass": mass, "kl": float(lost.mean()), "kl_worst": float(lost.max()), **both}
    return found


def encodings(head: HeadInfo, ids: np.ndarray, logp: np.ndarray, codec: Codec) -> dict[str, dict[str, float]]:
    """Per encoding of the values: `bytes_per_crop`, `kl` and `kl_worst` against these rows, `saturated`.

    ids (R, k), logp (R, k + T); the losses are those of the temperature that loses most.
    """
    return {values: _encoded(head, ids, logp, codec, values) for values in get_args(Values)}


def _encoded(head: HeadInfo, ids: np.ndarray, logp: np.ndarray, codec: Codec, values: Values) -> dict[str, float]:
    id_layout, value_layout = head_layouts(head, values)
    half = logp.astype(np.float16)
    stored, decoded, saturated = half, half, 0.0
    if values == "quantized8":
        stored = quantize.encode(half[None], head.k, head.temperatures)[0]
        decoded = np.empty_like(half)
        quantize.decode(stored, head.k, head.classes, head.temperatures, decoded)
        saturated = quantize.saturated(stored, head.k) / max(half[:, 1 : head.k].size, 1)
    size = compressed_bytes(codec, id_layout, ids) + compressed_bytes(codec, value_layout, stored)
    temperatures = list(enumerate(head.temperatures))
    lost = np.stack([bucket_kl(logp, decoded, head.k, index, temperature) for index, temperature in temperatures])
    return {
        "bytes_per_crop": size / len(half),
        "kl": float(lost.mean(1).max()),
        "kl_worst": float(lost.max()),
        "saturated": saturated,
    }


def bucket_kl(left: np.ndarray, right: np.ndarray, k: int, index: int, temperature: float) -> np.ndarray:
    """KL per row (R,) between two versions of stored rows (R, k + T) with the same ids, the tail as one class.

    A probability of 0 on the right counts as `NOTHING`: an encoding may round it up, which loses next to nothing.
    """

    def logs(rows: np.ndarray) -> np.ndarray:
        rows = rows.astype(np.float64)
        joined = np.concatenate([rows[:, :k] / temperature, rows[:, k + index, None]], 1)
        return joined - np.logaddexp.reduce(joined, axis=1, keepdims=True)

    p, q = logs(left), logs(right).clip(min=NOTHING)
    weight = np.exp(p)
    with np.errstate(invalid="ignore"):
        return np.where(weight == 0, 0.0, weight * (p - q)).sum(1)
