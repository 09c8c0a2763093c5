"""JPEG headers, and what the other modules need of an image file: its content hash, its limits, its error.

Pillow also reads headers lazily, but it keeps neither the frame's kind (baseline, extended, lossless) nor headers of
12-bit images, and does not tell where segments lie.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from PIL import Image

MAX_PIXELS = 1 << 27
"""Larger images are refused by their header, before memory is allocated: 400 MB once decoded."""

_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}


class InvalidImageError(Exception):
    """An image that cannot be packed; the message is the reason."""

    def __init__(self, reason: str, pixels: int = 0) -> None:
        super().__init__(reason)
        self.pixels = pixels
        """Number of pixels of the image whose decoding failed; 0 where nothing was decoded."""


@dataclass(frozen=True, slots=True)
class Header:
    """A JPEG's header, up to its first scan."""

    width: int
    height: int
    frame: int
    """The frame marker's second byte: 0xC0 is baseline, 0xC2 progressive."""
    precision: int
    components: int
    sampling: tuple[tuple[int, int], ...]
    """(horizontal, vertical) factor of each component."""
    rgb: bool
    """The three components are red, green and blue, not luma and chroma."""
    orientation: int
    """EXIF orientation, 1 where there is none."""


def content_hash(data: bytes) -> bytes:
    """16 bytes: SHA-256, cut to 128 bits."""
    return hashlib.sha256(data).digest()[:16]


def read_header(data: bytes) -> Header:
    """Reads a JPEG's header. Raises InvalidImageError where they are damaged."""
    frame: tuple[int, bytes] | None = None
    adobe, orientation = -1, 1
    for marker, place in _segments(data):
        if marker in _FRAMES and frame is None:
            frame = marker, data[place]
        elif marker == 0xEE and (body := data[place])[:5] == b"Adobe" and len(body) >= 12:
            adobe = body[11]
        elif marker == 0xE1 and (body := data[place])[:6] == b"Exif\0\0":
            orientation = exif_orientation(partial(_exif, body))
    if frame is None or len(frame[1]) < 6:
        raise InvalidImageError("damaged: no frame header")
    marker, body = frame
    components = body[5]
    if len(body) < 6 + 3 * components:
        raise InvalidImageError("damaged: a broken frame header")
    parts = [body[6 + 3 * number : 9 + 3 * number] for number in range(components)]
    return Header(
        width=int.from_bytes(body[3:5], "big"),
        height=int.from_bytes(body[1:3], "big"),
        frame=marker,
        precision=body[0],
        components=components,
        sampling=tuple((part[1] >> 4, part[1] & 15) for part in parts),
        rgb=components == 3 and (adobe == 0 or (adobe < 0 and bytes(part[0] for part in parts) == b"RGB")),
        orientation=orientation,
    )


def _segments(data: bytes) -> Iterator[tuple[int, slice]]:
    """(marker, slice of its body) of each segment before the first scan; last the scan's, with all the rest."""
    position = 2
    while True:
        position = data.find(b"\xff", position)
        while 0 <= position < len(data) - 1 and data[position + 1] == 0xFF:
            position += 1
        if position < 0 or position + 4 > len(data):
            return
        marker = data[position + 1]
        if marker in (0xDA, 0xD9):
            yield marker, slice(position + 2, len(data))
            return
        if marker in (0x00, 0x01) or 0xD0 <= marker <= 0xD8:
            position += 2
            continue
        length = int.from_bytes(data[position + 2 : position + 4], "big")
        if length < 2 or position + 2 + length > len(data):
            raise InvalidImageError("truncated: the header is cut off")
        yield marker, slice(position + 4, position + 2 + length)
        position += 2 + length


def _exif(block: bytes) -> Image.Exif:
    parsed = Image.Exif()
    parsed.load(block)
    return parsed


def exif_orientation(exif: Callable[[], Image.Exif]) -> int:
    """The EXIF block's orientation, 1 to 8; 1 for an unreadable block, as in image viewers."""
    try:
        value = exif().get(0x0112, 1)
    except MemoryError:
        raise
    except Exception:  # Pillow's parser raises many kinds on damaged blocks
        return 1
    return value if value in range(1, 9) else 1


def strip_metadata(data: bytes) -> bytes:
    """The JPEG without application segments and without bytes between segments, where damage does not matter."""
    parts = [data[:2]]
    for marker, body in _segments(data):
        if marker in (0xDA, 0xD9):
            parts.append(data[body.start - 2 :])
        elif not 0xE0 <= marker <= 0xEF:
            parts.append(data[body.start - 4 : body.stop])
    return b"".join(parts)


def check_image_size(width: int, height: int) -> None:
    if width < 1 or height < 1:
        raise InvalidImageError(f"an empty picture: {width} x {height} pixels")
    if width * height > MAX_PIXELS:
        raise InvalidImageError(f"too many pixels: {width} x {height}, of which at most {MAX_PIXELS:,} are decoded")
