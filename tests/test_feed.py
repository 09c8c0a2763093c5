"""feed.py and labels.py: labels belong to their pixels; threads end; waiting is counted."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from training_case import CLASSES, SIZE, colour_logits, pack_path

from repcon.errors import UserError
from repcon.images import Pack
from repcon.storage import shared as store_shared
from repcon.store import LabelStore
from repcon.training.feed import Clock, Feed, ahead
from repcon.training.labels import Shelf

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


def test_leaving_an_epoch_early_leaves_no_thread(case: Path) -> None:
    pack, store = Pack.open(str(pack_path(case))), LabelStore.open(str(case / "labels.zarr"))
    before = threading.active_count()
    feed = Feed(pack, store, size=SIZE, batch_size=4, epochs=1, loader="torch", workers=1)
    next(iter(feed.batches(0)))
    feed.close()
    assert threading.active_count() == before


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


def test_an_error_in_the_thread_is_raised_here() -> None:
    def source() -> Iterator[int]:
        yield 1
        raise UserError("the pack is gone")

    items = ahead(source)
    assert next(items) == 1
    with pytest.raises(UserError, match="gone"):
        next(items)


def test_a_source_that_cannot_open_is_an_error_too() -> None:
    def source() -> Iterator[int]:
        raise UserError("no such crop")

    with pytest.raises(UserError, match="no such crop"):
        list(ahead(source))


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
