import fcntl
import gc
import multiprocessing
import os
import signal
import stat
import threading
from pathlib import Path

import numpy as np
import pytest
from store_builder import fill, spec

from repcon.labels import shared_memory as store_shared
from repcon.labels.store import LabelStore
from repcon.runtime.errors import UserError


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    path = tmp_path / "shm"
    path.mkdir()
    monkeypatch.setattr(store_shared, "FOLDER", path)
    return path


@pytest.fixture
def store(tmp_path) -> LabelStore:
    return fill(LabelStore.create(str(tmp_path / "labels.zarr"), spec()))


def tables(folder) -> list[Path]:
    """The tables that lie in this user's private folder."""
    return store_shared.tables_in(store_shared.private_folder()[0])


def take(url: str, folder, pipe) -> None:
    """A training process: maps the tables, says what it sees, and waits to be told to go."""
    store_shared.FOLDER = folder
    store = LabelStore.open(url)
    decoded = []
    read = store.reader._shards.read
    store.reader._shards.read = lambda *arguments: decoded.append(1) or read(*arguments)  # pyright: ignore
    tables = store.reader.table([0, 2], shared=True)
    pipe.send((len(decoded), int(tables.labels["wide"][0].astype(np.int64).sum())))
    pipe.recv()
    del tables
    pipe.send("let go")


def start(store, folder):
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(target=take, args=(store.url, folder, theirs))
    process.start()
    return process, ours


def test_shared_tables_hold_what_private_ones_do(store, folder):
    shared, private = store.reader.table([1, 3], shared=True), store.reader.table([1, 3])
    for name, pair in private.labels.items():
        for one, other in zip(pair, shared.labels[name], strict=True):
            np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(shared.boxes, private.boxes)
    np.testing.assert_array_equal(shared.flips, private.flips)


def test_a_second_reader_maps_the_first_ones_copy(store, folder, monkeypatch):
    first = store.reader.table([0], shared=True)
    monkeypatch.setattr(store.reader._shards, "read", lambda *arguments: pytest.fail("decoded twice"))
    second = store.reader.table([0], shared=True)
    assert len(tables(folder)) == 1
    first.flips[0] = 7
    assert second.flips[0] == 7
    del first
    gc.collect()
    assert len(tables(folder)) == 1
    flips = second.flips
    del second
    gc.collect()
    assert tables(folder) == [] and flips[0] == 7  # an array outlives its file


def test_processes_share_one_copy_and_the_last_deletes_it(store, folder):
    processes = [start(store, folder) for _ in range(2)]
    answers = [pipe.recv() for _, pipe in processes]
    assert sorted(decoded for decoded, _ in answers) == [0, 2]  # one process decoded the two crops, the other none
    assert len({total for _, total in answers}) == 1 and len(tables(folder)) == 1
    for process, pipe in processes:
        pipe.send("go")
        assert pipe.recv() == "let go"
        process.join()
    assert tables(folder) == []


def test_two_that_see_the_file_incomplete_at_once_both_get_it(store, monkeypatch):
    """Both look before either has locked it for itself; the one that comes second must not wait for the first to go."""
    plain, together, looked = os.pread, threading.Barrier(2, timeout=20), set()
    decoded, taken = [], []
    read = store.reader._shards.read
    monkeypatch.setattr(store.reader._shards, "read", lambda *arguments: decoded.append(1) or read(*arguments))

    def pread(descriptor: int, length: int, offset: int) -> bytes:
        data = plain(descriptor, length, offset)
        if length == len(store_shared._READY) + 32 and threading.get_ident() not in looked:
            looked.add(threading.get_ident())
            together.wait()
        return data

    monkeypatch.setattr(os, "pread", pread)
    threads = [
        threading.Thread(target=lambda: taken.append(store.reader.table([0], shared=True)), daemon=True)
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(taken) == 2 and len(decoded) == 1
    np.testing.assert_array_equal(taken[0].flips, taken[1].flips)


def test_what_a_killed_process_left_is_swept(store, folder):
    process, pipe = start(store, folder)
    pipe.recv()
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert len(tables(folder)) == 1
    other = store.reader.table([1], shared=True)
    assert len(tables(folder)) == 1 and other.crops == (1,)


def test_a_copy_that_was_never_completed_is_decoded_again(store, folder, monkeypatch):
    def broken(*arguments):
        raise UserError("the disk came off")

    monkeypatch.setattr(store.reader._shards, "read", broken)
    with pytest.raises(UserError, match="came off"):
        store.reader.table([0], shared=True)
    monkeypatch.undo()
    assert tables(folder) == []


def test_no_room_is_told(store, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UserError, match="has no room for"):
        store.reader.table([0], shared=True)


def test_another_store_gets_another_copy(store, folder, tmp_path):
    other = fill(LabelStore.create(str(tmp_path / "other.zarr"), spec()))
    held = [
        store.reader.table([0], shared=True),
        other.reader.table([0], shared=True),
        store.reader.table([0], ["wide"], shared=True),
    ]
    assert len(tables(folder)) == len(held) == 3


def test_the_folder_and_all_in_it_are_this_users_alone(store, folder):
    held = store.reader.table([0], shared=True)
    private, secret = store_shared.private_folder()
    assert stat.S_IMODE(private.stat().st_mode) == 0o700 and len(secret) == 32
    assert held.crops == (0,) and all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in private.iterdir())
    assert store_shared.private_folder() == (private, secret)


def foreign(path: Path, real=os.lstat) -> os.stat_result:
    values = list(real(path))
    values[stat.ST_UID] += 1
    return os.stat_result(values)


@pytest.mark.parametrize("plant", ["link", "open folder", "file", "foreign folder"])
def test_a_folder_that_another_user_planted_is_passed_over(store, folder, tmp_path, monkeypatch, plant):
    planted = folder / f"repcon-labels-{os.getuid()}-0"
    if plant == "link":
        (tmp_path / "theirs").mkdir(mode=0o700)
        planted.symlink_to(tmp_path / "theirs")
    elif plant == "file":
        planted.write_bytes(b"")
    else:
        planted.mkdir(mode=0o700)
    if plant == "open folder":
        planted.chmod(0o777)
    if plant == "foreign folder":
        plain = Path.lstat
        monkeypatch.setattr(Path, "lstat", lambda path: foreign(path) if path == planted else plain(path))
    used, _ = store_shared.private_folder()
    assert used.name.endswith("-1")
    np.testing.assert_array_equal(store.reader.table([0], shared=True).flips, store.reader.table([0]).flips)


def test_a_secret_that_still_has_the_name_under_which_it_was_written_is_read(folder):
    used, secret = store_shared.private_folder()
    os.link(used / "secret", used / "temporary")
    assert store_shared.private_folder() == (used, secret)


def test_a_table_that_was_not_sealed_with_the_secret_is_decoded_again(store, folder):
    held = store.reader.table([0], shared=True)
    (path,) = tables(folder)
    size = path.stat().st_size
    del held
    gc.collect()
    path.write_bytes(store_shared._READY + bytes(size - len(store_shared._READY)))
    path.chmod(0o600)
    np.testing.assert_array_equal(store.reader.table([0], shared=True).flips, store.reader.table([0]).flips)


@pytest.mark.parametrize("plant", ["mode", "second name"])
def test_a_table_that_others_can_reach_is_refused(store, folder, tmp_path, plant):
    held = store.reader.table([0], shared=True)
    (path,) = tables(folder)
    if plant == "mode":
        path.chmod(0o666)
    else:
        os.link(path, folder / "another")
    with pytest.raises(UserError, match="not a file of this user's alone"):
        store.reader.table([0], shared=True)
    del held


def test_a_table_that_somebody_keeps_for_ever_is_waited_for_so_long_and_no_longer(store, folder, monkeypatch):
    monkeypatch.setattr(store_shared, "WAIT_SECONDS", 0.2)
    held = store.reader.table([0], shared=True)
    (path,) = tables(folder)
    del held
    gc.collect()
    with path.open("xb") as file:
        path.chmod(0o600)
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="has been decoding"):
            store.reader.table([0], shared=True)
