"""Claims on units, so that any number of processes share a store's work without a coordinator.

A claim is a small file that appears for one claimant only, and that its owner rewrites every few seconds. An owner
is dead when its process is gone (seen from the same machine) or when its file has not changed for a while, by the
observer's own clock. Claims save double work; they are not what keeps a store right: a unit that is done twice is
written twice with the same bytes.
"""

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from repcon.precompute.claim_files import open_claims

BEAT_SECONDS = 5.0
STALE_SECONDS = 45.0
_POLL_SECONDS = 0.5


class Leases:
    """This process's claims below one folder or URL, with their heartbeat; leaving the block releases them."""

    def __init__(
        self, folder: str, *, beat_seconds: float = BEAT_SECONDS, stale_seconds: float = STALE_SECONDS
    ) -> None:
        self._files = open_claims(folder)
        self._beat_seconds, self._stale_seconds = beat_seconds, stale_seconds
        self._owner = {"place": _place(), "pid": os.getpid(), "born": _born(os.getpid()), "token": uuid.uuid4().hex}
        self._held: set[str] = set()
        self._seen: dict[str, tuple[bytes, float]] = {}
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._heart = threading.Thread(target=self._beat, name="repcon-leases", daemon=True)

    def __enter__(self) -> "Leases":
        self._heart.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._heart.join()
        for name in list(self._held):
            self.release(name)
        self._files.remove_folder()

    def claim(self, name: str) -> bool:
        """Takes `name` if nobody has it or its owner is dead; False while a living owner has it."""
        data = self._data(0)
        taken = self._files.create(name, data) or self._take_over(name, data)
        if taken:
            with self._lock:
                self._held.add(name)
        return taken

    def is_free(self, name: str) -> bool:
        """Whether no living process has it."""
        free = self.claim(name)
        if free:
            self.release(name)
        return free

    def release(self, name: str) -> None:
        """Gives `name` back."""
        with self._lock:
            held = name in self._held
            self._held.discard(name)
        if held and self._is_mine(name):
            self._files.remove(name)

    @contextlib.contextmanager
    def hold(self, name: str) -> Iterator[None]:
        """Waits for `name` and keeps it for the block."""
        while not self.claim(name):
            time.sleep(_POLL_SECONDS)
        try:
            yield
        finally:
            self.release(name)

    def _take_over(self, name: str, data: bytes) -> bool:
        held = self._files.read(name)
        if held is None:
            return self._files.create(name, data)
        return self._is_dead(name, held) and self._files.replace_dead(name, held, data)

    def _is_dead(self, name: str, held: bytes) -> bool:
        now = time.monotonic()
        last, since = self._seen.get(name, (b"", now))
        if last != held:
            since = now
            self._seen[name] = held, now
        return _process_is_gone(held) or now - since > self._stale_seconds

    def _data(self, beat: int) -> bytes:
        return json.dumps({**self._owner, "beat": beat}).encode()

    def _beat(self) -> None:
        beat = 0
        while not self._stop.wait(self._beat_seconds):
            beat += 1
            with self._lock:
                for name in self._held:
                    # A file that cannot be reached now is tried again at the next beat, whatever the file system's
                    # library raised; one that another process took over (this one slept for long) is left to it.
                    with contextlib.suppress(Exception):
                        if self._is_mine(name):
                            self._files.write(name, self._data(beat))

    def _is_mine(self, name: str) -> bool:
        """By its token: whether the last beat was written is not known where writing it failed."""
        held = self._files.read(name)
        return held is not None and self._owner["token"].encode() in held


def _place() -> str:
    """Where process numbers mean the same: machine, its boot, and the container's process space."""
    return " ".join([socket.gethostname(), *map(_said, (_boot, lambda: os.readlink("/proc/self/ns/pid")))])


def _boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _said(ask: Callable[[], str]) -> str:
    try:
        return ask()
    except OSError:
        return ""


def _born(pid: int) -> str:
    """When the process started, in the kernel's ticks; empty where that is not to be had (no /proc, no process)."""
    return _said(lambda: Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])


def _process_is_gone(held: bytes) -> bool:
    """Whether the claim's owner lived on this machine and does no more; False where that cannot be known."""
    try:
        owner: dict[str, Any] = json.loads(held)
        pid, born = int(owner["pid"]), str(owner["born"])
    except (ValueError, KeyError, TypeError):
        return False
    return bool(born) and owner.get("place") == _place() and _born(pid) != born
