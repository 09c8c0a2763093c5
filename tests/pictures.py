"""Pictures that tests make: real enough for a JPEG coder and a network."""

import numpy as np


def photograph(seed: int, width: int, height: int, hue: int = 0) -> np.ndarray:
    """(height, width, 3) uint8: smooth gradients, a few blobs and fine grain, as a camera would leave them."""
    generator = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width].astype(np.float32) / max(width, height)
    picture = np.stack([x, y, 1 - x], axis=-1) * generator.uniform(40, 120, 3)
    for _ in range(4):
        centre, radius = generator.uniform(0, 1, 2), generator.uniform(0.05, 0.3)
        blob = np.exp(-((x - centre[0]) ** 2 + (y - centre[1]) ** 2) / radius**2)[..., None]
        picture += blob * generator.uniform(-90, 150, 3)
    picture[..., hue % 3] += 60
    return (picture + generator.normal(0, 4, picture.shape)).clip(0, 255).astype(np.uint8)
