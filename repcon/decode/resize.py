"""Exact boxes, resized with the antialiased triangle filter in float32: compiled by numba, lock released.

The filter is the one of torch's `interpolate(mode="bilinear", antialias=True)`: each output pixel is a weighted mean
of the box's pixels under a triangle whose half-width is max(1, scale) input pixels around the output pixel's centre.
Rows are mixed first (along memory, so the compiler's own vectors do), then columns, where a pixel's three channels
and one lane of its neighbour make a vector of four.
"""

# numba's intrinsics are called without their first parameter.
# pyright: reportCallIssue=false

import threading
from collections.abc import Callable, Sequence
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, models, register_model

COMPILING = threading.Lock()
"""Held while numba compiles, or loads what it compiled: threads that do so at once disturb each other."""


def _compiled(*, fastmath: bool = False) -> Callable[[Callable[..., Any]], Any]:
    """`numba.njit` without the interpreter's lock. What it compiled is kept on disk where it may write."""

    def decorate(function: Callable[..., Any]) -> Any:
        options = {"nogil": True, "error_model": "numpy", "fastmath": fastmath}
        try:
            return numba.njit(function, cache=True, **options)
        except RuntimeError:  # neither beside this file nor in the user's folder: each process compiles anew
            return numba.njit(function, **options)

    return decorate


class _Float4(types.Type):
    """Four floats in one register."""

    def __init__(self) -> None:
        super().__init__(name="repcon_float4")


_float4 = _Float4()
_VECTOR = ir.VectorType(ir.FloatType(), 4)


@register_model(_Float4)
class _Float4Model(models.PrimitiveModel):
    def __init__(self, manager, kind) -> None:
        super().__init__(manager, kind, _VECTOR)


def _address(context, builder, array_type, array, index):
    data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [index]), _VECTOR.as_pointer())


@intrinsic
def _zero4(typing):
    def build(context, builder, signature, arguments):
        return ir.Constant(_VECTOR, [0.0] * 4)

    return _float4(), build


@intrinsic
def _mixed4(typing, total, array, index, weight):
    """total + weight * array[index : index + 4]; no bounds are checked."""

    def build(context, builder, signature, arguments):
        total, array, index, weight = arguments
        values = builder.load(_address(context, builder, signature.args[1], array, index), align=4)
        one = builder.insert_element(ir.Constant(_VECTOR, ir.Undefined), weight, ir.Constant(ir.IntType(32), 0))
        zeros = ir.Constant(ir.VectorType(ir.IntType(32), 4), [0] * 4)
        four = builder.shuffle_vector(one, one, zeros)
        return builder.fadd(total, builder.fmul(values, four, flags=("contract",)), flags=("contract",))

    return _float4(_float4, array, types.intp, types.float32), build


@intrinsic
def _store4(typing, array, index, values):
    """array[index : index + 4] = values; no bounds are checked."""

    def build(context, builder, signature, arguments):
        array, index, values = arguments
        builder.store(values, _address(context, builder, signature.args[0], array, index), align=4)
        return context.get_dummy_value()

    return types.void(array, types.intp, _float4), build


@_compiled()
def taps(length, side):
    """For each of `side` output pixels: first input pixel, number of them, and their weights (side, widest)."""
    scale = length / side
    half = max(scale, 1.0)
    widest = int(np.ceil(2 * half)) + 1
    first, count = np.empty(side, np.int64), np.empty(side, np.int64)
    weights = np.zeros((side, max(widest, 4)), np.float32)
    for i in range(side):
        centre = scale * (i + 0.5)
        low = max(int(centre - half + 0.5), 0)
        high = min(int(centre + half + 0.5), length)
        total = 0.0
        for k in range(high - low):
            weight = max(0.0, 1.0 - abs((k + low - centre + 0.5) / half))
            weights[i, k] = weight
            total += weight
        weights[i, : high - low] /= np.float32(total)
        first[i], count[i] = low, high - low
    return first, count, weights


@_compiled(fastmath=True)
def _mix_rows(image, start, length, top, count, weights, row):
    """row[:length] = sum over k < count of weights[k] * image[top + k, start : start + length], two rows at a time."""
    k = 0
    if count % 2:
        line, weight = image[top, start : start + length], weights[0]
        for i in range(length):
            row[i] = weight * np.float32(line[i])
        k = 1
    else:
        row[:length] = 0
    while k < count:
        one, other = image[top + k, start : start + length], image[top + k + 1, start : start + length]
        weight, second = weights[k], weights[k + 1]
        for i in range(length):
            row[i] += weight * np.float32(one[i]) + second * np.float32(other[i])
        k += 2


@_compiled(fastmath=True)
def _mix_columns(row, left, count, weights, flip, line):
    """line[3 * j :][:3] = the mixed pixel j, from left to right: a fourth lane is overwritten by its own pixel.

    Two and four weights, the cases of a box up to twice the output's width, are written out: a loop of unknown
    length takes twice the time. A weight past the box is zero.
    """
    side = len(left)
    for j in range(side):
        source = side - 1 - j if flip else j
        at, weight = 3 * left[source], weights[source]
        total = _mixed4(_zero4(), row, at, weight[0])
        if count <= 2:
            total = _mixed4(total, row, at + 3, weight[1])
        elif count <= 4:
            total = _mixed4(total, row, at + 3, weight[1])
            total = _mixed4(total, row, at + 6, weight[2])
            total = _mixed4(total, row, at + 9, weight[3])
        else:
            for k in range(1, count):
                total = _mixed4(total, row, at + 3 * k, weight[k])
        _store4(line, 3 * j, total)


@_compiled(fastmath=True)
def _resize_into(image, box, flip, out, row, line):
    side = out.shape[0]
    x, y, width, height = np.int64(box[0]), np.int64(box[1]), np.int64(box[2]), np.int64(box[3])
    top, rows, row_weights = taps(height, side)
    left, columns, column_weights = taps(width, side)
    count = columns.max()
    for i in range(side):
        _mix_rows(image, 3 * x, 3 * width, y + top[i], rows[i], row_weights[i], row)
        _mix_columns(row, left, count, column_weights, flip, line)
        target = out[i].reshape(3 * side)
        for j in range(3 * side):
            target[j] = np.uint8(np.int32(np.rint(line[j])))


@_compiled(fastmath=True)
def cut_into(image, boxes, flips, outs, first, row, line):
    """Cuts every box out of one image, resizes it to every side, and writes it where it belongs.

    image (height, 3 * width) uint8; boxes (c, 4) uint16 x, y, width, height, inside the image; flips (c,) uint8;
    outs: a tuple of (rows, side, side, 3) uint8, of which rows `first` to `first + c` are written; row, line: scratch
    of `scratch(width, sides)`.
    """
    for j in range(len(boxes)):
        for out in outs:
            _resize_into(image, boxes[j], flips[j] != 0, out[first + j], row, line)


def scratch(width: int, sides: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Float32 scratch for images up to `width` and outputs of `sides`: a mixed row and an output line.

    Both hold what zero weights and the fourth lane reach past an end, and start finite: 0 * nan would not be 0.
    """
    past = 2 * max(1, -(-width // min(sides))) + 4
    return np.zeros(3 * (width + past) + 1, np.float32), np.zeros(3 * max(sides) + 1, np.float32)


def prepare(sides: Sequence[int]) -> None:
    """Compiles `cut_into` for this number of sides, before threads call it; later runs load it from numba's cache."""
    outs = tuple(np.empty((1, side, side, 3), np.uint8) for side in sides)
    boxes = np.array([[0, 0, 1, 1]], np.uint16)
    with COMPILING:
        cut_into(np.zeros((1, 3), np.uint8), boxes, np.zeros(1, np.uint8), outs, 0, *scratch(1, sides))
