import multiprocessing
import os
import threading
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from store_builder import fill, spec

from repcon.labels.reader import ranges, window_plan
from repcon.labels.store import LabelStore
from repcon.runtime.errors import UserError
from repcon.runtime.prefetch import map_ahead


@pytest.fixture
def store(tmp_path) -> LabelStore:
    return fill(LabelStore.create(str(tmp_path / "labels.zarr"), spec(images=200, rows_per_shard=30)))


def same(left, right) -> None:
    np.testing.assert_array_equal(left.boxes, right.boxes)
    np.testing.assert_array_equal(left.flips, right.flips)
    assert left.labels.keys() == right.labels.keys()
    for name, pair in left.labels.items():
        for one, other in zip(pair, right.labels[name], strict=True):
            np.testing.assert_array_equal(one, other)


def test_tables_are_slabs_in_one_array(store):
    tables = store.reader.table([3, 1], ["wide"])
    assert tables.crops == (3, 1) and tables.labels["wide"][0].shape == (400, 5)
    for place, crop in enumerate(tables.crops):
        same(tables.of_crop(place), store.reader.crop_labels(crop, ["wide"]))


def test_the_next_is_done_while_the_last_is_used():
    started = []

    def work(item: int) -> int:
        started.append(item)
        return item

    done = map_ahead(work, range(4))
    assert next(done) == 0
    deadline = time.monotonic() + 5
    while started != [0, 1] and time.monotonic() < deadline:
        time.sleep(0.01)
    assert started == [0, 1]
    assert list(done) == [1, 2, 3] and started == [0, 1, 2, 3]
    assert list(map_ahead(work, [])) == []


def test_an_error_ahead_is_raised_in_its_turn():
    done = map_ahead(lambda item: 1 // item, [2, 1, 0, 5])
    assert [next(done), next(done)] == [0, 1]
    with pytest.raises(ZeroDivisionError):
        next(done)


def test_stopping_early_leaves_no_thread(store):
    store.reader.crop_labels(0)  # The reader's own threads stay for the next slab.
    before = threading.active_count()
    slabs = store.reader.iter_crop_labels(range(4))
    next(slabs)
    slabs.close()
    assert threading.active_count() <= before


def test_a_forked_process_reads_with_threads_of_its_own(store):
    expected = store.reader.crop_labels(0).boxes

    def read() -> None:
        os._exit(0 if np.array_equal(store.reader.crop_labels(0).boxes, expected) else 1)

    child = multiprocessing.get_context("fork").Process(target=read)
    child.start()
    child.join(30)
    assert child.exitcode == 0, "the child waits for threads that it does not have"


@given(st.integers(1, 500), st.integers(1, 100), st.integers(1, 20), st.integers(0, 10_000), st.integers(0, 5))
def test_windows_hold_every_row_once_within_the_budget(images, rows_per_shard, bytes_per_row, memory, seed):
    plan = list(window_plan(images, rows_per_shard, bytes_per_row, memory, seed))
    assert sorted(np.concatenate(plan).tolist()) == list(range(images))
    largest = max(len(window) for window in plan)
    assert largest <= rows_per_shard or 2 * largest * bytes_per_row <= memory
    assert all((np.diff(window) > 0).all() for window in plan)
    again = list(window_plan(images, rows_per_shard, bytes_per_row, memory, seed))
    assert all(np.array_equal(one, other) for one, other in zip(plan, again, strict=True))


def test_windows_read_what_the_slab_holds(store):
    whole = store.reader.crop_labels(2)
    shard = 30 * store.reader.crop_labels_bytes() // 200
    plan = list(store.reader.window_plan([2], seed=1, memory_bytes=2 * 3 * shard + 1000))
    assert [len(rows) for rows in plan] in ([90, 90, 20], [90, 80, 30], [80, 90, 30])
    assert plan[0][0] != 0 or plan[0][-1] != 89  # shuffled by shards
    for rows in plan:
        window = store.reader.window([2], rows)
        np.testing.assert_array_equal(window.boxes, whole.boxes[rows])
        for name, (ids, logp) in window.labels.items():
            np.testing.assert_array_equal(ids, whole.labels[name][0][rows])
            np.testing.assert_array_equal(logp, whole.labels[name][1][rows])


def test_where_two_slabs_fit_there_is_one_window(store):
    (rows,) = store.reader.window_plan([0], seed=1, memory_bytes=2 * store.reader.crop_labels_bytes())
    np.testing.assert_array_equal(rows, np.arange(200))


def test_an_unfinished_crop_is_refused_before_anything_is_read(tmp_path):
    store = LabelStore.create(str(tmp_path / "s"), spec())
    for read in (
        lambda: store.reader.crop_labels(0),
        lambda: store.reader.table([0]),
        lambda: list(store.reader.window_plan([0], seed=0, memory_bytes=1)),
    ):
        with pytest.raises(UserError, match="never finished"):
            read()


@given(st.sets(st.integers(0, 30)))
def test_ranges_are_the_rows(rows):
    wanted = sorted(rows)
    assert [row for run in ranges(np.array(wanted, np.int64)) for row in run] == wanted
