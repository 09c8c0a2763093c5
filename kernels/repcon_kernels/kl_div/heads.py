"""Head specification, and the validation of the losses' arguments."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

ID_DTYPES = (torch.uint16, torch.uint32, torch.int32, torch.int64)
LOGP_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
LOGIT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
TAILS = ("bucket", "renormalise", "uniform")

LOG_TAIL_FLOOR = -1e6
"""Lower bound of the log of the student's tail mass, in nat. Since it is computed in log space, finite logits reach it
only if they differ by a million temperatures; tails with logits of -inf alone do. There the loss stays finite
(teacher's tail x 1e6) and the tail has no gradient."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadSpec:
    """One head's columns in the logits, and the stored values that it uses."""

    start: int
    """First column of the head in the logits. Columns between heads may be left free, for alignment."""
    classes: int
    """C: columns of the head."""
    k: int
    """Stored classes per row; with k = C all classes are stored and the log-tail is not read."""
    temperature: float = 1.0
    tail_column: int = 0
    """The index of the log-tail for `temperature` among those that follow the k log-probabilities."""

    def __post_init__(self) -> None:
        if self.classes < 2:
            raise ValueError(f"a head needs at least 2 classes, not {self.classes}")
        if not 1 <= self.k <= self.classes:
            raise ValueError(f"k must lie between 1 and the head's {self.classes} classes, not {self.k}")
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"the temperature must be positive and finite, not {self.temperature}")
        if self.start < 0 or self.tail_column < 0:
            raise ValueError(f"start ({self.start}) and tail_column ({self.tail_column}) must not be negative")

    @property
    def stop(self) -> int:
        """The column after the head's last."""
        return self.start + self.classes


def widths(heads: Sequence[HeadSpec], columns: int) -> list[int]:
    """Columns from each head's start to the next head's, or to the end: its classes and the free columns after them.

    Heads are in the order of their columns; the gradient of free columns is zero.
    """
    return [
        after - head.start for head, after in zip(heads, [*(head.start for head in heads[1:]), columns], strict=True)
    ]


def validate_heads(heads: Sequence[HeadSpec], columns: int, tail: str) -> None:
    """Raises ValueError where the heads do not fit in `columns` logits in order, or the tail's name is unknown."""
    if tail not in TAILS:
        raise ValueError(f"tail must be one of {', '.join(TAILS)}, not {tail!r}")
    if not heads:
        raise ValueError("no heads were given")
    for number, (head, width) in enumerate(zip(heads, widths(heads, columns), strict=True)):
        if width < head.classes:
            raise ValueError(
                f"head {number} takes the columns {head.start} to {head.stop}, which "
                + ("overlap the next head's" if number + 1 < len(heads) else f"do not fit in {columns} logits")
            )


def validate(
    logits: Tensor,
    heads: Sequence[HeadSpec],
    ids: Sequence[Tensor],
    logp: Sequence[Tensor],
    rows: Tensor | None,
    weights: Tensor,
    tail: str,
) -> None:
    """Raises ValueError at the first shape, dtype, device or layout that the implementations do not take.

    Values are not checked, so that nothing waits for the device.
    """
    if logits.ndim != 2 or logits.shape[0] == 0 or logits.dtype not in LOGIT_DTYPES:
        raise ValueError(f"logits must be (B, C) floating point with B > 0, not {describe(logits)}")
    if not logits.is_contiguous():
        raise ValueError(f"logits must be contiguous, not of strides {tuple(logits.stride())}: call .contiguous()")
    validate_targets(logits.shape[0], logits.shape[1], logits.device, heads, ids, logp, rows, weights, tail)


def validate_targets(
    batch: int,
    columns: int,
    device: torch.device,
    heads: Sequence[HeadSpec],
    ids: Sequence[Tensor],
    logp: Sequence[Tensor],
    rows: Tensor | None,
    weights: Tensor,
    tail: str,
) -> None:
    """`validate` without the logits."""
    validate_heads(heads, columns, tail)
    if not len(heads) == len(ids) == len(logp):
        raise ValueError(f"{len(heads)} heads, but {len(ids)} tensors of ids and {len(logp)} of log-probabilities")
    if weights.shape != (len(heads),) or weights.dtype != torch.float32 or weights.requires_grad:
        raise ValueError(f"weights must be ({len(heads)},) float32 without gradient, not {describe(weights)}")
    if rows is not None and (rows.shape != (batch,) or rows.dtype != torch.int64):
        raise ValueError(f"rows must be ({batch},) int64, not {describe(rows)}")
    for number, (head, head_ids, head_logp) in enumerate(zip(heads, ids, logp, strict=True)):
        _validate_labels(number, head, head_ids, head_logp, batch if rows is None else None, tail)
    if len({len(part) for part in ids}) > 1:
        raise ValueError(f"the heads' labels differ in their rows: {', '.join(str(len(part)) for part in ids)}")
    placed = [weights, *ids, *logp, *([] if rows is None else [rows])]
    if any(tensor.device != device for tensor in placed):
        raise ValueError(
            f"logits are on {device}, other tensors on {sorted({str(tensor.device) for tensor in placed})}"
        )


def _validate_labels(number: int, head: HeadSpec, ids: Tensor, logp: Tensor, batch: int | None, tail: str) -> None:
    """batch: the number of rows that the labels must have; None where they are gathered by row number."""
    if ids.ndim != 2 or ids.shape[1] != head.k or ids.dtype not in ID_DTYPES or not ids.is_contiguous():
        raise ValueError(
            f"head {number}: ids must be contiguous (R, {head.k}) uint16, uint32, int32 or int64, not {describe(ids)}"
        )
    if logp.ndim != 2 or logp.dtype not in LOGP_DTYPES or not logp.is_contiguous():
        raise ValueError(f"head {number}: log-probabilities must be contiguous (R, k + T) floats, not {describe(logp)}")
    needed = head.k + (0 if tail == "renormalise" else head.tail_column + 1)
    if logp.shape[1] < needed:
        raise ValueError(
            f"head {number}: log-probabilities have {logp.shape[1]} columns; k = {head.k} and "
            f"tail_column = {head.tail_column} need at least {needed}"
        )
    if ids.shape[0] != logp.shape[0] or ids.shape[0] == 0 or (batch is not None and ids.shape[0] != batch):
        raise ValueError(
            f"head {number}: {ids.shape[0]} rows of ids and {logp.shape[0]} of log-probabilities"
            + ("" if batch is None else f" for {batch} rows of logits (give `rows` to gather from more labels)")
        )


def check_values(heads: Sequence[HeadSpec], ids: Sequence[Tensor], rows: Tensor | None) -> None:
    """Raises ValueError where a class id or a row number is out of range. Waits for the device."""
    for number, (head, head_ids) in enumerate(zip(heads, ids, strict=True)):
        if rows is not None:
            low, high = int(rows.min()), int(rows.max())
            if low < 0 or high >= head_ids.shape[0]:
                raise ValueError(
                    f"head {number}: rows {low} to {high} were asked for; the labels have {head_ids.shape[0]}"
                )
        used = gather_ids(head_ids, rows)
        low, high = int(used.min()), int(used.max())
        if low < 0 or high >= head.classes:
            raise ValueError(f"head {number}: class ids reach from {low} to {high}; it has {head.classes} classes")


def gather_ids(ids: Tensor, rows: Tensor | None) -> Tensor:
    """(B, k) int64 class ids of the given rows. Gathers bit patterns, since torch has no index_select for uint16."""
    if ids.dtype not in (torch.uint16, torch.uint32):
        return (ids if rows is None else ids.index_select(0, rows)).long()
    signed, mask = (torch.int16, 0xFFFF) if ids.dtype == torch.uint16 else (torch.int32, 0xFFFFFFFF)
    bits = ids.view(signed)
    return (bits if rows is None else bits.index_select(0, rows)).long() & mask


def describe(tensor: Tensor) -> str:
    """Shape, dtype, device and layout, for error messages."""
    layout = "" if tensor.is_contiguous() else ", not contiguous"
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')} on {tensor.device}{layout}"
