"""The label store's peers read what was written, and one that is missing is named instead of failing."""

import importlib
import sys
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from benchmarks.harness.records import markdown
from benchmarks.store.labels import HEADS, Labels, make_labels
from benchmarks.store.peers import benchmark
from benchmarks.store.peers.contenders import OWN_FILES, open_all
from benchmarks.store.peers.peer import Arrays, require_written
from benchmarks.store.peers.separate_process import SeparateProcess
from repcon.runtime.errors import UserError

IMAGES = 40
NEEDS = {"lmdb": ("lmdb",), "parquet": ("pyarrow",), "parquet_groups": ("pyarrow",), "lance": ("lance",)}
NEEDS["hdf5"] = ("h5py", "hdf5plugin")


@pytest.fixture(scope="module")
def labels() -> Labels:
    return make_labels(IMAGES)


def written(labels: Labels, crop: int, rows: np.ndarray) -> Arrays:
    arrays = [labels.boxes, labels.flips, *(array for pair in labels.heads.values() for array in pair)]
    return [array[crop, rows] for array in arrays]


@pytest.mark.parametrize("name", OWN_FILES)
def test_a_peer_reads_what_it_wrote(name: str, labels: Labels, tmp_path: Path):
    for module in NEEDS.get(name, ()):
        pytest.importorskip(module)
    peer = OWN_FILES[name][0](tmp_path / name, labels, IMAGES)
    rows = np.array([31, 2, 2, 17])
    for found, expected in (
        (peer.slab(3), written(labels, 3, np.arange(IMAGES))),
        (peer.batch(5, rows), written(labels, 5, rows)),
    ):
        for one, other in zip(found, expected, strict=True):
            assert one.dtype == other.dtype
            np.testing.assert_array_equal(one, other)
    assert peer.bytes > 0


@pytest.mark.parametrize("library", ["zarr", "zarrs", "tensorstore"])
def test_a_library_reads_the_store_in_a_process_of_its_own(library: str, labels: Labels, tmp_path: Path):
    pytest.importorskip(library)
    figures: dict = {}
    with ExitStack() as stack:
        found = open_all(tmp_path, labels, 4, sys.executable, figures, stack)  # compares the first slab
        assert isinstance(found[f"{library}_zstd"], SeparateProcess)
        assert found[f"{library}_zstd"].epoch_seconds([np.arange(IMAGES)]) > 0
        assert found[f"{library}_lz4"].batch_seconds(1, np.array([3, 1])) > 0


def test_what_cannot_take_part_is_named_with_its_error(labels: Labels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "lmdb", None)
    setting = benchmark.Setting(
        images=IMAGES, images_as_files=4, layout_images=20, layout_files=2, turns=3, most_seconds=0.0
    )
    figures = benchmark.measure(setting, str(tmp_path / "no-python"), tmp_path)
    assert figures["zarr_newest_zstd_error"].endswith("No such file or directory")
    assert "lmdb" in figures["lmdb_error"]
    race, absent, layouts = (markdown(grid.titles, grid.rows) for grid in benchmark.grids(figures))
    assert "| lmdb |" in absent and "| lmdb |" not in race
    assert "| ours_zstd | 1 |" in race and "| npz |" in race
    assert layouts.count("\n") == 2 + 3 * 4
    assert figures["tinyvit_imagenet_k16_bytes"] == 4 + 16 * 4 + 21
    assert figures["log_slab_over_ours"] > 0 and figures["zarr_lz4_epoch_over_gather"] > 0


def test_a_peer_that_reads_other_labels_ends_the_race(labels: Labels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    module = importlib.import_module("benchmarks.store.peers.contenders")
    monkeypatch.setattr(module, "CODECS", ())
    other = make_labels(IMAGES, seed=1)
    wrong = {"log": (lambda folder, _, images: OWN_FILES["log"][0](folder, other, images), "numpy")}
    monkeypatch.setattr(module, "OWN_FILES", wrong)
    with ExitStack() as stack, pytest.raises(UserError, match="log reads other labels than were written"):
        open_all(tmp_path, labels, IMAGES, "", {}, stack)


def test_values_that_were_never_written_are_found(labels: Labels):
    arrays = written(labels, 0, np.arange(IMAGES))
    classes = [count for count, _ in HEADS.values()]
    assert require_written(arrays, classes) is arrays
    for place, value in ((0, 65_535), (1, 255), (2, 65_535), (3, np.nan)):
        damaged = [array.copy() for array in arrays]
        damaged[place][7] = value
        with pytest.raises(ValueError, match="never written"):
            require_written(damaged, classes)
