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

from repcon.distill.label_cache import LabelCache
from repcon.distill.loader import Batch, DistillLoader
from repcon.distill.metrics import StepTimer
from repcon.distill.windowed_label_cache import WindowedLabelCache
from repcon.images.pack import ImagePack
from repcon.labels import shared_memory as store_shared
from repcon.labels.reader import LabelReader
from repcon.labels.store import LabelStore
from repcon.runtime.errors import UserError

pytest_plugins = ("training_fixtures",)


@pytest.mark.parametrize("window", [0, 4])
def test_labels_belong_to_the_pixels(case: Path, window: int) -> None:
    """The teacher, asked again about the very pixels that a batch holds, gives the stored label."""
    pack, store = ImagePack.open(str(pack_path(case))), LabelStore.open(str(case / "labels.zarr"))
    loader = DistillLoader(
        pack,
        store,
        size=SIZE,
        batch_size=8,
        epochs=4,
        crops_per_decode=2,
        mix_window=window,
        loader="torch",
        num_workers=1,
    )
    for part in range(len(loader.epoch_groups)):
        for batch in loader.batches(part):
            for name, classes in CLASSES.items():
                ids = batch.labels[name][0].to(torch.int64)[batch.rows, 0]
                assert torch.equal(ids, colour_logits(batch.pixels, classes).argmax(1))
    loader.close()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_stream_of_the_consumers_own_waits_for_its_batch(case: Path) -> None:
    pack, store = ImagePack.open(str(pack_path(case))), LabelStore.open(str(case / "labels.zarr"))
    loader = DistillLoader(pack, store, size=SIZE, batch_size=8, epochs=2, loader="torch", num_workers=1, device="cuda")
    own = torch.cuda.Stream()
    for part in range(len(loader.epoch_groups)):
        torch.cuda._sleep(200_000_000)  # a tenth of a second; copies on the default stream stand behind it
        with torch.cuda.stream(own):
            for batch in loader.batches(part):
                for name, classes in CLASSES.items():
                    ids = batch.labels[name][0].to(torch.int64)[batch.rows, 0]
                    assert torch.equal(ids.cpu(), colour_logits(batch.pixels.cpu(), classes).argmax(1))
    loader.close()


@pytest.fixture(scope="module")
def sharded(case: Path, tmp_path_factory: pytest.TempPathFactory) -> LabelStore:
    """The case's labels in six shards of a crop."""
    return make_store(
        tmp_path_factory.mktemp("sharded") / "labels.zarr", ImagePack.open(str(pack_path(case))), rows_per_shard=6
    )


MEMORY = 1000
LITTLE = MEMORY / 2**30  # the same in GiB
"""Three windows of a shard of one crop each, in bytes."""
read_table = LabelReader.table
"""Reads without being counted, or refused, where a test replaces the method."""


def shown(loader: DistillLoader, part: int, start: int = 0) -> list[tuple[int, int]]:
    """(image, crop) of everything that a pass shows, its labels compared with the slabs'."""
    return compared(loader, loader.batches(part, start))


def compared(loader: DistillLoader, batches: Iterator[Batch]) -> list[tuple[int, int]]:
    pairs: list[tuple[int, int]] = []
    for batch in batches:
        numbers = list(zip(batch.images.tolist(), batch.crops.tolist(), strict=True))
        for crop in set(batch.crops.tolist()):
            crop_labels = read_table(loader._store.reader, [crop], None)
            at = [place for place, (_, number) in enumerate(numbers) if number == crop]
            for name, tables in batch.labels.items():
                for table, whole in zip(tables, crop_labels.labels[name], strict=True):
                    wanted = whole[[numbers[place][0] for place in at]]
                    np.testing.assert_array_equal(table.numpy()[batch.rows.numpy()[at]], wanted)
        pairs += numbers
    return pairs


@pytest.mark.parametrize(("crops_per_decode", "mix_window"), [(1, 0), (2, 0), (2, 4), (4, 8)])
def test_labels_read_in_windows_belong_to_their_crops(
    case: Path, sharded: LabelStore, crops_per_decode: int, mix_window: int
) -> None:
    """With memory for a shard or two every (image, crop) comes once, with its own label, from any batch on."""
    pack = ImagePack.open(str(pack_path(case)))
    parts = {
        "size": SIZE, "batch_size": 8, "epochs": 4, "crops_per_decode": crops_per_decode, "mix_window": mix_window,
        "loader": "torch", "num_workers": 1,
    }  # fmt: skip
    loader = DistillLoader(pack, sharded, label_cache_gib=LITTLE, **parts)  # pyright: ignore[reportArgumentType]
    for part, passed in enumerate(loader.epoch_groups):
        pairs = shown(loader, part)
        assert sorted(pairs) == sorted((row, crop) for row in range(len(pack)) for crop in passed.crops)
        resumed = shown(loader, part, start=2)
        assert resumed == pairs[-len(resumed) :]
    loader.close()


def test_two_processes_share_the_windows_crops(case: Path, sharded: LabelStore) -> None:
    """Each (image, crop) comes to one of them, and as a whole the batches are those of one process."""
    pack = ImagePack.open(str(pack_path(case)))
    parts = {
        "size": SIZE,
        "batch_size": 8,
        "epochs": 1,
        "loader": "torch",
        "num_workers": 1,
        "label_cache_gib": LITTLE,
    }
    alone = DistillLoader(pack, sharded, **parts)  # pyright: ignore[reportArgumentType]
    both = [DistillLoader(pack, sharded, rank=rank, world_size=2, **parts) for rank in range(2)]  # pyright: ignore[reportArgumentType]
    pairs = [pair for loader in both for pair in shown(loader, 0)]
    assert sorted(pairs) == sorted(shown(alone, 0))
    for loader in (alone, *both):
        loader.close()


def test_where_two_passes_fit_nothing_is_windowed(case: Path, sharded: LabelStore) -> None:
    pack = ImagePack.open(str(pack_path(case)))
    parts = {"size": SIZE, "batch_size": 8, "epochs": 1, "loader": "torch", "num_workers": 1}
    whole = DistillLoader(pack, sharded, **parts)  # pyright: ignore[reportArgumentType]
    roomy = DistillLoader(pack, sharded, label_cache_gib=1.0, **parts)  # pyright: ignore[reportArgumentType]
    assert shown(whole, 0) == shown(roomy, 0)
    whole.close()
    roomy.close()


def test_a_crop_that_was_never_sent_to_the_loader_has_no_label(sharded: LabelStore) -> None:
    windows = WindowedLabelCache(sharded, ("tones",), (0,), seed=[0, 0], memory_bytes=MEMORY)
    windows.crop_boxes(np.array([1, 2]))
    with pytest.raises(RuntimeError, match="have no labels: call crop_boxes"):
        windows.gather(torch.tensor([1, 3]), torch.tensor([0, 0]), torch.device("cpu"))
    windows.close()


def test_held_out_labels_stay_within_the_budget_too(case: Path, sharded: LabelStore, monkeypatch) -> None:
    """Read window by window, never as a whole crop, and the same images with the same labels."""
    parts = {"size": SIZE, "batch_size": 8, "epochs": 1, "val_fraction": 0.4, "loader": "torch", "num_workers": 1}
    pack = ImagePack.open(str(pack_path(case)))
    whole = DistillLoader(pack, sharded, **parts)  # pyright: ignore[reportArgumentType]
    wanted = compared(whole, whole.validation_batches())
    whole.close()
    monkeypatch.setattr(LabelReader, "table", None)
    loader = DistillLoader(pack, sharded, label_cache_gib=LITTLE, **parts)  # pyright: ignore[reportArgumentType]
    for _ in range(2):
        assert sorted(compared(loader, loader.validation_batches())) == sorted(wanted)
    assert len(wanted) == len(loader.validation_rows) and len(shown(loader, 0)) == len(loader.train_rows)
    loader.close()


def test_a_negative_budget_is_refused(case: Path, sharded: LabelStore) -> None:
    with pytest.raises(UserError, match="label_cache_gib -1"):
        DistillLoader(
            ImagePack.open(str(pack_path(case))), sharded, size=SIZE, batch_size=4, epochs=1, label_cache_gib=-1
        )


def test_leaving_a_windowed_epoch_early_leaves_no_thread(case: Path, sharded: LabelStore) -> None:
    pack = ImagePack.open(str(pack_path(case)))
    before = threading.active_count()
    loader = DistillLoader(
        pack, sharded, size=SIZE, batch_size=4, epochs=1, loader="torch", num_workers=1, label_cache_gib=LITTLE
    )
    batches = loader.batches(0)
    next(batches)
    batches.close()
    loader.close()
    assert threading.active_count() == before


def test_windows_are_read_once_and_in_other_orders_each_epoch(case: Path, sharded: LabelStore, monkeypatch) -> None:
    read: list[int] = []
    plain = LabelReader.window

    def window(self, crops, rows, heads=None):
        read.append(int(rows[0]))
        return plain(self, crops, rows, heads)

    monkeypatch.setattr(LabelReader, "window", window)
    loader = DistillLoader(
        ImagePack.open(str(pack_path(case))), sharded, size=SIZE, batch_size=8, epochs=2, loader="torch", num_workers=1,
        label_cache_gib=LITTLE,
    )  # fmt: skip
    orders = []
    for part in range(2):
        read.clear()
        shown(loader, part)
        assert sorted(read) == [0, 6, 12, 18, 24, 30]
        orders.append(list(read))
    loader.close()
    assert orders[0] != orders[1]


def counted(monkeypatch: pytest.MonkeyPatch) -> tuple[list[int], list[tuple[int, ...]]]:
    """The epochs whose order was made, and the crops whose labels were read, as they are."""
    begun: list[int] = []
    read: list[tuple[int, ...]] = []
    order, table = DistillLoader._sampler, LabelReader.table

    def ordered(self: DistillLoader, passed, windows=None):
        begun.append(passed.epoch)
        return order(self, passed, windows)

    def decoded(self: LabelReader, crops, *given, **named):
        read.append(tuple(crops))
        return table(self, crops, *given, **named)

    monkeypatch.setattr(DistillLoader, "_sampler", ordered)
    monkeypatch.setattr(LabelReader, "table", decoded)
    return begun, read


@pytest.mark.parametrize("label_cache_gib", [0.0, LITTLE])
def test_a_run_begins_the_next_pass_before_it_is_asked_for(
    case: Path, sharded: LabelStore, monkeypatch: pytest.MonkeyPatch, label_cache_gib: float
) -> None:
    """Unless labels are read in windows. Its passes are those that `batches` gives one by one, from any place on."""
    loader = DistillLoader(
        ImagePack.open(str(pack_path(case))), sharded, size=SIZE, batch_size=8, epochs=3, loader="torch", num_workers=1,
        label_cache_gib=label_cache_gib,
    )  # fmt: skip
    wanted = [shown(loader, part) for part in range(3)]
    before = threading.active_count()
    begun, read = counted(monkeypatch)
    found = []
    for part, batches in loader.groups():
        found.append(compared(loader, batches))
        expected = [0, 1, 2][: part + 1 if label_cache_gib else part + 2]
        for _ in range(5 if label_cache_gib else 100):
            if not label_cache_gib and begun == expected:
                break
            time.sleep(0.02)
        assert begun == expected
    assert found == wanted and len(read) == (0 if label_cache_gib else 3)
    assert [compared(loader, batches) for _, batches in loader.groups(1, 2)] == [shown(loader, 1, 2), wanted[2]]
    assert threading.active_count() == before
    loader.close()


def test_a_pass_that_is_left_early_ends_the_run_loudly(case: Path) -> None:
    store = LabelStore.open(str(case / "labels.zarr"))
    loader = DistillLoader(
        ImagePack.open(str(pack_path(case))), store, size=SIZE, batch_size=8, epochs=2, loader="torch", num_workers=1
    )
    epoch_groups = loader.groups()
    next(next(epoch_groups)[1])
    with pytest.raises(RuntimeError, match="epoch group 0 was left before its last batch"):
        next(epoch_groups)
    loader.close()
    with pytest.raises(RuntimeError, match=r"shutdown|closed"):
        next(loader.batches(1))


def test_passes_of_few_batches_hold_no_third_ones_labels(case: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = LabelStore.open(str(case / "labels.zarr"))
    loader = DistillLoader(
        ImagePack.open(str(pack_path(case))), store, size=SIZE, batch_size=16, epochs=4, loader="torch", num_workers=1
    )
    assert max(loader.group_steps) <= 2
    begun, read = counted(monkeypatch)
    for part, batches in loader.groups():
        next(batches)
        time.sleep(0.1)
        assert len(begun) == part + 1 and len(read) <= part + 2
        assert len(list(batches)) == loader.group_steps[part] - 1
    loader.close()
    assert len(read) == 4


def test_a_feed_on_a_cpu_asks_nothing_of_cuda(case: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.cuda.stream fails on Apple's processors, even where there is none to go to."""
    monkeypatch.setattr(torch.cuda, "stream", None)
    store = LabelStore.open(str(case / "labels.zarr"))
    loader = DistillLoader(
        ImagePack.open(str(pack_path(case))),
        store,
        size=SIZE,
        batch_size=8,
        epochs=1,
        val_fraction=0.3,
        loader="torch",
        num_workers=1,
    )
    assert list(loader.batches(0)) and list(loader.validation_batches())
    loader.close()


def test_labels_are_read_again_after_a_failure(case: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    label_cache = LabelCache(LabelStore.open(str(case / "labels.zarr")), ("tones",), torch.device("cpu"), shared=False)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="network"):
        patch.setattr(LabelCache, "read", lambda self, crops: (_ for _ in ()).throw(OSError("network")))
        label_cache.get((0,))
    assert label_cache.get((0,)).crops == (0,)
    label_cache.close()


def test_a_script_that_ends_in_a_pass_ends_as_usual(case: Path) -> None:
    """The thread that prepares batches must not be in compiled code when the interpreter goes."""
    script = (
        "import sys; from repcon import DistillLoader, ImagePack, LabelStore\n"
        "loader = DistillLoader(ImagePack.open(sys.argv[1]), LabelStore.open(sys.argv[2]), size=64, batch_size=8, "
        "epochs=4, crops_per_decode=2, mix_window=4, loader='reference', num_workers=1)\n"
        "groups = loader.groups(); list(next(groups)[1]); print('done')"
    )
    for _ in range(3):
        places = [str(pack_path(case)), str(case / "labels.zarr")]
        done = subprocess.run([sys.executable, "-c", script, *places], capture_output=True, text=True)
        assert (done.returncode, done.stdout.strip()) == (0, "done"), done.stderr


def test_leaving_an_epoch_early_leaves_no_thread(case: Path) -> None:
    pack, store = ImagePack.open(str(pack_path(case))), LabelStore.open(str(case / "labels.zarr"))
    store.reader.crop_labels(0)  # The store's own threads stay for the next slab.
    before = set(threading.enumerate())  # One of an earlier test may end meanwhile.
    loader = DistillLoader(pack, store, size=SIZE, batch_size=4, epochs=1, loader="torch", num_workers=1)
    next(iter(loader.batches(0)))
    loader.close()
    assert not set(threading.enumerate()) - before


def test_the_next_labels_are_read_while_the_last_are_used(case: Path) -> None:
    store = LabelStore.open(str(case / "labels.zarr"))
    label_cache = LabelCache(store, ("tones",), torch.device("cpu"), shared=False)
    first = label_cache.get((1, 0))
    label_cache.prefetch((2, 3))
    assert label_cache.get((1, 0)) is first
    labels = label_cache.get((2, 3))
    label_cache.close()
    images, crops = torch.tensor([5, 0, 5]), torch.tensor([3, 2, 2])
    rows, tables = labels.gather(images, crops, torch.device("cpu"))
    for row, image, crop in zip(rows, images, crops, strict=True):
        crop_labels = store.reader.crop_labels(int(crop), ("tones",))
        for table, wanted in zip(tables["tones"], crop_labels.labels["tones"], strict=True):
            np.testing.assert_array_equal(table.numpy()[int(row)], wanted[int(image)])


def test_a_part_of_the_labels_answers_for_its_images(case: Path) -> None:
    label_cache = LabelCache(LabelStore.open(str(case / "labels.zarr")), ("tones",), torch.device("cpu"), shared=False)
    whole = label_cache.get((0,))
    part = whole.subset(np.array([3, 11, 20]))
    label_cache.close()
    rows, tables = part.gather(torch.tensor([20, 3]), torch.tensor([0, 0]), torch.device("cpu"))
    for table, wanted in zip(tables["tones"], whole.heads["tones"], strict=True):
        assert len(table) == 3
        np.testing.assert_array_equal(table.numpy()[rows.numpy()], wanted.numpy()[[20, 3]])


def test_processes_of_a_machine_share_one_copy(
    case: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two ranks read the same memory; where there is none to share, each reads its own and says so."""
    monkeypatch.setattr(store_shared, "FOLDER", tmp_path)
    pack, store = ImagePack.open(str(pack_path(case))), LabelStore.open(str(case / "labels.zarr"))
    parts = {
        "size": SIZE,
        "batch_size": 8,
        "epochs": 1,
        "val_fraction": 0.1,
        "loader": "torch",
        "num_workers": 1,
        "world_size": 2,
    }
    loaders = [DistillLoader(pack, store, rank=rank, **parts) for rank in range(2)]  # pyright: ignore[reportArgumentType]
    first, second = (next(loader.batches(0)) for loader in loaders)
    assert len(list(tmp_path.iterdir())) == 1
    first.labels["tones"][0][0] = 2
    assert second.labels["tones"][0][0].tolist() == [2, 2, 2]
    for loader in loaders:
        loader.close()

    monkeypatch.setattr(store_shared, "FOLDER", tmp_path / "none")
    alone = DistillLoader(pack, store, rank=0, **parts)  # pyright: ignore[reportArgumentType]
    batch = next(alone.batches(0))
    assert "labels: not shared, each process reads its own" in capsys.readouterr().out
    assert torch.equal(batch.images, first.images) and len(list(alone.validation_batches())) > 0
    alone.close()


def test_the_clock_tells_waiting_from_work() -> None:
    def slow() -> Iterator[int]:
        for number in range(3):
            time.sleep(0.02)
            yield number

    clock = StepTimer()
    for number in clock.measure(slow()):
        time.sleep(0.05)
        if number == 1:
            data, step = clock.pop()
            assert 0.04 <= data < 0.09 and 0.1 <= step < 0.25
    data, step = clock.pop()
    assert 0.02 <= data < 0.06 and 0.05 <= step < 0.15
