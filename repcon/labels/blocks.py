"""Checks of a unit's arrays before they are stored, and the form in which they are stored."""

from collections.abc import Mapping

import numpy as np

from repcon.labels import quantize
from repcon.labels.layout import BOX, FLIP, HeadInfo, Layout, Unit, head_layouts
from repcon.labels.manifest import Manifest
from repcon.runtime.errors import UserError

Block = tuple[Layout, np.ndarray]


def box_blocks(unit: Unit, boxes: np.ndarray, flips: np.ndarray) -> list[Block]:
    """A unit's boxes (m, r, 4) and flips (m, r) as they are stored, after checks."""
    shape = (len(unit.crops), len(unit.rows))
    _check_shapes(f"unit {unit.name}", {"boxes": (boxes, (*shape, 4)), "flips": (flips, shape)})
    for name, array, wanted in (("boxes", boxes, BOX.dtype), ("flips", flips, FLIP.dtype)):
        if array.dtype != wanted:
            raise UserError(f"unit {unit.name}: {name} are {array.dtype} instead of {np.dtype(wanted)}")
    if not boxes[..., 2:].all():
        raise UserError(f"unit {unit.name}: holds boxes without an area")
    if (flips > 1).any():
        raise UserError(f"unit {unit.name}: flips must be 0 or 1")
    return [(BOX, boxes), (FLIP, flips)]


def label_blocks(
    manifest: Manifest, unit: Unit, head: HeadInfo, ids: np.ndarray, logp: np.ndarray, is_missing: np.ndarray
) -> list[Block]:
    """One head's ids and values as they are stored, after checks; missing rows (r,) become fill values."""
    shape, place = (len(unit.crops), len(unit.rows)), f"unit {unit.name}, head {head.name}"
    columns = head.k + len(head.temperatures)
    _check_shapes(place, {"ids": (ids, (*shape, head.k)), "logp": (logp, (*shape, columns))})
    present = ~is_missing if is_missing.any() else slice(None)  # a slice copies nothing
    _check_labels(place, head, ids[:, present], logp[:, present])
    id_layout, value_layout = head_layouts(head, manifest.values)
    ids, values = ids.astype(id_layout.dtype), logp.astype(np.float16)
    ids[:, is_missing], values[:, is_missing] = id_layout.fill, np.nan
    if manifest.values == "quantized8":
        values = quantize.encode(values, head.k, head.temperatures)
    return [(id_layout, ids), (value_layout, values)]


def _check_shapes(place: str, arrays: Mapping[str, tuple[np.ndarray, tuple[int, ...]]]) -> None:
    for name, (array, wanted) in arrays.items():
        if array.shape != wanted:
            raise UserError(f"{place}: {name} has shape {array.shape} instead of {wanted}")


def _check_labels(place: str, head: HeadInfo, ids: np.ndarray, logp: np.ndarray) -> None:
    """Raises UserError for NaN, infinite or rising log-probabilities and for ids out of range."""
    if ids.size == 0:
        return
    if not np.issubdtype(ids.dtype, np.integer) or ids.min() < 0 or ids.max() >= head.classes:
        raise UserError(f"{place}: ids must be integers from 0 to {head.classes - 1}, not {ids.min()} to {ids.max()}")
    values = logp.astype(np.float32)
    if np.isnan(values).any() or not np.isfinite(values[..., : head.k]).all():
        raise UserError(f"{place}: NaN or infinite log-probabilities: the teacher overflows; try precision fp32")
    if (values[..., 1 : head.k] > values[..., : head.k - 1]).any():
        raise UserError(f"{place}: log-probabilities must fall from the first to the last")
