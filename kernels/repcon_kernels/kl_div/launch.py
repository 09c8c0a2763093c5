"""Launch the Triton kernels. Importing this module imports Triton."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

from repcon_kernels import crop_resize_kernel
from repcon_kernels.kl_div import tiling, triton_kernel, triton_scale
from repcon_kernels.kl_div.heads import TAILS, HeadSpec

SCALE_BLOCK = 1024
SCALE_PROGRAMS = 1024
"""Programs of the scaling kernel: enough to fill a device, few enough that factors of 1 cost only the launch."""
CROP_BLOCK = 256
"""Pixels of a crop that one program computes."""
COUNTERS = 2**20
"""Counters of a device."""
COUNTER_ALIGNMENT = 4
"""Slots start at multiples of it: Triton compiles again for pointers that are not multiples of 16 bytes."""


def multi_head_kl(
    logits: Tensor,
    gradient: Tensor | None,
    heads: Sequence[HeadSpec],
    ids: Sequence[Tensor],
    logp: Sequence[Tensor],
    rows: Tensor | None,
    weights: Tensor,
    tail: str,
    loss_scale: float,
    gradient_scale: float,
) -> Tensor:
    """As `sparse.multi_head_kl`, for float32, bfloat16 and float16 logits: one launch."""
    batch, columns = logits.shape
    widths = tuple(head_logp.shape[1] for head_logp in logp)
    types = tuple((head_ids.dtype, head_logp.dtype) for head_ids, head_logp in zip(ids, logp, strict=True))
    layout = tiling.plan(tuple(heads), columns, widths, types, tiling.WIDE_ROWS, _vector(logits, gradient))
    in_place = gradient is not None and gradient.data_ptr() == logits.data_ptr()
    target = torch.empty_like(logits) if in_place and layout.chunked else gradient
    losses = torch.empty(len(heads), dtype=torch.float32, device=logits.device)
    partials = torch.empty(layout.items(batch), dtype=torch.float32, device=logits.device)
    per_head = (ids, logp, [float(head.temperature) for head in heads])
    with _current_device(logits.device):
        _kernel(triton_kernel.multi_head_kl, _programs(layout, batch, logits.device))(
            logits,
            logits if target is None else target,
            losses,
            partials,
            arrival_counters(logits.device, len(heads)),
            weights if rows is None else rows,
            weights,
            *(tuple(values[number] for number, *_ in layout.heads) for values in per_head),
            batch,
            ids[0].shape[0],
            loss_scale,
            gradient_scale,
            COLUMNS=columns,
            HAS_ROWS=rows is not None,
            TAIL=TAILS.index(tail),
            GRADIENT=gradient is not None,
            IN_PLACE=in_place,
            **_planned_constants(layout),
        )
    if gradient is not None and target is not None:
        if target is not gradient:
            gradient.copy_(target)
        if heads[0].start > 0:
            gradient[:, : heads[0].start] = 0
    return losses


def _programs(layout: tiling.Plan, batch: int, device: torch.device) -> int:
    """Programs of one launch of the loss kernel."""
    items, per_processor = layout.items(batch), layout.programs_per_processor
    return min(items, per_processor * _processors(device)) if per_processor else items


def _planned_constants(layout: tiling.Plan) -> dict[str, Any]:
    """Compile-time arguments of the loss kernel that the plan decides."""
    return {
        "HEADS": layout.heads,
        "GROUPS": layout.groups,
        "PERSISTENT": layout.programs_per_processor > 0,
        "PREFETCH": layout.prefetch and not interpreted(),
        "num_warps": layout.warps,
        **({"maxnreg": layout.registers} if torch.version.cuda else {}),
    }


def scale_heads(gradient: Tensor, factors: Tensor, factor_scale: float, starts: Sequence[int]) -> None:
    """gradient[:, head] *= factors[head] x factor_scale in place; the factors are read on the device."""
    batch, columns = gradient.shape
    stops = [*starts[1:], columns]
    with _current_device(gradient.device):
        _kernel(triton_scale.scale_heads, min(batch, SCALE_PROGRAMS))(
            gradient,
            factors,
            batch,
            factors.stride(0),
            factor_scale,
            SPANS=tuple((start, stop - start) for start, stop in zip(starts, stops, strict=True)),
            COLUMNS=columns,
            BLOCK=SCALE_BLOCK,
        )


def cut_crops(images: Sequence[Tensor], boxes: Tensor, flips: Tensor, out: Tensor) -> None:
    """As `crop_resize.cut_crops`: one launch on the current stream."""
    side, per_image = out.shape[1], flips.shape[1]
    table = torch.cat([boxes, flips[..., None].to(torch.int32)], dim=2)
    addresses = torch.tensor([image.data_ptr() for image in images])
    widths = torch.tensor([image.shape[1] for image in images], dtype=torch.int32)
    programs = len(out) * -(-side * side // CROP_BLOCK)
    with _current_device(out.device):
        _kernel(crop_resize_kernel.cut_crops, programs)(
            *(_to_device(part, out.device) for part in (addresses, widths, table)), out, per_image, SIDE=side,
            BLOCK=CROP_BLOCK,
        )  # fmt: skip


def _vector(logits: Tensor, gradient: Tensor | None) -> int:
    """Logits per 16 bytes if logits and gradient have the same alignment to 16 bytes, else 1."""
    size = logits.element_size()
    offset = 0 if gradient is None else (logits.data_ptr() - gradient.data_ptr()) % 16
    return 16 // size if offset == 0 and logits.data_ptr() % size == 0 else 1


@lru_cache
def _processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 2 for Triton's interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def _to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a small tensor to the device without blocking."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def _kernel(function: Any, programs: int) -> Callable[..., Any]:
    """A callable that launches `programs` programs; typed here because Triton's decorator does not type it."""
    return function[(programs,)]


def interpreted() -> bool:
    """Whether the kernels run in Triton's interpreter on the CPU: TRITON_INTERPRET was set when they were defined."""
    return not isinstance(triton_kernel.multi_head_kl, JITFunction)


def _current_device(device: torch.device) -> AbstractContextManager:
    """Make the tensors' device the current one, on which Triton launches."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@dataclass(slots=True)
class _CounterPool:
    """One device's counters for kernels whose last program computes a final sum; zero before and after each launch.

    Launches on one stream run one after another, so they share a slot. A captured CUDA graph may be replayed
    concurrently with anything, so each of its launches keeps slots of its own.
    """

    counters: Tensor
    used: int = 0
    by_stream: dict[tuple[int, int], int] = field(default_factory=dict)


_pools: dict[torch.device, _CounterPool] = {}


def arrival_counters(device: torch.device, count: int) -> Tensor:
    """(count,) int32 zeros that no other running launch uses; after the first call this launches no kernel."""
    if device.type != "cuda":
        return torch.zeros(count, dtype=torch.int32, device=device)
    capturing = torch.cuda.is_current_stream_capturing()
    if device not in _pools:
        if capturing:
            return torch.zeros(count, dtype=torch.int32, device=device)
        _pools[device] = _CounterPool(torch.zeros(COUNTERS, dtype=torch.int32, device=device))
        torch.cuda.current_stream(device).synchronize()  # once, since other streams do not wait for these zeros
    pool = _pools[device]
    key = (torch.cuda.current_stream(device).cuda_stream, count)
    first = None if capturing else pool.by_stream.get(key)
    if first is None:
        first = pool.used
        taken = -(-count // COUNTER_ALIGNMENT) * COUNTER_ALIGNMENT
        if first + taken > COUNTERS:
            return torch.zeros(count, dtype=torch.int32, device=device)
        pool.used += taken
        if not capturing:
            pool.by_stream[key] = first
    return pool.counters[first : first + count]
