"""Pictures for the loaders' benchmark, as packs: generated ones, or mosaics of photographs.

A JPEG's cost lies in its detail, so a picture that is to stand for a photograph has a photograph's spectrum: amplitude
falling as one over frequency, colour far weaker than light, a few hard edges, and a little grain.
"""

import tarfile
from collections.abc import Iterable, Iterator, Sequence
from itertools import cycle, islice, repeat
from pathlib import Path

import numpy as np
import simplejpeg

from repcon.commands import pack as packing
from repcon.config import PackConfig
from repcon.decode.libraries import installed
from repcon.runtime.errors import UserError

QUALITY = 90
DIFFERENT = 64
"""Pictures that differ where many are `repeated`."""
Size = tuple[int, int]
"""Width and height in pixels."""


def generated(count: int, size: Size, seed: int = 0) -> Iterator[bytes]:
    """JPEGs of about 3.5 bits per pixel, 4:2:0."""
    generator = np.random.default_rng(seed)
    for _ in range(count):
        light, red, blue = (_cloud(generator, size) for _ in range(3))
        for _ in range(6):
            _shape(generator, light, red, blue)
        picture = np.stack([light + 0.2 * red, light - 0.1 * red - 0.1 * blue, light + 0.2 * blue], axis=-1)
        picture = 110 + 45 * picture + generator.normal(0, 4, light.shape)[..., None]
        yield _encode(picture.clip(0, 255).astype(np.uint8))


def _cloud(generator: np.random.Generator, size: Size) -> np.ndarray:
    """(height, width) float64 of unit variance whose spectrum falls a little faster than one over frequency."""
    width, height = size
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = np.inf
    noise = generator.normal(size=(2, *frequency.shape))
    cloud = np.fft.irfft2((noise[0] + 1j * noise[1]) / frequency**1.2, s=(height, width))
    return cloud / cloud.std()


def _shape(generator: np.random.Generator, *channels: np.ndarray) -> None:
    """An ellipse of another tone in front of what is there."""
    height, width = channels[0].shape
    y, x = np.ogrid[0:height, 0:width]
    centre_y, centre_x = generator.uniform(0, 1, 2) * (height, width)
    tall, wide = generator.uniform(0.04, 0.25, 2) * width
    inside = ((y - centre_y) / tall) ** 2 + ((x - centre_x) / wide) ** 2 < 1
    for channel in channels:
        channel[inside] = 0.5 * channel[inside] + generator.normal(0, 0.8)


def photographs(folder: Path, count: int) -> list[bytes]:
    """At most `count` JPEGs, every tenth of the first in each of a folder's tars, so that many classes are among them.

    Raises UserError where there are none.
    """
    paths = sorted(folder.glob("*.tar"))
    pictures: list[bytes] = []
    for path in paths:
        with tarfile.open(path) as tar, path.open("rb") as file:
            named = (member for member in tar if member.name.endswith((".jpg", ".jpeg")))
            for member in islice(named, 0, 10 * (count // len(paths)), 10):
                file.seek(member.offset_data)
                pictures.append(file.read(member.size))
    if not pictures:
        raise UserError(f"{folder}: no photographs there; --data takes a folder of tars of JPEGs (see tools/photos.py)")
    return pictures


def mosaics(pictures: list[bytes], count: int, size: Size) -> Iterator[bytes]:
    """JPEGs of a size, each put together of photographs in their own resolution, in another order each time round."""
    width, height = size
    generator = np.random.default_rng(0)
    tiles = (pictures[place] for _ in repeat(None) for place in generator.permutation(len(pictures)))
    for _ in range(count):
        picture = np.zeros((height, width, 3), np.uint8)
        y = 0
        while y < height:
            x, row = 0, height - y
            while x < width:
                tile = simplejpeg.decode_jpeg(next(tiles))[: height - y, : width - x]
                picture[y : y + len(tile), x : x + tile.shape[1]] = tile
                x, row = x + tile.shape[1], min(row, len(tile))
            y += row
        yield _encode(picture)


def repeated(jpegs: Sequence[bytes], count: int) -> Iterator[bytes]:
    """`count` JPEGs, the given ones again and again, each with another comment: another file, of the same pixels and
    coding, that costs as much to read and decode."""
    for number, jpeg in zip(range(count), cycle(jpegs), strict=False):
        comment = f"{number:08d}".encode()
        yield jpeg[:2] + b"\xff\xfe" + (len(comment) + 2).to_bytes(2, "big") + comment + jpeg[2:]


def _encode(picture: np.ndarray) -> bytes:
    return simplejpeg.encode_jpeg(np.ascontiguousarray(picture), quality=QUALITY, colorsubsampling="420")


def pack(pictures: Iterable[bytes], out: Path) -> Path:
    """A pack of JPEGs at `out`, with FFCV's file where FFCV is installed."""
    folder = out.with_name(f"{out.name}-pictures")
    folder.mkdir()
    for number, data in enumerate(pictures):
        (folder / f"{number:06d}.jpg").write_bytes(data)
    packing.run(PackConfig(source=str(folder), out=str(out), ffcv=installed("ffcv")))
    return out
