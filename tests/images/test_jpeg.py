"""One image in, the pack's JPEG out: what is kept, what is re-encoded and how, what is refused."""

import io
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
import simplejpeg
from pictures import photograph
from PIL import Image, PngImagePlugin

from repcon.images.encode import Encoded, encode
from repcon.images.jpeg import MAX_PIXELS, InvalidImageError, content_hash, read_header


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def jpeg(width: int = 48, height: int = 32, subsampling: str = "420", seed: int = 0) -> bytes:
    return simplejpeg.encode_jpeg(photograph(seed, width, height), quality=90, colorsubsampling=subsampling)


def pixels(encoded: Encoded) -> np.ndarray:
    decoded = simplejpeg.decode_jpeg(encoded.data)
    assert decoded.shape == (encoded.height, encoded.width, 3)
    header = read_header(encoded.data)
    assert (header.width, header.height, header.frame, header.components) == (encoded.width, encoded.height, 0xC0, 3)
    assert encoded.digest == content_hash(encoded.data)
    return decoded.astype(np.float64)


def smooth(width: int = 48, height: int = 32) -> np.ndarray:
    """Colours that survive JPEG almost unchanged."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([60 + 3 * x, 200 - 4 * y, 90 + x + y], -1).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("subsampling", ["444", "422", "420", "440", "411"])
def test_baseline_colour_jpegs_keep_their_bytes(subsampling: str) -> None:
    data = jpeg(33, 17, subsampling)
    encoded = encode(data, 48, 95)
    assert encoded.data == data and encoded.change == ""
    assert (encoded.width, encoded.height) == (33, 17)


def test_bytes_after_the_end_and_comments_are_kept() -> None:
    data = jpeg()
    data = data[:2] + b"\xff\xfe\x00\x06note" + data[2:] + b"a phone's video"
    assert encode(data, 0, 95).data == data


def test_large_images_are_made_smaller_once() -> None:
    encoded = encode(jpeg(200, 100), 64, 95)
    assert (encoded.width, encoded.height, encoded.change) == (64, 32, "larger than max_side")
    again = encode(encoded.data, 64, 95)
    assert again.data == encoded.data and again.change == ""
    assert encode(jpeg(200, 100), 64, 95).data == encoded.data


@pytest.mark.parametrize("size", [(1, 1), (20_000, 10), (10, 20_000), (1, 700)])
def test_extreme_shapes(size: tuple[int, int]) -> None:
    whole = encode(jpeg(*size), 0, 95)
    assert (whole.width, whole.height) == size and whole.change == ""
    small = encode(jpeg(*size), 256, 95)
    assert max(small.width, small.height) == min(256, max(size)) and min(small.width, small.height) >= 1
    assert pixels(small).size


@pytest.mark.parametrize("orientation", range(2, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_exif_orientation_is_applied(orientation: int, kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(smooth())
    upright = {
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, -1),
        7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
        8: lambda a: np.rot90(a),
    }[orientation](smooth().astype(np.float64))
    options = {"quality": 98, "subsampling": 0} if kind == "JPEG" else {}
    encoded = encode(saved(image, kind, exif=exif, **options), 0, 98)
    assert encoded.change == ("EXIF orientation" if kind == "JPEG" else "PNG")
    assert pixels(encoded).shape == upright.shape
    assert np.abs(pixels(encoded) - upright).mean() < 3
    assert encode(encoded.data, 0, 98).change == ""


def test_upright_and_broken_exif_change_nothing() -> None:
    exif = Image.Exif()
    exif[0x0112] = 1
    data = saved(Image.fromarray(smooth()), "JPEG", exif=exif)
    assert encode(data, 0, 95).data == data
    block = b"Exif\0\0" + b"II*\0" + b"\xff" * 20
    broken = jpeg()
    broken = broken[:2] + b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block + broken[2:]
    assert encode(broken, 0, 95).data == broken


def test_other_jpegs_become_baseline_colour() -> None:
    image = Image.fromarray(smooth())
    cases = {
        "progressive": saved(image, "JPEG", quality=98, progressive=True),
        "grayscale": saved(image.convert("L"), "JPEG", quality=98),
        "CMYK": saved(image.convert("CMYK"), "JPEG", quality=98),
        "stored as RGB": saved(image, "JPEG", quality=98, keep_rgb=True),
    }
    for change, data in cases.items():
        encoded = encode(data, 0, 98)
        assert encoded.change == change
        wanted = np.asarray(image.convert("L").convert("RGB") if change == "grayscale" else image, np.float64)
        assert np.abs(pixels(encoded) - wanted).mean() < 4, change


def test_adobe_cmyk_keeps_its_colours() -> None:
    """Pillow writes Adobe's inverted inks; a decoder that misses it gives the negative."""
    white = encode(saved(Image.new("CMYK", (16, 16), (0, 0, 0, 0)), "JPEG"), 0, 95)
    assert pixels(white).min() > 250


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM"])
def test_other_formats(kind: str) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    encoded = encode(saved(Image.fromarray(smooth()), kind, **options), 0, 98)
    assert encoded.change == kind
    assert np.abs(pixels(encoded) - smooth()).mean() < (12 if kind == "GIF" else 3)


def test_transparent_pixels_are_laid_on_white() -> None:
    clear = Image.new("RGBA", (16, 16), (255, 0, 0, 0))
    half = Image.new("RGBA", (16, 16), (0, 0, 0, 128))
    palette = Image.new("P", (16, 16), 0)
    palette.putpalette([10, 20, 30] * 256)
    assert pixels(encode(saved(clear, "PNG"), 0, 95)).min() > 252
    assert np.abs(pixels(encode(saved(half, "PNG"), 0, 95)) - 127).max() < 3
    assert pixels(encode(saved(palette, "PNG", transparency=0), 0, 95)).min() > 252
    assert pixels(encode(saved(Image.new("LA", (8, 8), (0, 0)), "PNG"), 0, 95)).min() > 252


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_sixteen_bits_are_scaled_not_cut(kind: str) -> None:
    values = np.linspace(0, 65_535, 64 * 16).reshape(16, 64).astype(np.uint16)
    encoded = encode(saved(Image.fromarray(values), kind), 0, 100)
    assert np.abs(pixels(encoded) - (values / 257)[..., None]).max() < 3


def test_thirty_two_bits_are_refused() -> None:
    with pytest.raises(InvalidImageError, match="32-bit"):
        encode(saved(Image.new("F", (8, 8), 0.5), "TIFF"), 0, 95)


def huge_jpeg(width: int, height: int) -> bytes:
    data = bytearray(jpeg())
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def test_bombs_are_refused_from_their_header() -> None:
    png = bytearray(saved(Image.new("L", (8, 8)), "PNG"))
    png[16:24] = struct.pack(">II", 60_000, 60_000)
    png[29:33] = struct.pack(">I", zlib.crc32(png[12:29]))
    tracemalloc.start()
    for data in (huge_jpeg(65_500, 65_500), huge_jpeg(65_535, 2049), bytes(png)):
        with pytest.raises(InvalidImageError, match=r"pixels|limit"):
            encode(data, 64, 95)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10_000_000 and MAX_PIXELS < 65_535 * 2049


def test_too_many_scans_are_refused() -> None:
    data = saved(Image.fromarray(smooth()), "JPEG", progressive=True)
    scan = data[data.index(b"\xff\xda") : -2]
    with pytest.raises(InvalidImageError, match="too many scans"):
        encode(data[:-2] + scan * 100 + b"\xff\xd9", 0, 95)


def test_sides_beyond_jpeg_need_max_side() -> None:
    wide = saved(Image.new("L", (70_000, 2)), "PNG")
    with pytest.raises(InvalidImageError, match="set max_side"):
        encode(wide, 0, 95)
    assert encode(wide, 1000, 95).width == 1000


@pytest.mark.parametrize("share", [0.2, 0.6, 0.98])
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("ended", [False, True])
def test_truncated_jpegs_are_refused(share: float, progressive: bool, ended: bool) -> None:
    """Also where the end marker was put back, which many decoders take for a whole picture with a grey rest."""
    whole = saved(Image.fromarray(photograph(1, 160, 120)), "JPEG", quality=95, progressive=progressive)
    with pytest.raises(InvalidImageError, match=r"truncated|damaged"):
        encode(whole[: int(len(whole) * share)] + (b"\xff\xd9" if ended else b""), 0, 95)


def test_truncated_cmyk_and_png_are_refused() -> None:
    for image, kind in ((Image.fromarray(smooth()).convert("CMYK"), "JPEG"), (Image.fromarray(smooth()), "PNG")):
        data = saved(image, kind)
        with pytest.raises(InvalidImageError):
            encode(data[: len(data) * 2 // 3], 0, 95)


def test_harmless_damage_is_mended() -> None:
    data = jpeg()
    table = data.index(b"\xff\xc4")
    dirty = data[:table] + b"\0\0\0" + data[table:]
    encoded = encode(dirty, 0, 95)
    assert encoded.change == "harmless damage"
    assert np.abs(pixels(encoded) - simplejpeg.decode_jpeg(data)).mean() < 4


def test_harmless_damage_hides_no_other() -> None:
    data = jpeg()
    table, scan = data.index(b"\xff\xc4"), data.index(b"\xff\xda")
    cut = data[: scan + (len(data) - scan) // 3] + b"\xff\xd9"
    with pytest.raises(InvalidImageError, match="truncated"):
        encode(cut[:table] + b"\0\0\0" + cut[table:], 0, 95)
    with pytest.raises(InvalidImageError, match="extraneous bytes"):  # in the scan its bits went wrong
        encode(data[:-2] + b"\x11\x22\x33" * 9 + data[-2:], 0, 95)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff",
        b"\xff\xd8",
        b"\xff\xd8\xff\xd9",
        b"hello, not an image",
        b"\x89PNG\r\n\x1a\n",
        b"GIF89a",
        b"\0" * 99,
    ],
)
def test_what_is_no_image_is_refused(data: bytes) -> None:
    with pytest.raises(InvalidImageError):
        encode(data, 0, 95)


def test_any_flipped_or_missing_bytes_give_a_jpeg_or_a_reason() -> None:
    """2,000 damaged files: never another exception, and whatever comes out is whole."""
    generator = np.random.default_rng(7)
    image = Image.fromarray(photograph(2, 40, 30))
    wholes = [saved(image, kind) for kind in ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP")]
    wholes.append(saved(image, "JPEG", progressive=True))
    for number in range(2000):
        data = bytearray(wholes[number % len(wholes)])
        for place in generator.integers(0, len(data), 1 + number % 3):
            data[place] = generator.integers(0, 256)
        if number % 5 == 0:
            del data[generator.integers(0, len(data)) :]
        try:
            encoded = encode(bytes(data), 32, 90)
        except InvalidImageError as error:
            assert str(error)
        else:
            assert simplejpeg.decode_jpeg(encoded.data).shape == (encoded.height, encoded.width, 3)


def test_long_texts_and_profiles_of_a_png_are_dropped() -> None:
    """Pillow decompresses a megabyte of metadata at most, and fails on more; the pixels are whole."""
    image, long = Image.fromarray(smooth()), "x" * 2_000_000
    texts = [PngImagePlugin.PngInfo() for _ in range(3)]
    texts[0].add_text("workflow", long, zip=True)
    texts[1].add_itxt("XML:com.adobe.xmp", long, zip=True)
    exif = Image.Exif()
    exif[0x0112] = 6
    wanted = encode(saved(image, "PNG"), 0, 95)
    for info in texts:
        assert encode(saved(image, "PNG", pnginfo=info), 0, 95) == wanted
    assert encode(saved(image, "PNG", icc_profile=long.encode()), 0, 95) == wanted
    turned = encode(saved(image, "PNG", pnginfo=texts[0], exif=exif), 0, 95)
    assert (turned.width, turned.height) == (32, 48)


def test_a_png_whose_pixels_are_damaged_is_not_saved_by_dropping_its_texts() -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("workflow", "x" * 2_000_000, zip=True)
    data = saved(Image.fromarray(photograph(0, 48, 32)), "PNG", pnginfo=info)
    for cut in (data[:-200], data[:100], data[:9]):
        with pytest.raises(InvalidImageError):
            encode(cut, 0, 95)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("JPEG", {}),
        ("PNG", {}),
        ("WEBP", {}),
        ("WEBP", {"lossless": True}),
        ("WEBP", {"exif": b"Exif\0\0" + b"x" * 200}),
    ],
)
def test_a_decoder_without_memory_is_not_damage(
    kind: str, options: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decoders say that the image is damaged where they get no memory; what is damaged stays so with memory."""
    whole = saved(Image.fromarray(photograph(0, 48, 32)), kind, **options)
    damaged = whole[: len(whole) * 9 // 10]
    with pytest.raises(InvalidImageError):
        encode(damaged, 0, 95)

    def none_left(size: int) -> None:
        assert size == 24 * 48 * 32
        raise MemoryError

    monkeypatch.setattr("repcon.images.encode.require_memory", none_left)
    with pytest.raises(MemoryError):
        encode(damaged, 0, 95)


def test_a_decoder_that_had_no_memory_once_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    data, calls = jpeg(), []

    def at_first_none(data: bytes, **options: object) -> np.ndarray:
        calls.append(1)
        if len(calls) == 1:
            raise ValueError("Insufficient memory (case 4)")
        return decode(data, **options)

    decode = simplejpeg.decode_jpeg
    monkeypatch.setattr(simplejpeg, "decode_jpeg", at_first_none)
    assert encode(data, 0, 95).data == data and len(calls) == 2
