"""Labels belong to their pixels; threads end; waiting is counted."""

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from training_case import CLASSES, SIZE, colour_logits, make_store, pack_path

from repcon.distill.label_cache import Shelf
from repcon.distill.loader import Batch, Clock, Feed
from repcon.distill.windowed_label_cache import Windows
from repcon.images.pack import Pack
from repcon.labels import shared_memory as store_shared
from repcon.labels.store import LabelStore
from repcon.runtime.errors import UserError

pytest_plugins = ("training_fixtures",)
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("window", [0, 4])
def test_labels_belong_to_the_pixels(case: Path, window: int) -> None:
    """The teacher, asked again about the very pixels that a batch holds, gives the stored label."""
    pack, store = Pack.open(str(pack_path(case))), LabelStore.open(str(case / "labels.zarr"))
    feed = Feed(
        pack, store, size=SIZE, batch_size=8, epochs=4, crops_per_decode=2, mix_window=window, loader="torch", workers=1
    )
    for part in range(len(feed.passes)):
        for batch in feed.batches(part):
            for name, classes in CLASSES.items():
                ids = batch.labels[name][0].to(torch.int64)[batch.rows, 0]
                assert torch.equal(ids, colour_logits(batch.pixels, classes).argmax(1))
    feed.close()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_stream_of_the_consumers_own_waits_for_its_batch(case: Path) -> None:
    pack, store = Pack.open(str(pack_path(case))), LabelStore.open(str(case / "labels.zarr"))
    feed = Feed(pack, store, size=SIZE, batch_size=8, epochs=2, loader="torch", workers=1, device="cuda")
    own = torch.cuda.Stream()
    for part in range(len(feed.passes)):
        torch.cuda._sleep(200_000_000)  # a tenth of a second; copies on the default stream stand behind it
        with torch.cuda.stream(own):
            for batch in feed.batches(part):
                for name, classes in CLASSES.items():
                    ids = batch.labels[name][0].to(torch.int64)[batch.rows, 0]
                    assert torch.equal(ids.cpu(), colour_logits(batch.pixels.cpu(), classes).argmax(1))
    feed.close()


@pytest.fixture(scope="module")
def sharded(case: Path, tmp_path_factory: pytest.TempPathFactory) -> LabelStore:
    """The case's labels in six shards of a crop."""
    return make_store(
        tmp_path_factory.mktemp("sharded") / "labels.zarr", Pack.open(str(pack_path(case))), rows_per_shard=6
    )


MEMORY = 1000
LITTLE = MEMORY / 2**30  # the same in GiB
"""Three windows of a shard of one crop each, in bytes."""


def shown(feed: Feed, part: int, start: int = 0) -> list[tuple[int, int]]:
    """(image, crop) of everything that a pass shows, its labels compared with the slabs'."""
    return compared(feed, feed.batches(part, start))


def compared(feed: Feed, batches: Iterator[Batch]) -> list[tuple[int, int]]:
    pairs: list[tuple[int, int]] = []
    for batch in batches:
        numbers = list(zip(batch.images.tolist(), batch.crops.tolist(), strict=True))
        for crop in set(batch.crops.tolist()):
            slab = feed._store.slab(crop)
            at = [place for place, (_, number) in enumerate(numbers) if number == crop]
            for name, tables in batch.labels.items():
                for table, whole in zip(tables, slab.labels[name], strict=True):
                    wanted = whole[[numbers[place][0] for place in at]]
                    np.testing.assert_array_equal(table.numpy()[batch.rows.numpy()[at]], wanted)
        pairs += numbers
    return pairs


@pytest.mark.parametrize(("crops_per_decode", "mix_window"), [(1, 0), (2, 0), (2, 4), (4, 8)])
def test_labels_read_in_windows_belong_to_their_crops(
    case: Path, sharded: LabelStore, crops_per_decode: int, mix_window: int
) -> None:
    """With memory for a shard or two every (image, crop) comes once, with its own label, from any batch on."""
    pack = Pack.open(str(pack_path(case)))
    parts = {
        "size": SIZE, "batch_size": 8, "epochs": 4, "crops_per_decode": crops_per_decode, "mix_window": mix_window,
        "loader": "torch", "workers": 1,
    }  # fmt: skip
    feed = Feed(pack, sharded, label_memory=LITTLE, **parts)  # pyright: ignore[reportArgumentType]
    for part, passed in enumerate(feed.passes):
        pairs = shown(feed, part)
        assert sorted(pairs) == sorted((row, crop) for row in range(len(pack)) for crop in passed.crops)
        resumed = shown(feed, part, start=2)
        assert resumed == pairs[-len(resumed) :]
    feed.close()


def test_two_processes_share_the_windows_crops(case: Path, sharded: LabelStore) -> None:
    """Each (image, crop) comes to one of them, and as a whole the batches are those of one process."""
    pack = Pack.open(str(pack_path(case)))
    parts = {
        "size": SIZE,
        "batch_size": 8,
        "epochs": 1,
        "loader": "torch",
        "workers": 1,
        "label_memory": LITTLE,
    }
    alone = Feed(pack, sharded, **parts)  # pyright: ignore[reportArgumentType]
    both = [Feed(pack, sharded, rank=rank, world=2, **parts) for rank in range(2)]  # pyright: ignore[reportArgumentType]
    pairs = [pair for feed in both for pair in shown(feed, 0)]
    assert sorted(pairs) == sorted(shown(alone, 0))
    for feed in (alone, *both):
        feed.close()


def test_where_two_passes_fit_nothing_is_windowed(case: Path, sharded: LabelStore) -> None:
    pack = Pack.open(str(pack_path(case)))
    parts = {"size": SIZE, "batch_size": 8, "epochs": 1, "loader": "torch", "workers": 1}
    whole = Feed(pack, sharded, **parts)  # pyright: ignore[reportArgumentType]
    roomy = Feed(pack, sharded, label_memory=1.0, **parts)  # pyright: ignore[reportArgumentType]
    assert shown(whole, 0) == shown(roomy, 0)
    whole.close()
    roomy.close()


def test_a_crop_that_was_never_sent_to_the_loader_has_no_label(sharded: LabelStore) -> None:
    windows = Windows(sharded, ("tones",), (0,), seed=[0, 0], memory_bytes=MEMORY)
    windows.cut(np.array([1, 2]))
    with pytest.raises(RuntimeError, match="never asked for"):
        windows.of(torch.tensor([1, 3]), torch.tensor([0, 0]), torch.device("cpu"))
    windows.close()


def test_held_out_labels_stay_within_the_budget_too(case: Path, sharded: LabelStore, monkeypatch) -> None:
    """Read window by window, never as a whole crop, and the same images with the same labels."""
    parts = {"size": SIZE, "batch_size": 8, "epochs": 1, "holdout": 0.4, "loader": "torch", "workers": 1}
    pack = Pack.open(str(pack_path(case)))
    whole = Feed(pack, sharded, **parts)  # pyright: ignore[reportArgumentType]
    wanted = compared(whole, whole.held_out())
    whole.close()
    monkeypatch.setattr(LabelStore, "tables", None)
    feed = Feed(pack, sharded, label_memory=LITTLE, **parts)  # pyright: ignore[reportArgumentType]
    for _ in range(2):
        assert sorted(compared(feed, feed.held_out())) == sorted(wanted)
    assert len(wanted) == len(feed.held) and len(shown(feed, 0)) == len(feed.rows)
    feed.close()


def test_a_negative_budget_is_refused(case: Path, sharded: LabelStore) -> None:
    with pytest.raises(UserError, match="label_memory -1"):
        Feed(Pack.open(str(pack_path(case))), sharded, size=SIZE, batch_size=4, epochs=1, label_memory=-1)


def test_leaving_a_windowed_epoch_early_leaves_no_thread(case: Path, sharded: LabelStore) -> None:
    pack = Pack.open(str(pack_path(case)))
    before = threading.active_count()
    feed = Feed(pack, sharded, size=SIZE, batch_size=4, epochs=1, loader="torch", workers=1, label_memory=LITTLE)
    batches = feed.batches(0)
    next(batches)
    batches.close()
    feed.close()
    assert threading.active_count() == before


def test_windows_are_read_once_and_in_other_orders_each_epoch(case: Path, sharded: LabelStore, monkeypatch) -> None:
    read: list[int] = []
    plain = LabelStore.window

    def window(self, crops, rows, heads=None):
        read.append(int(rows[0]))
        return plain(self, crops, rows, heads)

    monkeypatch.setattr(LabelStore, "window", window)
    feed = Feed(
        Pack.open(str(pack_path(case))), sharded, size=SIZE, batch_size=8, epochs=2, loader="torch", workers=1,
        label_memory=LITTLE,
    )  # fmt: skip
    orders = []
    for part in range(2):
        read.clear()
        shown(feed, part)
        assert sorted(read) == [0, 6, 12, 18, 24, 30]
        orders.append(list(read))
    feed.close()
    assert orders[0] != orders[1]


def counted(monkeypatch: pytest.MonkeyPatch) -> tuple[list[int], list[tuple[int, ...]]]:
    """The epochs whose order was made, and the crops whose labels were read, as they are."""
    begun: list[int] = []
    read: list[tuple[int, ...]] = []
    order, tables = Feed._order, LabelStore.tables

    def ordered(self: Feed, passed, windows=None):
        begun.append(passed.epoch)
        return order(self, passed, windows)

    def decoded(self: LabelStore, crops, *given, **named):
        read.append(tuple(crops))
        return tables(self, crops, *given, **named)

    monkeypatch.setattr(Feed, "_order", ordered)
    monkeypatch.setattr(LabelStore, "tables", decoded)
    return begun, read


@pytest.mark.parametrize("label_memory", [0.0, LITTLE])
def test_a_run_begins_the_next_pass_before_it_is_asked_for(
    case: Path, sharded: LabelStore, monkeypatch: pytest.MonkeyPatch, label_memory: float
) -> None:
    """Unless labels are read in windows. Its passes are those that `batches` gives one by one, from any place on."""
    feed = Feed(
        Pack.open(str(pack_path(case))), sharded, size=SIZE, batch_size=8, epochs=3, loader="torch", workers=1,
        label_memory=label_memory,
    )  # fmt: skip
    wanted = [shown(feed, part) for part in range(3)]
    before = threading.active_count()
    begun, read = counted(monkeypatch)
    found = []
    for part, batches in feed.run():
        found.append(compared(feed, batches))
        expected = [0, 1, 2][: part + 1 if label_memory else part + 2]
        for _ in range(5 if label_memory else 100):
            if not label_memory and begun == expected:
                break
            time.sleep(0.02)
        assert begun == expected
    assert found == wanted and len(read) == (0 if label_memory else 3)
    assert [compared(feed, batches) for _, batches in feed.run(1, 2)] == [shown(feed, 1, 2), wanted[2]]
    assert threading.active_count() == before
    feed.close()


def test_a_pass_that_is_left_early_ends_the_run_loudly(case: Path) -> None:
    store = LabelStore.open(str(case / "labels.zarr"))
    feed = Feed(Pack.open(str(pack_path(case))), store, size=SIZE, batch_size=8, epochs=2, loader="torch", workers=1)
    passes = feed.run()
    next(next(passes)[1])
    with pytest.raises(RuntimeError, match="pass 0 was left before its last batch"):
        next(passes)
    feed.close()
    with pytest.raises(RuntimeError, match=r"shutdown|closed"):
        next(feed.batches(1))


def test_passes_of_few_batches_hold_no_third_ones_labels(case: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = LabelStore.open(str(case / "labels.zarr"))
    feed = Feed(Pack.open(str(pack_path(case))), store, size=SIZE, batch_size=16, epochs=4, loader="torch", workers=1)
    assert max(feed.lengths) <= 2
    begun, read = counted(monkeypatch)
    for part, batches in feed.run():
        next(batches)
        time.sleep(0.1)
        assert len(begun) == part + 1 and len(read) <= part + 2
        assert len(list(batches)) == feed.lengths[part] - 1
    feed.close()
    assert len(read) == 4


def test_a_feed_on_a_cpu_asks_nothing_of_cuda(case: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.cuda.stream fails on Apple's processors, even where there is none to go to."""
    monkeypatch.setattr(torch.cuda, "stream", None)
    store = LabelStore.open(str(case / "labels.zarr"))
    feed = Feed(
        Pack.open(str(pack_path(case))),
        store,
        size=SIZE,
        batch_size=8,
        epochs=1,
        holdout=0.3,
        loader="torch",
        workers=1,
    )
    assert list(feed.batches(0)) and list(feed.held_out())
    feed.close()


def test_labels_are_read_again_after_a_failure(case: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shelf = Shelf(LabelStore.open(str(case / "labels.zarr")), ("tones",), torch.device("cpu"), shared=False)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="network"):
        patch.setattr(Shelf, "read", lambda self, crops: (_ for _ in ()).throw(OSError("network")))
        shelf.get((0,))
    assert shelf.get((0,)).crops == (0,)
    shelf.close()


def test_a_script_that_ends_in_a_pass_ends_as_usual(case: Path) -> None:
    """The thread that prepares batches must not be in compiled code when the interpreter goes."""
    script = (
        "import sys; from repcon import Feed, LabelStore, Pack\n"
        "feed = Feed(Pack.open(sys.argv[1]), LabelStore.open(sys.argv[2]), size=64, batch_size=8, epochs=4, "
        "crops_per_decode=2, mix_window=4, loader='reference', workers=1)\n"
        "passes = feed.run(); list(next(passes)[1]); print('done')"
    )
    for _ in range(3):
        places = [str(pack_path(case)), str(case / "labels.zarr")]
        done = subprocess.run([sys.executable, "-c", script, *places], capture_output=True, text=True)
        assert (done.returncode, done.stdout.strip()) == (0, "done"), done.stderr


def test_leaving_an_epoch_early_leaves_no_thread(case: Path) -> None:
    pack, store = Pack.open(str(pack_path(case))), LabelStore.open(str(case / "labels.zarr"))
    store.slab(0)  # The store's own threads stay for the next slab.
    before = set(threading.enumerate())  # One of an earlier test may end meanwhile.
    feed = Feed(pack, store, size=SIZE, batch_size=4, epochs=1, loader="torch", workers=1)
    next(iter(feed.batches(0)))
    feed.close()
    assert not set(threading.enumerate()) - before


def test_the_next_labels_are_read_while_the_last_are_used(case: Path) -> None:
    store = LabelStore.open(str(case / "labels.zarr"))
    shelf = Shelf(store, ("tones",), torch.device("cpu"), shared=False)
    first = shelf.get((1, 0))
    shelf.fetch((2, 3))
    assert shelf.get((1, 0)) is first
    labels = shelf.get((2, 3))
    shelf.close()
    images, crops = torch.tensor([5, 0, 5]), torch.tensor([3, 2, 2])
    rows, tables = labels.of(images, crops, torch.device("cpu"))
    for row, image, crop in zip(rows, images, crops, strict=True):
        slab = store.slab(int(crop), ("tones",))
        for table, wanted in zip(tables["tones"], slab.labels["tones"], strict=True):
            np.testing.assert_array_equal(table.numpy()[int(row)], wanted[int(image)])


def test_a_part_of_the_labels_answers_for_its_images(case: Path) -> None:
    shelf = Shelf(LabelStore.open(str(case / "labels.zarr")), ("tones",), torch.device("cpu"), shared=False)
    whole = shelf.get((0,))
    part = whole.only(np.array([3, 11, 20]))
    shelf.close()
    rows, tables = part.of(torch.tensor([20, 3]), torch.tensor([0, 0]), torch.device("cpu"))
    for table, wanted in zip(tables["tones"], whole.heads["tones"], strict=True):
        assert len(table) == 3
        np.testing.assert_array_equal(table.numpy()[rows.numpy()], wanted.numpy()[[20, 3]])


def test_processes_of_a_machine_share_one_copy(
    case: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two ranks read the same memory; where there is none to share, each reads its own and says so."""
    monkeypatch.setattr(store_shared, "FOLDER", tmp_path)
    pack, store = Pack.open(str(pack_path(case))), LabelStore.open(str(case / "labels.zarr"))
    parts = {"size": SIZE, "batch_size": 8, "epochs": 1, "holdout": 0.1, "loader": "torch", "workers": 1, "world": 2}
    feeds = [Feed(pack, store, rank=rank, **parts) for rank in range(2)]  # pyright: ignore[reportArgumentType]
    first, second = (next(feed.batches(0)) for feed in feeds)
    assert len(list(tmp_path.iterdir())) == 1
    first.labels["tones"][0][0] = 2
    assert second.labels["tones"][0][0].tolist() == [2, 2, 2]
    for feed in feeds:
        feed.close()

    monkeypatch.setattr(store_shared, "FOLDER", tmp_path / "none")
    alone = Feed(pack, store, rank=0, **parts)  # pyright: ignore[reportArgumentType]
    batch = next(alone.batches(0))
    assert "labels: not shared, each process reads its own" in capsys.readouterr().out
    assert torch.equal(batch.images, first.images) and len(list(alone.held_out())) > 0
    alone.close()


def test_the_clock_tells_waiting_from_work() -> None:
    def slow() -> Iterator[int]:
        for number in range(3):
            time.sleep(0.02)
            yield number

    clock = Clock()
    for number in clock.timed(slow()):
        time.sleep(0.05)
        if number == 1:
            data, step = clock.take()
            assert 0.04 <= data < 0.09 and 0.1 <= step < 0.25
    data, step = clock.take()
    assert 0.02 <= data < 0.06 and 0.05 <= step < 0.15
