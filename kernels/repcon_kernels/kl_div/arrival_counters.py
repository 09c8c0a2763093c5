"""Counters for kernels whose last program does the final sum: zero before each launch, and left zero by it."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

SLOTS = 2**20
ALIGNED = 4
"""Slots start at multiples of this: Triton compiles anew for pointers that are not at multiples of 16 bytes."""


@dataclass(slots=True)
class _Pool:
    """One device's counters. A stream's launches follow one another, so they share a slot; a captured CUDA graph may be
    replayed beside anything, so each of its launches keeps slots of its own for ever."""

    counters: Tensor
    used: int = 0
    by_stream: dict[tuple[int, int], int] = field(default_factory=dict)


_pools: dict[torch.device, _Pool] = {}


def tickets(device: torch.device, count: int) -> Tensor:
    """(count,) int32 zeros that no other launch uses meanwhile, at no launch of their own but for the first call's."""
    if device.type != "cuda":
        return torch.zeros(count, dtype=torch.int32, device=device)
    capturing = torch.cuda.is_current_stream_capturing()
    if device not in _pools:
        if capturing:
            return torch.zeros(count, dtype=torch.int32, device=device)
        _pools[device] = _Pool(torch.zeros(SLOTS, dtype=torch.int32, device=device))
        torch.cuda.current_stream(device).synchronize()  # once: other streams' launches do not wait for these zeros
    pool = _pools[device]
    key = (torch.cuda.current_stream(device).cuda_stream, count)
    first = None if capturing else pool.by_stream.get(key)
    if first is None:
        first = pool.used
        taken = -(-count // ALIGNED) * ALIGNED
        if first + taken > SLOTS:
            return torch.zeros(count, dtype=torch.int32, device=device)
        pool.used += taken
        if not capturing:
            pool.by_stream[key] = first
    return pool.counters[first : first + count]
