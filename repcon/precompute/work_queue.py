"""Claims on units, so that any number of processes share a store's work without a coordinator.

A claim is a small file that only one process can create, and that its owner rewrites every few seconds. An owner is
dead when its process is gone (seen from the same machine) or when its file has not changed for a while, by the
observer's own clock. A suspended owner finds its claims taken over: before it commits anything it checks
`Claim.is_held`, and a claim that was lost is not held again.
"""

import contextlib
import itertools
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
from repcon.runtime.errors import UserError

BEAT_SECONDS = 5.0
STALE_SECONDS = 45.0
_POLL_SECONDS = 0.5
_QUIET_SECONDS = 2.0
"""A wait is reported once it has taken so long."""


class Leases:
    """This process's claims below one folder or URL, with their heartbeat; leaving the block releases them."""

    def __init__(
        self,
        folder: str,
        *,
        beat_seconds: float = BEAT_SECONDS,
        stale_seconds: float = STALE_SECONDS,
        on_wait: Callable[[str], None] | None = None,
    ) -> None:
        """`on_wait` is called with a message when `hold` has to wait."""
        self.folder = folder
        self._files = open_claims(folder)
        self._on_wait = on_wait
        self._beat_seconds, self._stale_seconds = beat_seconds, stale_seconds
        self._owner = {
            "place": _process_namespace(),
            "pid": os.getpid(),
            "born": _born(os.getpid()),
            "token": uuid.uuid4().hex,
        }
        self._held: dict[str, float] = {}
        """When the claim was last known to be this process's, by its own clock."""
        self._inherited: set[str] = set()
        self._beats = itertools.count()
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
        """Claims `name` if it is free or its owner is dead; False while a live owner has it."""
        data, asked = self._data(), _now()
        try:
            taken, inherited = self._create(name, data)
        except OSError as error:
            what = f"the claim cannot be written ({error.strerror or error})"
            hint = "fix that; what was finished is kept, the same command goes on from there"
            raise UserError(f"{self.folder}/{name}: {what}; {hint}") from error
        if taken:
            with self._lock:
                self._held[name] = asked
                (self._inherited.add if inherited else self._inherited.discard)(name)
        return taken

    def get(self, name: str) -> "Claim":
        """This process's claim on `name`, for what is committed under it."""
        return Claim(self, name, inherited=name in self._inherited)

    def is_held(self, name: str) -> bool:
        """Whether no process has taken the claim over; an old claim is renewed first.

        Raises UserError where that cannot be known.
        """
        with self._lock:
            known = self._held.get(name)
        if known is not None and _now() - known > self._stale_seconds / 2:
            with contextlib.suppress(OSError):
                self._renew(name)
        with self._lock:
            known = self._held.get(name)
        if known is None:
            return False
        try:
            held = self._is_mine(name)
        except OSError as error:
            what = f"whether this process still has its claim cannot be read ({error.strerror or error})"
            hint = "what was finished is kept, the same command goes on from there"
            raise UserError(f"{self.folder}/{name}: {what}; {hint}") from error
        if not held:
            with self._lock:
                self._held.pop(name, None)
        return held

    def holder(self, name: str) -> str:
        """Description of the owner of `name`, and when the claim would be taken over."""
        held = self._files.read(name)
        try:
            owner = json.loads(held or b"")
            who = f"process {int(owner['pid'])} on {str(owner['place']).split()[0]}"
        except (ValueError, KeyError, TypeError, IndexError):
            who = "another process"
        _, since = self._seen.get(name, (b"", time.monotonic()))
        silent = time.monotonic() - since
        return f"{who}, silent for {silent:.0f} s, taken for dead after {self._stale_seconds:.0f} s"

    def is_free(self, name: str) -> bool:
        """Whether no live process has it."""
        free = self.claim(name)
        if free:
            self.release(name)
        return free

    def release(self, name: str) -> None:
        """Releases the claim on `name`."""
        with self._lock:
            held = self._held.pop(name, None) is not None
        with contextlib.suppress(OSError):  # a claim that stays behind is taken for dead after a while
            if held and self._is_mine(name):
                self._files.remove(name)

    @contextlib.contextmanager
    def hold(self, name: str) -> "Iterator[Claim]":
        """Waits for the claim on `name` and holds it for the block."""
        started, warned = time.monotonic(), self._on_wait is None
        while not self.claim(name):
            if not warned and time.monotonic() - started > _QUIET_SECONDS:
                warned = True
                assert self._on_wait is not None
                self._on_wait(f"waiting for {self.folder}/{name}, which is held by {self.holder(name)}")
            time.sleep(_POLL_SECONDS)
        try:
            yield self.get(name)
        finally:
            self.release(name)

    def _create(self, name: str, data: bytes) -> tuple[bool, bool]:
        """Whether the claim is this process's now, and whether it may have been another's before.

        A write may have taken place where it is said not to have: its answer was lost, and it was repeated. Then the
        content is `data`, which no other claim has.
        """
        if self._files.create(name, data):
            return True, False
        held = self._files.read(name)
        if held == data:
            return True, False
        if held is None:
            taken = self._files.create(name, data)
        elif self._is_dead(name, held):
            taken = self._files.replace_dead(name, held, data)
        else:
            return False, False
        return taken or self._files.read(name) == data, True

    def _is_dead(self, name: str, held: bytes) -> bool:
        now = time.monotonic()
        last, since = self._seen.get(name, (b"", now))
        if last != held:
            since = now
            self._seen[name] = held, now
        return _process_is_gone(held) or now - since > self._stale_seconds

    def _data(self) -> bytes:
        """The content of a claim, another one at every call."""
        return json.dumps({**self._owner, "beat": next(self._beats)}).encode()

    def _beat(self) -> None:
        while not self._stop.wait(self._beat_seconds):
            for name in list(self._held):
                # A file that cannot be reached now is tried again at the next beat, whatever the file system's
                # library raised; one that another process took over (this one slept for long) is left to it.
                with contextlib.suppress(Exception):
                    self._renew(name)

    def _renew(self, name: str) -> None:
        with self._lock:
            asked = _now()
            if name not in self._held:  # released meanwhile
                return
            if not self._is_mine(name):
                del self._held[name]
                return
            self._files.write(name, self._data())
            # Where this process stood still since it looked, the claim that it wrote over may have been another's.
            if _now() - asked > self._stale_seconds / 2:
                del self._held[name]
            else:
                self._held[name] = asked

    def _is_mine(self, name: str) -> bool:
        """By its token: whether the last beat was written is not known where writing it failed."""
        held = self._files.read(name)
        return held is not None and self._owner["token"].encode() in held


class Claim:
    """A claim of this process, which may have been lost."""

    def __init__(self, leases: Leases, name: str, *, inherited: bool) -> None:
        self._leases, self._name = leases, name
        self.inherited = inherited
        """Whether it was taken over from a process that may resume."""

    def is_held(self) -> bool:
        """See `Leases.is_held`."""
        return self._leases.is_held(self._name)


def _now() -> float:
    """Seconds by a clock that also runs while the machine sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


def _process_namespace() -> str:
    """Identifies where process numbers are comparable: machine, boot, and PID namespace."""
    return " ".join([socket.gethostname(), *map(_or_empty, (_boot, lambda: os.readlink("/proc/self/ns/pid")))])


def _boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def _or_empty(ask: Callable[[], str]) -> str:
    try:
        return ask()
    except OSError:
        return ""


def _born(pid: int) -> str:
    """Start time of the process in kernel ticks; empty without /proc or such a process."""
    return _or_empty(lambda: Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[19].decode())


def _process_is_gone(held: bytes) -> bool:
    """Whether the claim's owner ran on this machine and has ended; False where that is unknown."""
    try:
        owner: dict[str, Any] = json.loads(held)
        pid, born = int(owner["pid"]), str(owner["born"])
    except (ValueError, KeyError, TypeError):
        return False
    return bool(born) and owner.get("place") == _process_namespace() and _born(pid) != born
