"""What the tests share: small real pictures."""

from pathlib import Path

import numpy as np
import pytest
import simplejpeg


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


@pytest.fixture(scope="session")
def picture_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A labelled image folder: 4 classes of 8 JPEGs each, of varied sizes; colour tells the classes apart."""
    root = tmp_path_factory.mktemp("pictures")
    for label, name in enumerate(["apple", "birch", "cedar", "daisy"]):
        (root / name).mkdir()
        for number in range(8):
            width, height = 72 + 8 * (number % 3), 64 + 12 * (number % 4)
            pixels = photograph(100 * label + number, width, height, hue=label)
            data = simplejpeg.encode_jpeg(pixels, quality=95, colorsubsampling=("420", "444")[number % 2])
            (root / name / f"{number:02d}.jpg").write_bytes(data)
    return root
