"""A thread pool that fills batches in order, a few ahead of the consumer, and the loaders that crop with it."""

import queue
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from functools import partial
from typing import Generic, TypeVar

from repcon.decode.base import CropBatch, CropRequest, check_boxes
from repcon.decode.buffer_pool import BufferPool
from repcon.decode.resize import CropResizer
from repcon.images.pack import ImagePack
from repcon.runtime.system import own_cores

State = TypeVar("State")
"""What one job uses alone while it runs, such as a decoder and scratch memory."""

MAX_BATCHES = 3
"""Batches in memory at a time, including the one that the consumer holds."""


class WorkerPool(Generic[State]):
    """Threads that run a batch's jobs; the decoders and resizers that the jobs call release the GIL.

    make_state: builds a job's state; it is called when no state of an earlier job is free.
    """

    def __init__(self, num_workers: int, make_state: Callable[[], State]) -> None:
        self.num_workers = num_workers or own_cores()
        self._threads = ThreadPoolExecutor(self.num_workers, thread_name_prefix="repcon-loader")
        self._make_state = make_state
        self._free_states: queue.SimpleQueue[State] = queue.SimpleQueue()
        self._closed = False

    def chunks(self, length: int, largest: int) -> list[range]:
        """`range(length)` in pieces, small enough to balance the threads, large enough to hide their overhead."""
        step = max(1, min(largest, -(-length // (2 * self.num_workers))))
        return [range(start, min(start + step, length)) for start in range(0, length, step)]

    def run(
        self,
        requests: Iterable[CropRequest],
        start: Callable[[CropRequest], tuple[CropBatch, Sequence[Callable[[State], None]]]],
    ) -> Iterator[CropBatch]:
        """Yields the batch of each request once all jobs that `start` returned for it are done.

        An exception in a job is raised here. Leaving the iterator early cancels the jobs that have not started and
        waits for the others, so that no thread touches a batch or a file afterwards.
        """
        pending: deque[tuple[CropBatch, list[Future[None]]]] = deque()
        source = iter(requests)
        futures: list[Future[None]] = []
        try:
            while True:
                while len(pending) < MAX_BATCHES and (request := next(source, None)) is not None:
                    batch, jobs = start(request)
                    pending.append((batch, [self._threads.submit(self._run_job, job) for job in jobs]))
                if not pending:
                    return
                batch, futures = pending.popleft()
                for future in futures:  # One by one: `wait` does not return for those that `close` cancels.
                    future.result()
                yield batch
        except (CancelledError, RuntimeError) as error:  # of the executor, for jobs that it cancels or refuses
            if not self._closed:
                raise
            raise RuntimeError("the loader was closed before this batch was decoded") from error
        finally:
            unfinished = futures + [future for _, rest in pending for future in rest]
            # Cancelled futures are not waited for: `wait` does not return for those that `close` cancelled.
            wait([future for future in unfinished if not future.cancel()])

    def _run_job(self, job: Callable[[State], None]) -> None:
        try:
            state = self._free_states.get_nowait()
        except queue.Empty:
            state = self._make_state()
        job(state)
        self._free_states.put(state)  # not after an exception, which may have left it broken

    def close(self) -> None:
        """End the threads after the running jobs, and free their states; a consumer that waits gets a RuntimeError."""
        self._closed = True
        self._threads.shutdown(wait=True, cancel_futures=True)
        while not self._free_states.empty():
            self._free_states.get_nowait()


class CpuLoader(ABC, Generic[State]):
    """Divides a batch's images among threads; `make_state` builds what one of them decodes with."""

    images_per_job = 8

    def __init__(
        self, pack: ImagePack, sides: Sequence[int], make_state: Callable[[], State], num_workers: int, device: str
    ) -> None:
        self._pack, self._sides, self._buffers = pack, tuple(sides), BufferPool(device)
        self._workers = WorkerPool(num_workers, make_state)

    def batches(self, requests: Iterable[CropRequest]) -> Iterator[CropBatch]:
        """See `Loader.batches`."""
        return self._workers.run(requests, self._start)

    def _start(self, request: CropRequest) -> tuple[CropBatch, list[Callable[[State], None]]]:
        check_boxes(self._pack, request)
        batch = self._buffers.batch(request, self._sides)
        resizer = CropResizer(self._pack, request, batch)
        chunks = self._workers.chunks(len(request.images), self.images_per_job)
        return batch, [partial(self._fill, resizer, places) for places in chunks]

    @abstractmethod
    def _fill(self, resizer: CropResizer, places: range, state: State) -> None:
        """Decodes the request's images at `places` and fills their rows of the batch."""

    def close(self) -> None:
        """See `Loader.close`."""
        self._workers.close()
