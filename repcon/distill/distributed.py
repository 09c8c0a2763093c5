"""Several processes as one team (torchrun), and the signals that ask a run to stop."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from repcon.config import Device
from repcon.runtime.console import console
from repcon.runtime.device import choose
from repcon.runtime.errors import UserError

LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting", "gloo/transport",
        "Connection refused", "Socket Timeout", "remote process has exited")  # fmt: skip
"""What torch's errors say where a process of the team is gone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DistributedContext:
    """This process's place among those that train together."""

    rank: int
    world: int
    device: torch.device
    cpu_group: Any
    """The gloo group for short messages between CPUs; None alone."""

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model whose gradients are averaged over the team."""
        if self.world == 1:
            return model
        places = [self.device.index] if self.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(model, device_ids=places)

    def total(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over the team of a CPU tensor."""
        if self.world > 1:
            values = values.clone()
            dist.all_reduce(values, group=self.cpu_group)
        return values

    def share_buffers(self, model: nn.Module) -> None:
        """Gives all processes the leader's buffers: batch norms' statistics, which each takes from its own images."""
        if self.world > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)

    def share_weights(self, model: nn.Module) -> None:
        """Gives all processes the leader's parameters and buffers."""
        if self.world > 1:
            for tensor in model.state_dict().values():
                dist.broadcast(tensor, 0)

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process; all must ask."""
        return flag if self.world == 1 else bool(self.total(torch.tensor(float(flag))) > 0)

    def barrier(self) -> None:
        """Returns when every process has come here."""
        if self.world > 1:
            dist.barrier(group=self.cpu_group)


@contextmanager
def join(device: Device) -> Iterator[DistributedContext]:
    """The team that torchrun's environment describes, or a team of one. `auto` takes CUDA where there is any.

    Raises UserError where only a part of that environment is there.
    """
    rank, world = _of_environment("RANK", 0), _of_environment("WORLD_SIZE", 1)
    if world > 1:
        for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
            if not os.environ.get(name):
                how = "start several processes with torchrun, or unset it for one"
                raise UserError(f"WORLD_SIZE is set and {name} is not: {how}")
    place = _place(device)
    if world == 1:
        yield DistributedContext(rank=0, world=1, device=place, cpu_group=None)
        return
    patience = timedelta(hours=1)  # of a process that waits, while the leader measures kNN for example
    try:
        dist.init_process_group("nccl" if place.type == "cuda" else "gloo", timeout=patience)
        cpu_group = dist.new_group(backend="gloo", timeout=patience)
    except (RuntimeError, ValueError) as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise UserError(
            f"the {world} processes of WORLD_SIZE do not find each other at {where} ({_first_line(error)}); start them "
            "with torchrun, or unset WORLD_SIZE for one"
        ) from error
    console.quiet = rank > 0
    try:
        yield DistributedContext(rank=rank, world=world, device=place, cpu_group=cpu_group)
    except RuntimeError as error:
        if not _is_of_another_process(error):
            raise
        raise UserError(
            f"another process of this run has ended or does not answer ({_first_line(error)}); see its own message, "
            "and give the same command again: it goes on from the last checkpoint"
        ) from error
    finally:
        console.quiet = False
        with suppress(RuntimeError):  # of processes that are gone
            dist.destroy_process_group()


def _of_environment(name: str, otherwise: int) -> int:
    """A number that torchrun sets; an empty one counts as none. Raises UserError for what is no such number."""
    given = os.environ.get(name, "").strip()
    if given and not given.isdecimal():
        raise UserError(f"{name}: {given!r} is no number of a process; start with torchrun, or unset it")
    return int(given) if given else otherwise


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _is_of_another_process(error: RuntimeError) -> bool:
    """Whether it tells of a lost connection within the team, as gloo and NCCL word it."""
    return isinstance(error, dist.DistError) or any(cpu_group in str(error) for cpu_group in LOST)


def _place(device: Device) -> torch.device:
    place = choose(device)
    if place.type == "cuda":
        place = torch.device("cuda", _of_environment("LOCAL_RANK", 0))
        torch.cuda.set_device(place)
    return place


class GracefulShutdown:
    """Turns the first SIGINT or SIGTERM into a wish (`requested`) that the loop grants between two steps."""

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "GracefulShutdown":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.requested:  # A second time: at once.
            raise KeyboardInterrupt
        self.requested = True
