"""What the tests share: small real pictures."""

from pathlib import Path

import pytest
import simplejpeg
from pictures import photograph


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
