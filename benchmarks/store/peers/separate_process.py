"""A Zarr library timed in a process of its own, in this Python or in another one.

A process each, because these libraries start threads that do not outlive a fork, are configured for the whole process,
and because zarr-python's newest needs a newer Python than some checkouts have. That Python needs numpy and the library.

`python -m benchmarks.store.peers.separate_process LIBRARY STORE HEADS` reads requests as lines of JSON and answers
each with a line: first with what it opened, then with seconds.
"""

import json
import os
import subprocess
import sys
import zlib
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.store.peers.peer import Arrays
from benchmarks.store.peers.zarr_readers import LIBRARIES

ROOT = Path(__file__).parents[3]


class SeparateProcess:
    """What is timed of a `Peer`, in a process of its own."""

    def __init__(self, python: str, library: str, store: Path, classes: dict[str, int]) -> None:
        """Raises ImportError with the process's last words where it does not get as far as the first slab."""
        command = [python, "-m", __name__, library, str(store), json.dumps(classes)]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        pipe = subprocess.PIPE
        try:
            self._process = subprocess.Popen(command, env=environment, text=True, stdin=pipe, stdout=pipe, stderr=pipe)
        except OSError as error:
            raise ImportError(f"{python}: {error.strerror}") from error
        assert self._process.stdin and self._process.stdout and self._process.stderr
        self._requests, self._answers, self._errors = (
            self._process.stdin, self._process.stdout, self._process.stderr,
        )  # fmt: skip
        line = self._answers.readline()
        if not line:
            words = self._errors.read().strip().splitlines()
            self.close()
            raise ImportError(words[-1] if words else f"{python} ended with {self._process.returncode}")
        opened: dict[str, Any] = json.loads(line)
        self.images: int = opened["images"]
        self.bytes: int = opened["bytes"]
        self.checks: str = opened["checks"]
        self.version: str = opened["version"]
        self.first_slab: int = opened["first_slab"]
        """`checksum` of crop 0."""

    def slab_seconds(self, crop: int) -> float:
        """As `Peer.slab_seconds`."""
        return self._ask("slab_seconds", crop)

    def batch_seconds(self, crop: int, rows: np.ndarray) -> float:
        """As `Peer.batch_seconds`."""
        return self._ask("batch_seconds", crop, rows.tolist())

    def epoch_seconds(self, orders: Sequence[np.ndarray]) -> float:
        """As `Peer.epoch_seconds`."""
        return self._ask("epoch_seconds", [order.tolist() for order in orders])

    def _ask(self, *request: Any) -> float:
        self._requests.write(json.dumps(request) + "\n")
        self._requests.flush()
        return json.loads(self._answers.readline())

    def close(self) -> None:
        """Ends the process."""
        self._requests.close()
        self._process.wait()
        self._answers.close()
        self._errors.close()


def checksum(arrays: Arrays) -> int:
    """One number of all arrays' bytes."""
    found = 0
    for array in arrays:
        found = zlib.crc32(np.ascontiguousarray(array).tobytes(), found)
    return found


def main() -> None:
    """The process's own end."""
    library, store, heads = sys.argv[1:]
    peer = LIBRARIES[library](Path(store), json.loads(heads))
    opened = {name: getattr(peer, name) for name in ("images", "bytes", "checks")}
    opened |= {"version": _versions(library), "first_slab": checksum(peer.slab(0))}
    print(json.dumps(opened), flush=True)
    for line in sys.stdin:
        timed, *arguments = json.loads(line)
        given = [_arrays(argument) for argument in arguments]
        print(json.dumps(getattr(peer, timed)(*given)), flush=True)


def _versions(library: str) -> str:
    """Of the library, of zarr-python too where that one calls it."""
    names = ["zarrs", "zarr"] if library == "zarrs" else [library]
    return ", ".join(version(name) if name == library else f"{name} {version(name)}" for name in names)


def _arrays(argument: Any) -> Any:
    """A crop as it is, rows as an array, orders as arrays."""
    if isinstance(argument, int):
        return argument
    return [np.array(order) for order in argument] if isinstance(argument[0], list) else np.array(argument)


if __name__ == "__main__":
    main()
