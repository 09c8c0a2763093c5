"""Crop planning: (seed, content hash, crop number) -> box and flip, distributed as torchvision's RandomResizedCrop.

A crop depends on nothing else: not on the order of images, the batch, the workers or other crops. The random numbers
come from the counter-based generator Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as
1, 2, 3", SC 2011). With the image's 128-bit content hash read as four little-endian words h0..h3:

    key     = (seed's low word XOR h2, seed's high word XOR h3)
    counter = (h0, h1, crop number, draw)

Draw t < 10 gives attempt t its four words: area, aspect ratio, y, x. Draw 10 gives the flip. Golden vectors in the
tests fix these numbers. Stores hold the boxes themselves; the seed only records where they came from.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from repcon.config import CropConfig
from repcon.runtime.errors import UserError

ATTEMPTS = 10
CHUNK = 1 << 15
"""Boxes drawn at a time: they fit into the processor's cache and bound the memory."""

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))
_LOW = np.uint64(0xFFFFFFFF)
_WORD = np.uint64(32)


@dataclass(frozen=True, slots=True, kw_only=True)
class CropPlan:
    """The boxes and flips of M crops of N images."""

    boxes: np.ndarray
    """(M, N, 4) uint16: x, y, width, height in the pack's pixels; inside the image, width and height >= 1."""
    flips: np.ndarray
    """(M, N) uint8: 1 mirrors the crop from left to right."""


def plan_crops(config: CropConfig, hashes: np.ndarray, sizes: np.ndarray, crops: Sequence[int]) -> CropPlan:
    """Draw the crops numbered `crops` of every image.

    hashes: (N, 16) uint8 content hashes. sizes: (N, 2) integers: width, height, each 1 to 65,535. crops: M crop
    numbers, each 0 to 2^32 - 1.

    Raises UserError naming the invalid field of the configuration; ValueError for wrong shapes or sizes.
    """
    check_crop_config(config)
    hashes, sizes = np.ascontiguousarray(hashes, np.uint8), np.asarray(sizes)
    count = len(hashes)
    if hashes.shape != (count, 16) or sizes.shape != (count, 2):
        raise ValueError(f"hashes must be (N, 16) and sizes (N, 2), not {hashes.shape} and {sizes.shape}")
    if count and not (sizes.min() >= 1 and sizes.max() <= 65_535):
        raise ValueError("sizes must lie between 1 and 65,535 pixels")
    words = hashes.view("<u4").astype(np.uint64)
    boxes = np.empty((len(crops), count, 4), np.uint16)
    flips = np.empty((len(crops), count), np.uint8)
    for row, crop in enumerate(crops):
        for start in range(0, count, CHUNK):
            chunk = slice(start, start + CHUNK)
            boxes[row, chunk] = _draw_boxes(config, words[chunk], sizes[chunk].astype(np.float64), int(crop))
            flips[row, chunk] = _uniform(_random_words(config.seed, words[chunk], int(crop), ATTEMPTS)[0]) < config.flip
    return CropPlan(boxes=boxes, flips=flips)


def check_crop_config(config: CropConfig) -> None:
    """Raises UserError naming the first invalid field."""
    (small, large), (narrow, wide) = config.scale, config.ratio
    if not 0 < small <= large <= 1:
        raise UserError(f"crop.scale = {list(config.scale)}: must rise and lie above 0 and up to 1")
    if not 0 < narrow <= wide < float("inf"):
        raise UserError(f"crop.ratio = {list(config.ratio)}: must rise and lie above 0")
    if not 0 <= config.flip <= 1:
        raise UserError(f"crop.flip = {config.flip}: must be a probability, 0 to 1")
    if not 0 <= config.seed < 1 << 64:
        raise UserError(f"crop.seed = {config.seed}: must lie between 0 and 2^64 - 1")


def philox(counter: Sequence[np.ndarray], key: Sequence[np.ndarray]) -> tuple[np.ndarray, ...]:
    """Philox4x32-10: four words out of a counter of four and a key of two; all uint64 arrays that hold 32 bits."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        first, second = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (second >> _WORD) ^ c1 ^ k0, second & _LOW, (first >> _WORD) ^ c3 ^ k1, first & _LOW
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return c0, c1, c2, c3


def _random_words(seed: int, words: np.ndarray, crop: int, draw: int) -> tuple[np.ndarray, ...]:
    """Four random words (n,) uint64 for each of n images, whose hashes are `words` (n, 4) uint64."""
    counter = (words[:, 0], words[:, 1], np.full(len(words), crop, np.uint64), np.full(len(words), draw, np.uint64))
    key = (words[:, 2] ^ np.uint64(seed & 0xFFFFFFFF), words[:, 3] ^ np.uint64(seed >> 32))
    return philox(counter, key)


def _uniform(word: np.ndarray) -> np.ndarray:
    """Float64 in [0, 1)."""
    return word.astype(np.float64) * 2.0**-32


def _below(word: np.ndarray, limit: np.ndarray) -> np.ndarray:
    """Integers 0 to limit - 1: the high word of word * limit."""
    return (word * limit.astype(np.uint64)) >> _WORD


def _draw_boxes(config: CropConfig, words: np.ndarray, sizes: np.ndarray, crop: int) -> np.ndarray:
    """(n, 4) uint16 boxes: up to ten attempts each, then the largest centred box of an allowed aspect ratio."""
    boxes = _centred_boxes(config, sizes)
    remaining = np.arange(len(sizes))
    for attempt in range(ATTEMPTS):
        width, height = sizes[remaining].T
        area_word, ratio_word, y_word, x_word = _random_words(config.seed, words[remaining], crop, attempt)
        area = width * height * _between(config.scale, _uniform(area_word))
        ratio = np.exp(_between(np.log(np.array(config.ratio, np.float64)), _uniform(ratio_word)))
        w, h = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
        fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
        w, h, width, height = w[fits], h[fits], width[fits], height[fits]
        x, y = _below(x_word[fits], width - w + 1), _below(y_word[fits], height - h + 1)
        boxes[remaining[fits]] = np.stack([x, y, w.astype(np.uint64), h.astype(np.uint64)], axis=1)
        remaining = remaining[~fits]
        if not remaining.size:
            break
    return boxes


def _between(bounds: Sequence[float] | np.ndarray, fraction: np.ndarray) -> np.ndarray:
    low, high = bounds
    return low + (high - low) * fraction


def _centred_boxes(config: CropConfig, sizes: np.ndarray) -> np.ndarray:
    """(n, 4) uint16. Where torchvision's rounding would give a side of 0, it is one pixel."""
    width, height = sizes.T
    narrow, wide = config.ratio
    w = np.where(width / height > wide, np.rint(height * wide), width)
    h = np.where(width / height < narrow, np.rint(width / narrow), height)
    w, h = np.clip(w, 1, width), np.clip(h, 1, height)
    return np.stack([(width - w) // 2, (height - h) // 2, w, h], axis=1).astype(np.uint16)
