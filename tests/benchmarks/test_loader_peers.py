"""The loaders of other projects in the benchmark: pixels, resuming, and the table."""

from pathlib import Path

import numpy as np
import pytest

from benchmarks.harness.targets import targets
from benchmarks.loaders.contenders import Case
from benchmarks.loaders.peers import benchmark, checks, contenders
from benchmarks.loaders.sample_images import generated, pack

RESUMES = {"torch": checks.SAME, **dict.fromkeys(("torchvision", "webdataset", "spdl"), "no position to save")}


@pytest.fixture(scope="module")
def missing() -> dict[str, str]:
    return contenders.missing()


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """Two crops of more images than a batch has."""
    return Case(pack=str(pack(generated(70, (64, 48)), tmp_path_factory.mktemp("peers") / "pack")), crops=2, side=32)


@pytest.mark.parametrize("name", contenders.PEERS)
def test_a_peer_gives_the_crops_of_our_plan(name: str, missing: dict[str, str], case: Case) -> None:
    if name in missing:
        pytest.skip(missing[name])
    contenders.write(name, case.pack, 1)
    assert checks.pixel_difference(name, case, 1) <= float(
        targets("loaders_peers", "cpu")[f"{name}_pixel_difference"].split()[1]
    )
    assert checks.resumes(name, case, 1) == RESUMES.get(name, checks.SAME)


def test_our_loader_goes_on_with_the_same_batches(case: Case) -> None:
    assert checks.resumes("torch", case, 1) == RESUMES["torch"]


def test_ffmpeg_filters_cut_every_box_and_stack_them() -> None:
    boxes = np.array([[1, 2, 30, 40], [0, 0, 5, 6]], np.uint16)
    assert contenders.spdl_filters(boxes, np.array([1, 0], np.uint8), 8) == (
        "format=rgb24,split=2[c0][c1];"
        "[c0]crop=30:40:1:2:exact=1,scale=8:8:flags=bilinear,hflip[c0out];"
        "[c1]crop=5:6:0:0:exact=1,scale=8:8:flags=bilinear[c1out];"
        "[c0out][c1out]vstack=inputs=2"
    )


def test_the_table_names_what_is_missing_and_says_who_is_ahead() -> None:
    figures = {
        "pictures": "generated", "bytes_per_image": 2000.0, "threads": 2, "peers_decode_with": "torchvision",
        "targets": targets("loaders_peers", "cpu"), "spdl_missing": "ImportError: no FFmpeg",
        "torch_over_litdata_4x160": 0.9, "litdata_resumes": checks.SAME,
    }  # fmt: skip
    for name in ("bare", "torch", "litdata"):
        figures |= {f"{crops}x160_{name}_images_per_second": 100.0 for crops in (1, 4)}
        figures |= {f"{crops}x160_{name}_over_decode": 0.5 for crops in (1, 4)}
        figures |= {f"{name}_peak_memory_bytes": 3e8}
    (grid,) = benchmark.grids(figures)
    rows = {row[0]: row for row in grid.rows}
    assert list(rows) == ["bare", "torch", "litdata", "spdl"]
    assert rows["spdl"][1] == "missing: ImportError: no FFmpeg"
    assert rows["litdata"][:4] == ["litdata", "400", "0.5", "0.9 MISSED"] and rows["litdata"][-1] == checks.SAME
    assert all(len(row) == len(grid.titles) for row in grid.rows)


def test_the_whole_benchmark_in_its_smallest_form(missing: dict[str, str], tmp_path: Path) -> None:
    if set(missing) >= set(contenders.PEERS) - {"torchvision"}:
        pytest.skip("without the extra `peers`")
    figures = benchmark.measure(images=70, rounds=1, data="", folder=tmp_path)
    for name in ("torch", *(peer for peer in contenders.PEERS if peer not in missing)):
        assert figures[f"4x160_{name}_images_per_second"] > 0 and figures[f"{name}_first_batch_seconds"] > 0
