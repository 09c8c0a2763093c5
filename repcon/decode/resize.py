"""Crop and antialiased resize on the CPU, in float32: compiled by numba, which releases the GIL.

The filter is the one of torch's `interpolate(mode="bilinear", antialias=True)`: each output pixel is a weighted mean
of the box's pixels under a triangle whose half-width is max(1, scale) input pixels around the output pixel's centre.
Rows are mixed first (along memory, where the compiler vectorises by itself), then columns, where a pixel's three
channels and one lane of its neighbour make a vector of four.
"""

# numba's intrinsics are called without their first parameter.
# pyright: reportCallIssue=false

import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, models, register_model

from repcon.decode.base import CropBatch, CropRequest, check_image_size
from repcon.images.pack import ImagePack

COMPILE_LOCK = threading.Lock()
"""Held while numba compiles or loads compiled code: threads that do so at the same time disturb each other."""


class Scratch(NamedTuple):
    """Float32 memory for one thread: a mixed row, and an output line."""

    row: np.ndarray
    line: np.ndarray

    @classmethod
    def of(cls, width: int, sides: Sequence[int]) -> "Scratch":
        """For images up to `width` pixels and outputs of `sides`.

        Both arrays are longer than their content: zero weights and the fourth lane read past its end. They start
        finite, since 0 * nan would not be 0.
        """
        past = 2 * max(1, -(-width // min(sides))) + 4
        return cls(np.zeros(3 * (width + past) + 1, np.float32), np.zeros(3 * max(sides) + 1, np.float32))


class CropResizer:
    """Fills one batch from decoded images, in any number of threads at once."""

    def __init__(self, pack: ImagePack, request: CropRequest, batch: CropBatch) -> None:
        # Made once per batch: torch's views, made anew for every eight images, took 2 % of the decoding time.
        # Boxes and flips are copies, so that a read-only request needs no second compilation.
        self._pack = pack
        self.rows = np.array(request.images, np.int64)
        """(n,) rows of the pack."""
        self.boxes = np.array(request.boxes, np.uint16, order="C")
        """(n, c, 4)"""
        self.flips = np.array(request.flips, np.uint8, order="C")
        """(n, c)"""
        self.outs = tuple(pixels.permute(0, 2, 3, 1).numpy() for pixels in batch.pixels.values())
        """Per side (n * c, side, side, 3) uint8."""

    def resize(self, places: range, images: Iterable[np.ndarray], scratch: Scratch) -> None:
        """Fill the batch's rows of those of the request's images that are at `places`.

        images: (height, width, 3) uint8, one for each place, used one after the other. Raises UserError where one is
        not of the size that the pack's index has.
        """
        crops = self.boxes.shape[1]
        for i, image in zip(places, images, strict=True):
            check_image_size(self._pack, int(self.rows[i]), image.shape)
            if crops:  # calling compiled code costs the GIL even if there is nothing to do
                crop_resize(image.reshape(len(image), -1), self.boxes[i], self.flips[i], self.outs, i * crops, *scratch)


def compile_resize(sides: Sequence[int]) -> None:
    """Compile `crop_resize` for this number of sides, before threads call it; later runs load it from numba's cache."""
    outs = tuple(np.empty((1, side, side, 3), np.uint8) for side in sides)
    boxes = np.array([[0, 0, 1, 1]], np.uint16)
    with COMPILE_LOCK:
        crop_resize(np.zeros((1, 3), np.uint8), boxes, np.zeros(1, np.uint8), outs, 0, *Scratch.of(1, sides))


def _compiled(*, fastmath: bool = False) -> Callable[[Callable[..., Any]], Any]:
    """`numba.njit` that releases the GIL, cached on disk where the cache can be written."""

    def decorate(function: Callable[..., Any]) -> Any:
        options = {"nogil": True, "error_model": "numpy", "fastmath": fastmath}
        try:
            return numba.njit(function, cache=True, **options)
        except RuntimeError:  # no writable cache folder: each process compiles anew
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


def _lane_pointer(context, builder, array_type, array, index):
    data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [index]), _VECTOR.as_pointer())


@intrinsic
def _zero4(typing):
    def build(context, builder, signature, arguments):
        return ir.Constant(_VECTOR, [0.0] * 4)

    return _float4(), build


@intrinsic
def _fma4(typing, total, array, index, weight):
    """total + weight * array[index : index + 4]; no bounds are checked."""

    def build(context, builder, signature, arguments):
        total, array, index, weight = arguments
        values = builder.load(_lane_pointer(context, builder, signature.args[1], array, index), align=4)
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
        builder.store(values, _lane_pointer(context, builder, signature.args[0], array, index), align=4)
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
        total = _fma4(_zero4(), row, at, weight[0])
        if count <= 2:
            total = _fma4(total, row, at + 3, weight[1])
        elif count <= 4:
            total = _fma4(total, row, at + 3, weight[1])
            total = _fma4(total, row, at + 6, weight[2])
            total = _fma4(total, row, at + 9, weight[3])
        else:
            for k in range(1, count):
                total = _fma4(total, row, at + 3 * k, weight[k])
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
def crop_resize(image, boxes, flips, outs, first, row, line):
    """Crop every box out of one image, resize it to every side, and write it into the outputs.

    image (height, 3 * width) uint8; boxes (c, 4) uint16 x, y, width, height, inside the image; flips (c,) uint8;
    outs: a tuple of (rows, side, side, 3) uint8, of which rows `first` to `first + c` are written; row, line: a
    `Scratch`.
    """
    for j in range(len(boxes)):
        for out in outs:
            _resize_into(image, boxes[j], flips[j] != 0, out[first + j], row, line)
