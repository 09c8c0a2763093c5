"""Counters for kernels whose last program computes a final sum; zero before and after each launch."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

POOL_SIZE = 2**20
ALIGNMENT = 4
"""Slots start at multiples of it: Triton compiles again for pointers that are not multiples of 16 bytes."""


@dataclass(slots=True)
class _Pool:
    """One device's counters.

    Launches on one stream run one after another, so they share a slot. A captured CUDA graph may be replayed
    concurrently with anything, so each of its launches keeps slots of its own.
    """

    counters: Tensor
    used: int = 0
    by_stream: dict[tuple[int, int], int] = field(default_factory=dict)


_pools: dict[torch.device, _Pool] = {}


def arrival_counters(device: torch.device, count: int) -> Tensor:
    """(count,) int32 zeros that no other running launch uses; after the first call this launches no kernel."""
    if device.type != "cuda":
        return torch.zeros(count, dtype=torch.int32, device=device)
    capturing = torch.cuda.is_current_stream_capturing()
    if device not in _pools:
        if capturing:
            return torch.zeros(count, dtype=torch.int32, device=device)
        _pools[device] = _Pool(torch.zeros(POOL_SIZE, dtype=torch.int32, device=device))
        torch.cuda.current_stream(device).synchronize()  # once, since other streams do not wait for these zeros
    pool = _pools[device]
    key = (torch.cuda.current_stream(device).cuda_stream, count)
    first = None if capturing else pool.by_stream.get(key)
    if first is None:
        first = pool.used
        taken = -(-count // ALIGNMENT) * ALIGNMENT
        if first + taken > POOL_SIZE:
            return torch.zeros(count, dtype=torch.int32, device=device)
        pool.used += taken
        if not capturing:
            pool.by_stream[key] = first
    return pool.counters[first : first + count]
