"""Two bounded queues: work that is prepared ahead of its consumer, and work that is finished behind its producer."""

import atexit
import queue
import threading
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Generic, TypeVar

Item = TypeVar("Item")
_POLL_SECONDS = 0.2


class Prefetcher(Generic[Item]):
    """Runs an iterator in a thread, at most `depth` items ahead; errors in it are raised where it is consumed."""

    def __init__(self, source: Iterator[Item], depth: int) -> None:
        self.waited_seconds = 0.0
        """How long the consumer stood still for want of an item."""
        self._source = source
        self._queue: queue.Queue[tuple[str, Item | BaseException | None]] = queue.Queue(depth)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="repcon-ahead", daemon=True)

    def __enter__(self) -> "Prefetcher[Item]":
        # The interpreter's end kills threads, and one that is in compiled code takes the process along.
        atexit.register(self.__exit__)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        """Stops the thread after the item in work."""
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


class BackgroundWriter:
    """Runs jobs in a thread, in order, at most `depth` of them waiting; an error is raised at the next `put`.

    Leaving the block finishes what was put, whatever the reason; after a job that failed the rest is dropped.
    """

    def __init__(self, depth: int) -> None:
        self.waited_seconds = 0.0
        """How long the producer stood still because the jobs are slower than it is."""
        self._queue: queue.Queue[Callable[[], None] | None] = queue.Queue(depth)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="repcon-behind", daemon=True)

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
