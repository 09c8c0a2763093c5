"""Worker processes on this machine: their events in one place, and replacements for those that die."""

import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import Pipe, connection
from typing import Any

from repcon.runtime.console import console
from repcon.runtime.errors import UserError
from repcon.runtime.system import cores

REPLACEMENTS = 3
"""How many times each process may die (killed, out of memory) before the run gives up."""
_POLL_SECONDS = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSlot:
    """Device and cores of one worker process."""

    gpu: int | None
    """Number of the GPU among the visible ones; None on the CPU."""
    threads: int
    """Its share of the cores, for torch (as OMP_NUM_THREADS) and for the loader."""

    @property
    def device(self) -> str:
        """The process's name for its device: it sees no other GPU."""
        return "cpu" if self.gpu is None else "cuda"

    def environment(self) -> dict[str, str]:
        """Environment variables of a process in this slot."""
        variables = {"OMP_NUM_THREADS": str(self.threads)}
        if self.gpu is not None:  # Otherwise each of its threads would allocate memory on the first GPU.
            visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
            variables["CUDA_VISIBLE_DEVICES"] = visible.split(",")[self.gpu] if visible else str(self.gpu)
        return variables


def worker_slots(count: int, gpus: int) -> list[WorkerSlot]:
    """`count` processes spread over so many GPUs, or over this machine's cores where there are none."""
    threads = max(1, cores() // count)
    return [WorkerSlot(gpu=number % gpus if gpus else None, threads=threads) for number in range(count)]


class WorkerProcess:
    """One worker process and the pipe of its events."""

    def __init__(self, job: Callable[..., None], arguments: Sequence[Any], slot: WorkerSlot) -> None:
        self.slot = slot
        self.reports, theirs = Pipe(duplex=False)
        # A session of its own: Ctrl-C reaches the parent, which then asks each worker to stop, once.
        self.process = subprocess.Popen(
            [sys.executable, "-m", "repcon.precompute.launch_local", str(theirs.fileno())],
            stdin=subprocess.PIPE,
            pass_fds=[theirs.fileno()],
            start_new_session=True,
            env=os.environ | slot.environment(),
        )
        theirs.close()
        assert self.process.stdin is not None
        with self.process.stdin as pipe:
            pipe.write(pickle.dumps((job, tuple(arguments), slot)))

    def ask_to_stop(self) -> None:
        """Asks the process to end after the unit that it is writing."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)

    def wait(self) -> None:
        """Waits until the process has ended; drains its events, which would block it."""
        with suppress(EOFError, OSError, pickle.UnpicklingError):
            while True:
                self.reports.recv()
        self.reports.close()
        self.process.wait()


def run(
    job: Callable[..., None], arguments: Sequence[Any], places: Sequence[WorkerSlot], take: Callable[[Any], None]
) -> None:
    """Calls `job(*arguments, slot, on_event)` in a process per slot; `take` receives their events.

    A UserError in one of them ends all and is raised here. One that dies is replaced, a few times.
    """
    workers: list[WorkerProcess] = []
    deaths = 0
    try:
        workers += [WorkerProcess(job, arguments, slot) for slot in places]
        while workers:
            ready = connection.wait([worker.reports for worker in workers], _POLL_SECONDS)
            for worker in [worker for worker in workers if worker.reports in ready]:
                if _receive(worker, take):
                    continue
                workers.remove(worker)
                if worker.process.wait() != 0:
                    deaths += 1
                    workers.append(_replacement(job, arguments, worker, deaths, len(places)))
    finally:
        for worker in workers:
            worker.ask_to_stop()
        for worker in workers:
            worker.wait()


def _receive(worker: WorkerProcess, take: Callable[[Any], None]) -> bool:
    """Passes one event on; False at the end of the pipe."""
    try:
        event = worker.reports.recv()
    except (EOFError, OSError):  # OSError: it was killed while it sent an event.
        return False
    if isinstance(event, UserError):
        raise event
    take(event)
    return True


def _replacement(
    job: Callable[..., None], arguments: Sequence[Any], dead: WorkerProcess, deaths: int, count: int
) -> WorkerProcess:
    code = dead.process.returncode
    cause = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
    if deaths > REPLACEMENTS * count:
        raise UserError(f"processes: too many died, the last {cause}; what was finished is kept. Start fewer of them")
    console.print(f"[yellow]a process {cause}; another takes its place[/]")
    return WorkerProcess(job, arguments, dead.slot)


@contextmanager
def terminable() -> Iterator[None]:
    """Makes SIGTERM, which schedulers send before SIGKILL, raise KeyboardInterrupt in the block."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _worker(reports: connection.Connection) -> int:
    """The main function of a worker process."""
    console.quiet = True
    job, arguments, slot = pickle.load(sys.stdin.buffer)
    lock = threading.Lock()

    def on_event(event: Any) -> None:
        with lock:  # several threads send, and a large event is sent in pieces
            reports.send(event)

    try:
        with terminable():
            job(*arguments, slot, on_event)
    except UserError as error:
        reports.send(UserError(str(error)))
    except (KeyboardInterrupt, BrokenPipeError):  # asked to stop, or the parent is gone
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(_worker(connection.Connection(int(sys.argv[1]), readable=False)))
