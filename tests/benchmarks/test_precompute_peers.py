"""Precomputing without repcon, in the benchmark: lines of code, ratios, the table."""

from pathlib import Path

import pytest

from benchmarks.loaders.sample_images import generated
from benchmarks.precompute.contenders import Packs
from benchmarks.precompute.peers import benchmark


def test_lines_of_code_are_counted_without_comments_docstrings_and_blanks() -> None:
    assert benchmark.lines("ours") == 6
    assert all(benchmark.lines(name) > 2 * benchmark.lines("ours") for name in benchmark.SCRIPTS)


def test_ratios_are_of_the_same_round_and_steady_rates_of_the_difference() -> None:
    figures = benchmark._rates({"ours": [(1.0, 3.0), (1.0, 2.0)], "ray_data": [(4.0, 8.0), (4.0, 8.0)]}, 10, 50)
    assert figures["ray_data_crops_per_second"] == 50 / 8 and figures["ray_data_steady_crops_per_second"] == 10
    assert figures["ours_over_ray_data"] == pytest.approx((8 / 3 + 8 / 2) / 2)
    assert figures["ours_steady_over_ray_data"] == pytest.approx((20 / 10 + 40 / 10) / 2)
    rows = benchmark.grids(
        figures | {"crops": 50, "batch_size": 8, "targets": {}, "ours_lines": 6, "ray_data_lines": 40}
        | {"ray_data_top1_agreement": 0.99, "torch_files_missing": "ImportError: no", "webdataset_parquet_missing": "x"}
    )[0].rows  # fmt: skip
    assert [row[0] for row in rows] == ["ours", "torch_files", "webdataset_parquet", "ray_data"]
    assert rows[1][1] == "missing: ImportError: no" and rows[3][-2:] == ["40", "0.9900"]


def test_the_script_without_further_libraries_agrees_with_our_store(tmp_path: Path) -> None:
    packs = Packs(generated(8, (200, 150)), tmp_path)
    job = benchmark._Job(packs, 8, 8, tmp_path)
    taken = benchmark._script("torch_files", job)
    assert taken.top1 is not None and (taken.top1 == job.store_top1()).mean() >= 0.85
    assert benchmark._ours(job).seconds > 0


def test_every_script_agrees_with_our_store(tmp_path: Path) -> None:
    pytest.importorskip("webdataset", reason="without the extra `peers`", exc_type=ImportError)
    figures = benchmark.measure(images=16, rounds=1, folder=tmp_path)
    for name in benchmark.SCRIPTS:
        assert figures[f"{name}_top1_agreement"] >= 0.85 and figures[f"ours_over_{name}"] > 0
