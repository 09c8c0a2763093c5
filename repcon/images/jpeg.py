"""One image's bytes -> the JPEG that a pack holds: the same bytes where they will do, else one re-encoding."""

import hashlib
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import simplejpeg
from PIL import Image

from repcon.runtime.memory import require_memory

MAX_PIXELS = 1 << 27
"""Larger pictures are refused from their header, before any memory is asked for: 400 MB once decoded."""
MAX_SIDE = 65_500
"""The longest side that libjpeg encodes; boxes are uint16."""
MAX_SCANS = 500
"""A progressive JPEG has about ten."""
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF")
"""What Pillow may open: no format that starts another program."""

_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_SAMPLINGS = {(1, 1), (2, 1), (2, 2), (1, 2), (4, 1)}
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation -> what makes the picture upright."""
_HARMLESS = ("extraneous bytes before marker", "Unknown Adobe color transform", "Invalid JFIF", "unknown JFIF")
"""libjpeg's warnings that leave the pixels whole where they are about what precedes the first scan. Other decoders fail
on them, so such files are re-encoded."""


_DECODING_BYTES = 24
"""Per pixel: more than any of the decoders takes at its peak, with the copies for transparency."""
_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_PIXELS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND", b"eXIf")
"""The chunks that a picture and its orientation are made of."""


class InvalidImageError(Exception):
    """The image is left out; the message is the reason."""

    def __init__(self, reason: str, pixels: int = 0) -> None:
        super().__init__(reason)
        self.pixels = pixels
        """Of the picture whose decoding failed; 0 where nothing was decoded."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """A JPEG as the pack holds it."""

    data: bytes
    width: int
    height: int
    digest: bytes
    """The content hash: the first 16 bytes of SHA-256 over `data`."""
    change: str
    """Why the image was re-encoded; empty where the original bytes are kept."""


@dataclass(frozen=True, slots=True)
class Header:
    """What a JPEG says of itself before its first scan."""

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


def encode(data: bytes, max_side: int, quality: int) -> Encoded:
    """Gives the pack's JPEG of an image file's bytes.

    Raises Unusable with the reason, and MemoryError where memory was short, which is no property of the image: decoders
    that get none call the image damaged, so one that fails is decoded twice, with the memory looked at in between.
    """
    try:
        return _encode(data, max_side, quality)
    except InvalidImageError as error:
        pixels = error.pixels
        if not pixels:
            raise
    require_memory(_DECODING_BYTES * pixels)
    return _encode(data, max_side, quality)


def _encode(data: bytes, max_side: int, quality: int) -> Encoded:
    if data[:2] == b"\xff\xd8":
        header = read_header(data)
        _bound(header.width, header.height)
        if data.count(b"\xff\xda") > MAX_SCANS:
            raise InvalidImageError(f"too many scans: more than {MAX_SCANS}, which could take minutes to decode")
        decoded, damage = _decode_jpeg(data, header)
        change = _change(header, max_side) or damage
        if not change:
            return Encoded(data, header.width, header.height, content_hash(data), "")
        pixels = _decode(data)[0] if decoded is None else _upright(Image.fromarray(decoded), header.orientation)
    else:
        pixels, change = _decode(data)
    image = _shrink(pixels, max_side)
    try:
        jpeg = simplejpeg.encode_jpeg(np.ascontiguousarray(image), quality=quality, colorsubsampling="420")
    except ValueError as error:
        raise InvalidImageError(f"cannot encode: {error}", image.width * image.height) from error
    return Encoded(jpeg, image.width, image.height, content_hash(jpeg), change)


def read_header(data: bytes) -> Header:
    """Reads a JPEG's markers up to its first scan. Raises Unusable where they are damaged."""
    frame: tuple[int, bytes] | None = None
    adobe, orientation = -1, 1
    for marker, place in _segments(data):
        if marker in _FRAMES and frame is None:
            frame = marker, data[place]
        elif marker == 0xEE and (body := data[place])[:5] == b"Adobe" and len(body) >= 12:
            adobe = body[11]
        elif marker == 0xE1 and (body := data[place])[:6] == b"Exif\0\0":
            orientation = _orientation(partial(_exif, body))
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
    """(marker, where its body lies) of each segment before the first scan, whose marker is last, with all the rest."""
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


def _orientation(exif: Callable[[], Image.Exif]) -> int:
    """The EXIF block's orientation, 1 to 8; an unreadable block says nothing, as viewers take it."""
    try:
        value = exif().get(0x0112, 1)
    except MemoryError:
        raise
    except Exception:  # Pillow's parser raises many kinds on damaged blocks
        return 1
    return value if value in range(1, 9) else 1


def _change(header: Header, max_side: int) -> str:
    """Why the JPEG cannot be kept as it is; empty where it can."""
    if header.components == 4:
        return "CMYK"
    if header.components == 1:
        return "grayscale"
    if header.frame == 0xC2:
        return "progressive"
    if header.frame != 0xC0 or header.precision != 8:
        return "not baseline"
    if header.rgb:
        return "stored as RGB"
    luma, *chroma = header.sampling
    if luma not in _SAMPLINGS or any(factors != (1, 1) for factors in chroma):
        return "unusual subsampling"
    if header.orientation != 1:
        return "EXIF orientation"
    return "larger than max_side" if _too_large(header.width, header.height, max_side) else ""


def _too_large(width: int, height: int, max_side: int) -> bool:
    return 0 < max_side < max(width, height)


def _bound(width: int, height: int) -> None:
    if width < 1 or height < 1:
        raise InvalidImageError(f"an empty picture: {width} x {height} pixels")
    if width * height > MAX_PIXELS:
        raise InvalidImageError(f"too many pixels: {width} x {height}, of which at most {MAX_PIXELS:,} are decoded")


def _decode_jpeg(data: bytes, header: Header) -> tuple[np.ndarray | None, str]:
    """(height, width, 3) uint8, or None where Pillow has to decode; and what harmless damage the file has."""
    colorspace = "CMYK" if header.components == 4 else "RGB"
    decoded, reason = _strict(data, colorspace)
    harmless = any(words in reason for words in _HARMLESS)
    if harmless:
        _, reason = _strict(_bare(data), colorspace)  # what was warned of first may hide worse
    if reason:
        kind = "truncated" if "remature end" in reason else "damaged"
        raise InvalidImageError(f"{kind}: {reason}", header.width * header.height)
    if harmless:
        return None, "harmless damage"
    # Pillow knows whether Adobe's inverted inks are meant.
    return (None if header.components == 4 else decoded), ""


def _bare(data: bytes) -> bytes:
    """The JPEG without what harmless damage lies in: bytes between the first segments, and applications' segments."""
    parts = [data[:2]]
    for marker, body in _segments(data):
        if marker in (0xDA, 0xD9):
            parts.append(data[body.start - 2 :])
        elif not 0xE0 <= marker <= 0xEF:
            parts.append(data[body.start - 4 : body.stop])
    return b"".join(parts)


def _strict(data: bytes, colorspace: str) -> tuple[np.ndarray | None, str]:
    """The pixels, or None and what libjpeg warns of first."""
    try:
        return simplejpeg.decode_jpeg(data, colorspace=colorspace, strict=True), ""
    except ValueError as error:
        return None, str(error)


def _decode(data: bytes) -> tuple[Image.Image, str]:
    """Pillow's pixels as upright RGB, and the format that they came in.

    A PNG that fails is read again without its texts and profiles, of which Pillow decompresses only so much.
    """
    try:
        return _opened(data)
    except InvalidImageError:
        bare = _bare_png(data)
        if len(bare) == len(data):
            raise
    return _opened(bare)


def _opened(data: bytes) -> tuple[Image.Image, str]:
    Image.init()
    pixels = 0
    try:
        with Image.open(io.BytesIO(data), formats=[name for name in FORMATS if name in Image.OPEN]) as image:
            _bound(*image.size)
            pixels, kind = image.width * image.height, image.format or "unknown"
            image.load()
            return _upright(_rgb(image, kind), _orientation(image.getexif)), kind
    except (InvalidImageError, MemoryError):
        raise
    except Image.UnidentifiedImageError as error:
        raise InvalidImageError("not an image in a known format") from error
    except Exception as error:  # decoders raise many kinds on damaged bytes
        raise InvalidImageError(f"cannot decode: {error}", pixels or _webp_pixels(data)) from error


def _webp_pixels(data: bytes) -> int:
    """The pixels that a WebP claims, at most `MAX_PIXELS`: its decoder asks for memory before Pillow knows its size."""
    kind, number = data[12:16], int.from_bytes(data[21:25], "little")
    if data[8:12] != b"WEBP":
        return 0
    if kind == b"VP8X":
        sides = [1 + int.from_bytes(data[place : place + 3], "little") for place in (24, 27)]
    elif kind == b"VP8L":
        sides = [1 + (number & 0x3FFF), 1 + (number >> 14 & 0x3FFF)]
    else:
        sides = [int.from_bytes(data[place : place + 2], "little") & 0x3FFF for place in (26, 28)]
    return min(sides[0] * sides[1], MAX_PIXELS)


def _bare_png(data: bytes) -> bytes:
    """The PNG's pixels without its texts, profiles and animation; data of another format as they are."""
    if data[: len(_PNG)] != _PNG:
        return data
    parts, position = [_PNG], len(_PNG)
    while position + 8 <= len(data):
        end = position + 12 + int.from_bytes(data[position : position + 4], "big")
        if data[position + 4 : position + 8] in _PNG_PIXELS:
            parts.append(data[position:end])
        position = end
    return b"".join(parts)


def _rgb(image: Image.Image, kind: str) -> Image.Image:
    """8-bit RGB: 16-bit values scaled, transparent pixels laid on white. Raises Unusable for other depths."""
    if image.mode.startswith("I;16") or (image.mode == "I" and kind == "PPM"):
        values = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise InvalidImageError("32-bit pixels, whose white is unknown")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image.convert("RGB")


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    return image.transpose(_TURNS[orientation]) if orientation in _TURNS else image


def _shrink(image: Image.Image, max_side: int) -> Image.Image:
    if not _too_large(image.width, image.height, max_side):
        if max(image.size) > MAX_SIDE:
            raise InvalidImageError(
                f"too long for a JPEG: {max(image.size)} pixels, which holds {MAX_SIDE}; set max_side"
            )
        return image
    scale = max_side / max(image.size)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    return image.resize(size, Image.Resampling.LANCZOS)
