"""The two bounded queues: order, bounds, errors, and leaving early."""

import threading
import time

import pytest

from repcon.runtime.prefetch import BackgroundWriter, Prefetcher, map_ahead


def test_ahead_keeps_order_and_its_bound():
    drawn = []

    def source():
        for number in range(20):
            drawn.append(number)
            yield number

    seen = []
    with Prefetcher(source(), 2) as items:
        for item in items:
            seen.append(item)
            time.sleep(0.002)
            assert len(drawn) <= len(seen) + 3  # Two in the queue, one in the thread's hand.
    assert seen == list(range(20))


def test_ahead_raises_the_source_s_error_where_it_is_consumed():
    def source():
        yield 1
        raise OSError("disk")

    seen = []
    with pytest.raises(OSError, match="disk"), Prefetcher(source(), 2) as items:
        seen += items
    assert seen == [1]


def test_leaving_ahead_early_closes_the_source_and_its_thread():
    closed = threading.Event()

    def source():
        try:
            while True:
                yield 0
        finally:
            closed.set()

    with Prefetcher(source(), 1) as items:
        for _ in items:
            break
    assert closed.is_set()
    assert not [thread for thread in threading.enumerate() if thread.name == "repcon-prefetch"]


def test_ahead_measures_how_long_its_consumer_waited():
    def slow():
        time.sleep(0.1)
        yield 1

    with Prefetcher(slow(), 1) as items:
        assert list(items) == [1]
    assert items.waited_seconds >= 0.09


def test_map_ahead_keeps_order_and_its_bound():
    started, gate = [], threading.Event()

    def work(item: int) -> int:
        started.append(item)
        if item == 0:
            gate.wait(5)
        return item

    threading.Timer(0.1, gate.set).start()
    results = map_ahead(work, range(12), num_workers=3, depth=4)
    assert next(results) == 0
    deadline = time.monotonic() + 5
    while len(started) < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert sorted(started) == [0, 1, 2, 3, 4]
    assert list(results) == list(range(1, 12)) and sorted(started) == list(range(12))
    assert list(map_ahead(work, [])) == []


def test_map_ahead_raises_an_error_in_its_turn():
    results = map_ahead(lambda item: 1 // item, [2, 1, 0, 5])
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(ZeroDivisionError):
        next(results)


def test_closing_map_ahead_cancels_what_has_not_begun_and_leaves_no_thread():
    started = []

    def work(item: int) -> int:
        started.append(item)
        time.sleep(0.02)
        return item

    results = map_ahead(work, range(100), depth=50)
    assert next(results) == 0
    results.close()
    assert len(started) < 10
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("repcon-prefetch")]


def test_behind_runs_jobs_in_order_and_finishes_them():
    seen = []
    with BackgroundWriter(1) as jobs:
        for number in range(5):
            jobs.put(lambda number=number: seen.append(number))
    assert seen == [0, 1, 2, 3, 4]


def test_behind_raises_at_the_next_put_or_at_the_end():
    def fail():
        raise ValueError("full")

    with pytest.raises(ValueError, match="full"), BackgroundWriter(1) as jobs:
        jobs.put(fail)
        time.sleep(0.05)
        for _ in range(3):
            jobs.put(lambda: None)
    with pytest.raises(ValueError, match="full"), BackgroundWriter(1) as jobs:
        jobs.put(fail)


@pytest.mark.parametrize("reason", [KeyboardInterrupt, RuntimeError])
def test_behind_finishes_what_was_put_whatever_ends_the_block(reason):
    seen, gate = [], threading.Event()
    with pytest.raises(reason), BackgroundWriter(2) as jobs:
        jobs.put(gate.wait)
        jobs.put(lambda: seen.append("kept"))
        threading.Timer(0.1, gate.set).start()
        raise reason
    assert seen == ["kept"]


def test_behind_drops_what_follows_a_job_that_failed():
    seen = []
    with pytest.raises(ZeroDivisionError), BackgroundWriter(2) as jobs:
        jobs.put(lambda: 1 / 0)
        jobs.put(lambda: seen.append("dropped"))
    assert seen == []


def test_behind_measures_how_long_its_producer_waited():
    with BackgroundWriter(1) as jobs:
        for _ in range(3):
            jobs.put(lambda: time.sleep(0.1))
    assert jobs.waited_seconds >= 0.08
