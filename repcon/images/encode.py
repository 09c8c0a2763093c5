"""Encode an image file for a pack: the same bytes where the JPEG can be kept, else re-encoded once."""

import io
from dataclasses import dataclass

import numpy as np
import simplejpeg
from PIL import Image

from repcon.images.jpeg import (
    MAX_PIXELS,
    Header,
    InvalidImageError,
    check_image_size,
    content_hash,
    exif_orientation,
    read_header,
    strip_metadata,
)
from repcon.runtime.memory import require_memory

MAX_SIDE = 65_500
"""The longest side that libjpeg encodes; boxes are uint16."""
MAX_SCANS = 500
"""A progressive JPEG has about ten."""
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF")
"""What Pillow may open: no format that starts another program."""

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
"""EXIF orientation -> the transposition that makes the image upright."""
_HARMLESS = ("extraneous bytes before marker", "Unknown Adobe color transform", "Invalid JFIF", "unknown JFIF")
"""Warnings of libjpeg that do not affect the pixels if their cause precedes the first scan. Other decoders fail on such
files, so they are re-encoded."""
_DECODING_BYTES = 24
"""Per pixel: more than any of the decoders takes at its peak, with the copies for transparency."""
_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_PIXELS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND", b"eXIf")
"""The chunks with the pixels and the orientation."""


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


def encode(data: bytes, max_side: int, quality: int) -> Encoded:
    """Encodes an image file's bytes as the JPEG that a pack holds.

    Raises InvalidImageError with the reason, and MemoryError where memory was short. Decoders that get no memory call
    the image damaged, so an image that fails is decoded again after a check that there is memory for it.
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
        check_image_size(header.width, header.height)
        if data.count(b"\xff\xda") > MAX_SCANS:
            raise InvalidImageError(f"too many scans: more than {MAX_SCANS}, which could take minutes to decode")
        decoded, damage = _decode_jpeg(data, header)
        change = _reason_to_reencode(header, max_side) or damage
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


def _reason_to_reencode(header: Header, max_side: int) -> str:
    """Why the JPEG cannot be kept as it is, for example "progressive"; empty where it can."""
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
    return "larger than max_side" if 0 < max_side < max(header.width, header.height) else ""


def _decode_jpeg(data: bytes, header: Header) -> tuple[np.ndarray | None, str]:
    """(height, width, 3) uint8, or None where Pillow has to decode; and a name for harmless damage of the file."""
    colorspace = "CMYK" if header.components == 4 else "RGB"
    decoded, reason = _decode_strictly(data, colorspace)
    harmless = any(words in reason for words in _HARMLESS)
    if harmless:
        _, reason = _decode_strictly(strip_metadata(data), colorspace)  # the first warning may hide a worse one
    if reason:
        kind = "truncated" if "remature end" in reason else "damaged"
        raise InvalidImageError(f"{kind}: {reason}", header.width * header.height)
    if harmless:
        return None, "harmless damage"
    # Pillow knows whether Adobe's inverted inks are meant.
    return (None if header.components == 4 else decoded), ""


def _decode_strictly(data: bytes, colorspace: str) -> tuple[np.ndarray | None, str]:
    """The pixels and "", or None and the first warning of libjpeg."""
    try:
        return simplejpeg.decode_jpeg(data, colorspace=colorspace, strict=True), ""
    except ValueError as error:
        return None, str(error)


def _decode(data: bytes) -> tuple[Image.Image, str]:
    """Decodes with Pillow to upright RGB; gives also the file's format.

    A PNG that fails is decoded again without its texts and profiles: Pillow limits how much of those it decompresses.
    """
    try:
        return _decode_with_pillow(data)
    except InvalidImageError:
        bare = _png_pixels_only(data)
        if len(bare) == len(data):
            raise
    return _decode_with_pillow(bare)


def _decode_with_pillow(data: bytes) -> tuple[Image.Image, str]:
    Image.init()
    pixels = 0
    try:
        with Image.open(io.BytesIO(data), formats=[name for name in FORMATS if name in Image.OPEN]) as image:
            check_image_size(*image.size)
            pixels, kind = image.width * image.height, image.format or "unknown"
            image.load()
            return _upright(_rgb(image, kind), exif_orientation(image.getexif)), kind
    except (InvalidImageError, MemoryError):
        raise
    except Image.UnidentifiedImageError as error:
        raise InvalidImageError("not an image in a known format") from error
    except Exception as error:  # decoders raise many kinds on damaged bytes
        raise InvalidImageError(f"cannot decode: {error}", pixels or _webp_pixels(data)) from error


def _webp_pixels(data: bytes) -> int:
    """Number of pixels in a WebP's header, at most `MAX_PIXELS`; its decoder allocates before Pillow knows the size."""
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


def _png_pixels_only(data: bytes) -> bytes:
    """The PNG without texts, profiles and animation; data of another format unchanged."""
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
    """8-bit RGB: 16-bit values scaled, transparent images composed on white.

    Raises InvalidImageError for 32-bit values.
    """
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
    if not 0 < max_side < max(image.size):
        if max(image.size) > MAX_SIDE:
            raise InvalidImageError(
                f"too long for a JPEG: {max(image.size)} pixels, which holds {MAX_SIDE}; set max_side"
            )
        return image
    scale = max_side / max(image.size)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    return image.resize(size, Image.Resampling.LANCZOS)
