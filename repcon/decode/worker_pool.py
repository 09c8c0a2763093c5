"""What the loaders share: a thread pool that fills batches in order, a few of them ahead of the consumer."""

import queue
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Generic, TypeVar

import numpy as np
import torch

from repcon.decode.base import CropBatch, CropRequest
from repcon.decode.buffers import CropBuffers
from repcon.runtime.system import own_cores

Tool = TypeVar("Tool")

AHEAD_BATCHES = 3
"""Batches at a time, the one that the consumer holds among them; memory stays flat at this many."""


def numbered_batch(request: CropRequest, pixels: dict[int, torch.Tensor]) -> CropBatch:
    """A batch with the request's numbers of images and crops, crop by crop."""
    images = torch.from_numpy(np.repeat(np.asarray(request.images, dtype=np.int64), request.crops.shape[1]))
    crops = torch.from_numpy(np.array(request.crops, dtype=np.int64).reshape(-1))
    return CropBatch(pixels=pixels, images=images, crops=crops)


def empty_batch(request: CropRequest, sides: Iterable[int], buffers: CropBuffers) -> CropBatch:
    """An unfilled batch for `request`."""
    return numbered_batch(request, {side: buffers.crops(request.crops.size, side) for side in sides})


class BatchPool:
    """Threads that run a batch's jobs; the decoders and resizers they call leave the interpreter's lock."""

    def __init__(self, num_workers: int) -> None:
        self.num_workers = num_workers or own_cores()
        self._threads = ThreadPoolExecutor(self.num_workers, thread_name_prefix="repcon-loader")
        self._closed = False

    def shares(self, length: int, largest: int = 8) -> list[range]:
        """`range(length)` in pieces: small enough to balance the threads, large enough to hide their cost."""
        step = max(1, min(largest, -(-length // (2 * self.num_workers))))
        return [range(start, min(start + step, length)) for start in range(0, length, step)]

    def run(
        self,
        requests: Iterable[CropRequest],
        begin: Callable[[CropRequest], tuple[CropBatch, Sequence[Callable[[], None]]]],
    ) -> Iterator[CropBatch]:
        """Yields the batch of each request once all jobs that `begin` gave for it are done.

        An exception in a job is raised here. Leaving the iterator early cancels what has not begun and waits
        for what has, so that no thread touches a batch or a file after it.
        """
        pending: deque[tuple[CropBatch, list[Future[None]]]] = deque()
        source = iter(requests)
        futures: list[Future[None]] = []
        try:
            while True:
                while len(pending) < AHEAD_BATCHES and (request := next(source, None)) is not None:
                    batch, jobs = begin(request)
                    pending.append((batch, [self._threads.submit(job) for job in jobs]))
                if not pending:
                    return
                batch, futures = pending.popleft()
                for future in futures:  # One by one: `wait` would not hear of those that `close` cancels.
                    future.result()
                yield batch
        except (CancelledError, RuntimeError) as error:  # the pool's own, of jobs that it drops or takes no more
            if not self._closed:
                raise
            raise RuntimeError("the loader was closed before this batch was decoded") from error
        finally:
            left = futures + [future for _, rest in pending for future in rest]
            # A future that could be cancelled is not waited for: of those that `close` cancelled nobody would hear.
            wait([future for future in left if not future.cancel()])

    def close(self) -> None:
        """Ends the threads after the jobs in work; whoever waits for a batch then gets a RuntimeError."""
        self._closed = True
        self._threads.shutdown(wait=True, cancel_futures=True)


class BufferPool(Generic[Tool]):
    """What a job needs for itself, such as a decoder or scratch memory: built where none is free, then kept."""

    def __init__(self, build: Callable[[], Tool]) -> None:
        self._build = build
        self._free: queue.SimpleQueue[Tool] = queue.SimpleQueue()

    @contextmanager
    def one(self) -> Iterator[Tool]:
        """A tool for one thread. Where the block raises, it is not taken back: it may be broken."""
        try:
            tool = self._free.get_nowait()
        except queue.Empty:
            tool = self._build()
        yield tool
        self._free.put(tool)

    def close(self) -> None:
        """Lets all that are free go."""
        while not self._free.empty():
            self._free.get_nowait()
