"""Prefetch batches to the device: a thread prepares them and copies them on a CUDA stream of its own."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol, TypeVar

import torch

from repcon.runtime.device import stream_context
from repcon.runtime.prefetch import Prefetcher


class _DeviceBatch(Protocol):
    def record_stream(self, stream: torch.cuda.Stream) -> None:
        """Keep the memory of the batch's tensors until the work that is queued on `stream` is done."""
        ...


BatchT = TypeVar("BatchT", bound=_DeviceBatch)


@contextmanager
def prefetch_to_device(
    batches: Iterator[BatchT], stream: torch.cuda.Stream | None, *, depth: int
) -> Iterator[Iterator[BatchT]]:
    """The same batches, which a thread takes from `batches` up to `depth` ahead; the thread ends with the block.

    stream: the thread runs on it, so that its copies to a GPU overlap with the training step; each batch is handed
    over to the stream that is current where it is used. None on a CPU.
    """
    with Prefetcher(_with_events(batches, stream), depth) as items:
        yield _hand_over(items, stream)


def _with_events(
    batches: Iterator[BatchT], stream: torch.cuda.Stream | None
) -> Iterator[tuple[BatchT, torch.cuda.Event | None]]:
    """Yield each batch with a CUDA event recorded after its copy."""
    with stream_context(stream):
        for batch in batches:
            copied = None
            if stream is not None:
                copied = torch.cuda.Event()
                copied.record(stream)
            yield batch, copied


def _hand_over(
    items: Iterable[tuple[BatchT, torch.cuda.Event | None]], stream: torch.cuda.Stream | None
) -> Iterator[BatchT]:
    """Make the current stream wait for each batch's copy."""
    for batch, copied in items:
        if stream is not None and copied is not None:
            current = torch.cuda.current_stream(stream.device)
            current.wait_event(copied)
            batch.record_stream(current)
        yield batch
