import gc
import multiprocessing
import os
import signal
import threading

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


def take(url: str, folder, pipe) -> None:
    """A training process: maps the tables, says what it sees, and waits to be told to go."""
    store_shared.FOLDER = folder
    store = LabelStore.open(url)
    decoded = []
    read = store._reader.read
    store._reader.read = lambda *arguments: decoded.append(1) or read(*arguments)  # pyright: ignore
    tables = store.tables([0, 2], shared=True)
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
    shared, private = store.tables([1, 3], shared=True), store.tables([1, 3])
    for name, pair in private.labels.items():
        for one, other in zip(pair, shared.labels[name], strict=True):
            np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(shared.boxes, private.boxes)
    np.testing.assert_array_equal(shared.flips, private.flips)


def test_a_second_reader_maps_the_first_ones_copy(store, folder, monkeypatch):
    first = store.tables([0], shared=True)
    monkeypatch.setattr(store._reader, "read", lambda *arguments: pytest.fail("decoded twice"))
    second = store.tables([0], shared=True)
    assert len(list(folder.iterdir())) == 1
    first.flips[0] = 7
    assert second.flips[0] == 7
    del first
    gc.collect()
    assert len(list(folder.iterdir())) == 1
    flips = second.flips
    del second
    gc.collect()
    assert list(folder.iterdir()) == [] and flips[0] == 7  # an array outlives its file


def test_processes_share_one_copy_and_the_last_deletes_it(store, folder):
    processes = [start(store, folder) for _ in range(2)]
    answers = [pipe.recv() for _, pipe in processes]
    assert sorted(decoded for decoded, _ in answers) == [0, 2]  # one process decoded the two crops, the other none
    assert len({total for _, total in answers}) == 1 and len(list(folder.iterdir())) == 1
    for process, pipe in processes:
        pipe.send("go")
        assert pipe.recv() == "let go"
        process.join()
    assert list(folder.iterdir()) == []


def test_two_that_see_the_file_incomplete_at_once_both_get_it(store, monkeypatch):
    """Both look before either has locked it for itself; the one that comes second must not wait for the first to go."""
    plain, together, looked = os.pread, threading.Barrier(2, timeout=20), set()
    decoded, taken = [], []
    read = store._reader.read
    monkeypatch.setattr(store._reader, "read", lambda *arguments: decoded.append(1) or read(*arguments))

    def pread(descriptor: int, length: int, offset: int) -> bytes:
        data = plain(descriptor, length, offset)
        if length == len(store_shared._READY) and threading.get_ident() not in looked:
            looked.add(threading.get_ident())
            together.wait()
        return data

    monkeypatch.setattr(os, "pread", pread)
    threads = [
        threading.Thread(target=lambda: taken.append(store.tables([0], shared=True)), daemon=True) for _ in range(2)
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
    assert len(list(folder.iterdir())) == 1
    other = store.tables([1], shared=True)
    assert len(list(folder.iterdir())) == 1 and other.crops == (1,)


def test_a_copy_that_was_never_completed_is_decoded_again(store, folder, monkeypatch):
    def broken(*arguments):
        raise UserError("the disk came off")

    monkeypatch.setattr(store._reader, "read", broken)
    with pytest.raises(UserError, match="came off"):
        store.tables([0], shared=True)
    monkeypatch.undo()
    assert list(folder.iterdir()) == []


def test_no_room_is_told(store, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UserError, match="has no room for"):
        store.tables([0], shared=True)


def test_another_store_gets_another_copy(store, folder, tmp_path):
    other = fill(LabelStore.create(str(tmp_path / "other.zarr"), spec()))
    held = [store.tables([0], shared=True), other.tables([0], shared=True), store.tables([0], ["wide"], shared=True)]
    assert len(list(folder.iterdir())) == len(held) == 3
