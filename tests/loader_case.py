"""A small pack of every kind of JPEG, and requests for its crops; for the loaders' tests."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import simplejpeg
from pictures import photograph
from PIL import Image

from repcon import packing
from repcon.config import PackConfig
from repcon.images import Pack
from repcon.loaders import Request, installed

SIDES = (48, 33)


def _pillow(pixels: np.ndarray, **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=90, **options)
    return buffer.getvalue()


def sources() -> dict[str, bytes]:
    """File name to bytes: each subsampling, progressive, gray, odd, tiny, long and wide images."""
    jpegs = {
        f"{sampling} odd": simplejpeg.encode_jpeg(photograph(seed, 203, 151), quality=92, colorsubsampling=sampling)
        for seed, sampling in enumerate(("420", "422", "440", "444"))
    }
    jpegs["progressive"] = _pillow(photograph(10, 160, 120), progressive=True)
    jpegs["grayscale"] = _pillow(photograph(11, 120, 160)[..., 0])
    jpegs["one pixel"] = simplejpeg.encode_jpeg(photograph(12, 1, 1), colorsubsampling="420")
    jpegs["long"] = simplejpeg.encode_jpeg(photograph(13, 900, 10), colorsubsampling="420")
    jpegs["tall"] = simplejpeg.encode_jpeg(photograph(14, 7, 500), colorsubsampling="444")
    jpegs["größe 大 größer"] = simplejpeg.encode_jpeg(photograph(15, 300, 260), quality=95, colorsubsampling="420")
    return jpegs


def make_pack(folder: Path, *, seed: int = 0) -> Path:
    """Packs the sources above, for FFCV too where it is installed; a differing `seed` makes another pack."""
    for name, data in sources().items():
        target = folder / "source" / "a class" / f"{name}.jpg"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
    extra = simplejpeg.encode_jpeg(photograph(100 + seed, 90, 80), colorsubsampling="420")
    (folder / "source" / "a class" / "extra.jpg").write_bytes(extra)
    out = folder / "pack"
    packing.run(PackConfig(source=str(folder / "source"), out=str(out), workers=1, ffcv=installed("ffcv")))
    return out


def request(pack: Pack, rows: Sequence[int], crops: int, seed: int = 0) -> Request:
    """Boxes of all kinds: the whole image, one pixel in a corner, strips along edges, and any."""
    generator = np.random.default_rng(seed)
    boxes = np.empty((len(rows), crops, 4), np.uint16)
    for i, row in enumerate(rows):
        width, height = (int(size) for size in pack.sizes[row])
        fixed = [
            (0, 0, width, height),
            (width - 1, height - 1, 1, 1),
            (0, height // 2, width, height - height // 2),
            (width // 2, 0, width - width // 2, height),
        ]
        for j in range(crops):
            w, h = int(generator.integers(1, width + 1)), int(generator.integers(1, height + 1))
            x, y = int(generator.integers(0, width - w + 1)), int(generator.integers(0, height - h + 1))
            boxes[i, j] = fixed[j] if j < len(fixed) else (x, y, w, h)
    numbers = generator.integers(0, 50, (len(rows), crops))
    flips = generator.integers(0, 2, (len(rows), crops)).astype(np.uint8)
    return Request(images=np.array(rows, dtype=np.int64), crops=numbers, boxes=boxes, flips=flips)
