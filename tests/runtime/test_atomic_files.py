"""Writes that appear whole or not at all, exclusive creation, what other libraries wrote, and locks."""

import errno
import fcntl
import os
import resource
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from repcon.runtime.atomic_files import (
    AtomicFile,
    WriteCancelledError,
    cancel_writes,
    create_exclusive,
    lock,
    move_into_place,
    remove_abandoned,
    write_atomic,
)


def test_an_atomic_file_takes_its_place_at_the_end_or_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with AtomicFile(path) as file:
        file.write(b"old")
        assert not path.exists()
    with pytest.raises(ZeroDivisionError), AtomicFile(path) as file:
        file.write(b"new")
        raise ZeroDivisionError
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]
    with pytest.raises(OSError, match="No space") as caught, AtomicFile(path):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert caught.value.filename == str(path)
    with pytest.raises(FileNotFoundError) as caught:
        AtomicFile(tmp_path / "missing" / "file")
    assert caught.value.filename == str(tmp_path / "missing" / "file")


def test_a_check_that_fails_cancels_the_write(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomic(path, b"old")
    with pytest.raises(ZeroDivisionError):
        write_atomic(path, b"new", lambda: 1 // 0)
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]


def test_a_write_that_another_process_cancelled_is_repeated_after_another_check(tmp_path: Path) -> None:
    path, checks = tmp_path / "file", []

    def check() -> None:
        checks.append(path.exists())
        if len(checks) == 1:
            cancel_writes(tmp_path, ["other"])
            cancel_writes(tmp_path, ["file"])

    write_atomic(path, b"data", check)
    assert checks == [False, False] and path.read_bytes() == b"data" and os.listdir(tmp_path) == ["file"]
    file = AtomicFile(path)
    cancel_writes(tmp_path, ["file"])
    with pytest.raises(WriteCancelledError, match="cancelled"):
        file.commit()
    assert path.read_bytes() == b"data"


def test_a_living_writers_file_is_not_removed_an_abandoned_one_is(tmp_path: Path) -> None:
    with AtomicFile(tmp_path / "file") as file:
        remove_abandoned(tmp_path)
        file.write(b"data")
    abandoned = tmp_path / f".file.{'a' * 32}.repcon.tmp"
    abandoned.write_bytes(b"half")
    remove_abandoned(tmp_path)
    assert os.listdir(tmp_path) == ["file"] and (tmp_path / "file").read_bytes() == b"data"


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    """The system's error of a write does not say which file it is about."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with pytest.raises(OSError) as caught:
            write_atomic(tmp_path / "x", b"1" * 100_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert caught.value.filename == str(tmp_path / "x") and not list(tmp_path.iterdir())


def test_a_write_that_may_be_lost_does_not_wait_for_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: pytest.fail("waited"))
    write_atomic(tmp_path / "file", b"data", durable=False)
    assert (tmp_path / "file").read_bytes() == b"data" and os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("links", [True, False])
def test_one_of_several_creates_a_file(links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    if not links:
        monkeypatch.setattr(os, "link", refused)
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda i: create_exclusive(tmp_path / "file", b"%d" % i, 0o600), range(8)))
    assert sum(made) == 1 and (tmp_path / "file").read_bytes() == b"%d" % made.index(True)
    assert os.listdir(tmp_path) == ["file"] and (tmp_path / "file").stat().st_mode & 0o777 == 0o600
    with pytest.raises(FileNotFoundError):
        create_exclusive(tmp_path / "missing" / "file", b"")


def test_files_and_folders_are_moved_into_place(tmp_path: Path) -> None:
    (tmp_path / "made").write_bytes(b"new")
    (tmp_path / "file").write_bytes(b"old")
    move_into_place(tmp_path / "made", tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == b"new" and os.listdir(tmp_path) == ["file"]
    for folder in ("made", "empty"):
        (tmp_path / folder).mkdir()
    (tmp_path / "made" / "inner").touch()
    move_into_place(tmp_path / "made", tmp_path / "empty")
    assert os.listdir(tmp_path / "empty") == ["inner"]
    (tmp_path / "made").mkdir()
    with pytest.raises(OSError, match="not empty"):
        move_into_place(tmp_path / "made", tmp_path / "empty")


def test_locks_are_shared_exclusive_waited_for_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    with open(tmp_path / "file", "rb") as first, open(tmp_path / "file", "rb") as second:
        one, two = first.fileno(), second.fileno()
        assert lock(one, shared=True) and lock(two, shared=True) and lock(one) is False
        assert lock(two) and lock(one, shared=True) is False  # the change that failed gave up the shared lock
        assert lock(two, shared=True) and lock(one, shared=True)
        threading.Timer(0.2, first.close).start()
        started = time.monotonic()
        assert lock(two, wait=True) and time.monotonic() - started > 0.1

        def no_locks(*_: object) -> None:
            raise OSError(errno.ENOLCK, "no locks here")

        monkeypatch.setattr(fcntl, "flock", no_locks)
        assert lock(two) is None and lock(two, wait=True) is None
