"""Bounded prefetch and background-write queues.

`Prefetcher` runs an iterator in one thread; `map_ahead` calls a function of each item in several threads;
`BackgroundWriter` runs jobs in order. Not built on these, because items are requested by name and not in order:
the caches of labels (`distill`) and of a remote pack's blocks (`images.pack`). `decode.worker_pool` splits one
batch among threads and keeps them from epoch to epoch.
"""

import atexit
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")
_POLL_SECONDS = 0.2


class Prefetcher(Generic[Item]):
    """Runs an iterator in a thread, at most `depth` items ahead; its errors are raised where items are consumed."""

    def __init__(self, source: Iterator[Item], depth: int) -> None:
        self.waited_seconds = 0.0
        """How long the consumer has waited for items."""
        self._source = source
        self._queue: queue.Queue[tuple[str, Item | BaseException | None]] = queue.Queue(depth)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="repcon-prefetch", daemon=True)

    def __enter__(self) -> "Prefetcher[Item]":
        # The interpreter's end kills threads, and one that is in compiled code takes the process along.
        atexit.register(self.__exit__)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        """Stops the thread after the item that it is preparing."""
        atexit.unregister(self.__exit__)
        self._stopped.set()
        while self._thread.is_alive():
            self._drain()
            self._thread.join(_POLL_SECONDS)

    def __iter__(self) -> Iterator[Item]:
        while True:
            started = time.perf_counter()
            kind, item = self._queue.get()
            self.waited_seconds += time.perf_counter() - started
            if kind == "end":
                return
            if isinstance(item, BaseException):
                raise item
            yield item  # pyright: ignore[reportReturnType]

    def _run(self) -> None:
        try:
            for item in self._source:
                if not self._put("item", item):
                    return
            self._put("end", None)
        except BaseException as error:
            self._put("error", error)
        finally:
            close = getattr(self._source, "close", None)
            if close is not None:
                close()

    def _put(self, kind: str, item: Item | BaseException | None) -> bool:
        while not self._stopped.is_set():
            try:
                self._queue.put((kind, item), timeout=_POLL_SECONDS)
                return True
            except queue.Full:
                continue
        return False

    def _drain(self) -> None:
        while not self._queue.empty():
            self._queue.get_nowait()


def map_ahead(
    function: Callable[[Item], Result], items: Iterable[Item], *, num_workers: int = 1, depth: int = 1
) -> Generator[Result, None, None]:
    """Yields `function(item)` in the order of `items`, computed in threads for up to `depth` items ahead.

    An error is raised where its result would have been yielded. Closing the iterator cancels the calls that have not
    begun and waits for the others.
    """
    pending: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(num_workers, thread_name_prefix="repcon-prefetch") as pool:
        try:
            for item in items:
                pending.append(pool.submit(function, item))
                if len(pending) > depth:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


class BackgroundWriter:
    """Runs jobs in a thread, in order, at most `depth` of them waiting; an error is raised at the next `put`.

    Leaving the block waits for the jobs that were put; after a job that failed the others are dropped.
    """

    def __init__(self, depth: int) -> None:
        self.waited_seconds = 0.0
        """How long the producer has waited for room in the queue."""
        self._queue: queue.Queue[Callable[[], None] | None] = queue.Queue(depth)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="repcon-background-writer", daemon=True)

    def __enter__(self) -> "BackgroundWriter":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._queue.put(None)
        self._thread.join()
        if kind is None:
            self._raise()

    def put(self, job: Callable[[], None]) -> None:
        """Hands a job over; waits while `depth` jobs wait already."""
        self._raise()
        started = time.perf_counter()
        self._queue.put(job)
        self.waited_seconds += time.perf_counter() - started

    def _run(self) -> None:
        while (job := self._queue.get()) is not None:
            if self._error is not None:
                continue
            try:
                job()
            except BaseException as error:
                self._error = error

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error
