"""The Triton kernel of `crop_resize.cut_crops`, which defines what it computes; `kl_div.launch` launches it.

A program computes BLOCK pixels of one crop as sums over the filter's taps. Weights are ratios of integers: in units of
1 / (2 SIDE) of an input pixel, the centre of input pixel k is at (2 k + 1) x SIDE, that of output pixel i at
(2 i + 1) x length, and the triangle reaches 2 x max(length, SIDE) to either side. So rounding moves no tap.
"""
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false
# (Triton's types describe its compiler; the language that it reads is another.)

import triton
import triton.language as tl

TO_EVEN = tl.constexpr(12582912.0)
"""1.5 x 2^23: adding and subtracting it rounds a small float32 to the nearest integer, ties to even, as torch does."""


@triton.jit(do_not_specialize=["per_image"], do_not_specialize_on_alignment=["out"])
def cut_crops(
    addresses,  # (n,) int64: where each image's pixels (height, width, 3) uint8 begin
    widths,  # (n,) int32: of the images
    boxes,  # (n * per_image, 5) int32: x, y, width, height, whether the crop is mirrored
    out,  # (n * per_image, SIDE, SIDE, 3) uint8
    per_image,
    SIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Fill `out` with the crops; BLOCK pixels of one of them per program, see the module."""
    tiles = tl.cdiv(SIDE * SIDE, BLOCK)
    crop = tl.program_id(0) // tiles
    place = tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)
    image = tl.load(addresses + crop // per_image).to(tl.pointer_type(tl.uint8))
    stride = 3 * tl.load(widths + crop // per_image).to(tl.int64)
    x, y = tl.load(boxes + crop * 5), tl.load(boxes + crop * 5 + 1)
    width, height = tl.load(boxes + crop * 5 + 2), tl.load(boxes + crop * 5 + 3)
    mirrored = tl.load(boxes + crop * 5 + 4) != 0

    row = tl.minimum(place // SIDE, SIDE - 1)  # past the end: anything inside, not stored
    column = place % SIDE
    column = tl.where(mirrored, SIDE - 1 - column, column)
    top, above = _first_tap(row, height, SIDE)
    left, before = _first_tap(column, width, SIDE)
    column_total = tl.zeros([BLOCK], tl.float32)
    for k in range(_taps(width, SIDE)):
        column_total += _weight(left, before, k, width, SIDE)
    row_total = tl.zeros([BLOCK], tl.float32)
    red = tl.zeros([BLOCK], tl.float32)
    green = tl.zeros([BLOCK], tl.float32)
    blue = tl.zeros([BLOCK], tl.float32)
    for j in range(_taps(height, SIDE)):
        line = image + (y + tl.minimum(top + j, height - 1)).to(tl.int64) * stride
        weight = _weight(top, above, j, height, SIDE)
        row_total += weight
        for k in range(_taps(width, SIDE)):
            pixel = line + 3 * (x + tl.minimum(left + k, width - 1))
            share = weight * _weight(left, before, k, width, SIDE)
            red += share * tl.load(pixel).to(tl.float32)
            green += share * tl.load(pixel + 1).to(tl.float32)
            blue += share * tl.load(pixel + 2).to(tl.float32)
    total = row_total * column_total
    first = out + crop.to(tl.int64) * (3 * SIDE * SIDE) + 3 * place
    _store(first, red / total, place < SIDE * SIDE)
    _store(first + 1, green / total, place < SIDE * SIDE)
    _store(first + 2, blue / total, place < SIDE * SIDE)


@triton.jit
def _store(pointers, values, mask):
    """Store values rounded to uint8."""
    tl.store(pointers, (values + TO_EVEN - TO_EVEN).to(tl.int32).to(tl.uint8), mask=mask)


@triton.jit
def _taps(length, SIDE: tl.constexpr):
    """The largest number of input pixels under an output pixel's triangle."""
    return tl.cdiv(2 * tl.maximum(length, SIDE), SIDE)


@triton.jit
def _first_tap(i, length, SIDE: tl.constexpr):
    """The first input pixel under the triangle of output pixel i, and its distance from the triangle's centre."""
    centre = (2 * i + 1) * length
    low = centre - 2 * tl.maximum(length, SIDE) - SIDE
    first = tl.where(low < 0, 0, low // (2 * SIDE) + 1)
    return first, (2 * first + 1) * SIDE - centre


@triton.jit
def _weight(first, distance, k, length, SIDE: tl.constexpr):
    """The unnormalised weight of input pixel first + k; 0 past the box."""
    weight = 2 * tl.maximum(length, SIDE) - tl.abs(distance + 2 * SIDE * k)
    return tl.where(first + k < length, tl.maximum(weight, 0), 0).to(tl.float32)
