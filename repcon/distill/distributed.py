"""Distributed training under torchrun, and graceful shutdown on signals."""

import os
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import nn

from repcon.config import Device
from repcon.runtime.console import console
from repcon.runtime.device import choose
from repcon.runtime.errors import UserError, first_line

LOST_PROCESS_ERRORS = (
    "Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting", "gloo/transport",
    "Connection refused", "Socket Timeout", "remote process has exited",
)  # fmt: skip
"""Parts of torch's error messages when another process is gone."""
COLLECTIVE_TIMEOUT = timedelta(hours=1)
"""Of a process that waits for the others, for example while the main process measures kNN."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DistributedContext:
    """This process's rank, device and communication with the other ranks; without torchrun a world of size 1."""

    rank: int
    world_size: int
    device: torch.device
    cpu_group: Any
    """The gloo group for small CPU tensors; None in a world of size 1."""

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes the files."""
        return self.rank == 0

    def wrap_ddp(self, model: nn.Module) -> nn.Module:
        """The model in DistributedDataParallel, which averages gradients over ranks; unchanged for one rank."""
        if self.world_size == 1:
            return model
        device_ids = [self.device.index] if self.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(model, device_ids=device_ids)

    def all_sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum of a CPU tensor over all ranks."""
        if self.world_size > 1:
            values = values.clone()
            dist.all_reduce(values, group=self.cpu_group)
        return values

    def broadcast(self, tensors: Iterable[torch.Tensor]) -> None:
        """Copy the main process's tensors to all ranks, in place."""
        if self.world_size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, 0)

    def any_rank(self, flag: bool) -> bool:
        """Whether the flag is set on any rank; all ranks must call it."""
        return flag if self.world_size == 1 else bool(self.all_sum(torch.tensor(float(flag))) > 0)

    def barrier(self) -> None:
        """Wait until all ranks have called it."""
        if self.world_size > 1:
            dist.barrier(group=self.cpu_group)


@contextmanager
def init_distributed(device: Device) -> Iterator[DistributedContext]:
    """Join the process group that torchrun's environment describes; without it, a world of size 1.

    device: `auto` takes CUDA where there is any. Raises UserError where torchrun's environment is incomplete, the
    processes do not find each other, or another process is lost within the block.
    """
    rank, world_size = _environment_int("RANK", 0), _environment_int("WORLD_SIZE", 1)
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if world_size > 1 else ():
        if not os.environ.get(name):
            how = "start several processes with torchrun, or unset it for one"
            raise UserError(f"WORLD_SIZE is set and {name} is not: {how}")
    rank_device = choose(device)
    if rank_device.type == "cuda":
        rank_device = torch.device("cuda", _environment_int("LOCAL_RANK", 0))
        torch.cuda.set_device(rank_device)
    if world_size == 1:
        yield DistributedContext(rank=0, world_size=1, device=rank_device, cpu_group=None)
        return
    try:
        dist.init_process_group("nccl" if rank_device.type == "cuda" else "gloo", timeout=COLLECTIVE_TIMEOUT)
        cpu_group = dist.new_group(backend="gloo", timeout=COLLECTIVE_TIMEOUT)
    except (RuntimeError, ValueError) as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise UserError(
            f"the {world_size} processes of WORLD_SIZE do not find each other at {where} ({first_line(error)}); start "
            "them with torchrun, or unset WORLD_SIZE for one"
        ) from error
    console.quiet = rank > 0
    try:
        yield DistributedContext(rank=rank, world_size=world_size, device=rank_device, cpu_group=cpu_group)
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or any(text in str(error) for text in LOST_PROCESS_ERRORS)):
            raise
        raise UserError(
            f"another process of this run has ended or does not answer ({first_line(error)}); see its own message, "
            "and give the same command again: it goes on from the last checkpoint"
        ) from error
    finally:
        console.quiet = False
        with suppress(RuntimeError):  # where another process is gone
            dist.destroy_process_group()


def _environment_int(name: str, default: int) -> int:
    """A number that torchrun sets; an empty value counts as unset. Raises UserError for anything else."""
    value = os.environ.get(name, "").strip()
    if value and not value.isdecimal():
        raise UserError(f"{name}: {value!r} is no number of a process; start with torchrun, or unset it")
    return int(value) if value else default


class GracefulShutdown:
    """Sets `requested` on the first SIGINT or SIGTERM within the block; the second SIGINT or SIGTERM interrupts."""

    def __init__(self) -> None:
        self.requested = False
        self._previous_handlers: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous_handlers[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
