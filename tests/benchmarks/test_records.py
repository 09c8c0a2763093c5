"""Records of benchmarks: figures with their spread, folders that are never overwritten."""

import json

import pytest

from benchmarks.harness import records, targets
from repcon.runtime.system import environment


@pytest.fixture
def figures() -> dict:
    found: dict = {"images": 4096}
    records.put(found, "slab_over_memmap", [0.1, 0.2, 0.3, 0.4, 0.5])
    return found


def test_a_timed_figure_is_a_median_with_quantiles_and_repeats(figures):
    ends = {"slab_over_memmap_20": pytest.approx(0.18), "slab_over_memmap_80": pytest.approx(0.42)}
    assert figures == {"images": 4096, "slab_over_memmap": 0.3, "slab_over_memmap_repeats": 5, **ends}


def test_a_table_has_a_row_per_figure_with_its_target(figures):
    assert records.table_rows(figures | {"targets": {"slab_over_memmap": ">= 0.15"}}) == [
        ("images", "4,096", "", "", ""),
        ("slab_over_memmap", "0.3", "0.18 to 0.42", "5", ">= 0.15"),
    ]


def test_a_second_record_of_a_day_leaves_the_first_as_it_was(figures, tmp_path, monkeypatch):
    monkeypatch.setattr(records, "RECORDS", tmp_path)
    plot = tmp_path / "plot.svg"
    plot.write_text("<svg/>")
    facts = {**environment(), "device": "cpu", "cores": 2, "command": "store.py --data /home/ann/photos --json=/a.json"}
    folders = [
        records.write_record("store", figures | {"number": number, "environment": facts}, "| a |\n|---|\n", [plot])
        for number in (1, 2)
    ]
    assert folders[0].name.endswith("-store-cpu-2-cores") and folders[1].name == folders[0].name + "-2"
    assert [json.loads((folder / "results.json").read_text())["number"] for folder in folders] == [1, 2]
    assert {path.name for path in folders[1].iterdir()} == {"results.json", "env.json", "table.md", "plot.svg"}
    for name in ("table.md", "env.json", "results.json"):
        assert "store.py --data photos --json=a.json" in (folders[0] / name).read_text()


def test_a_gpus_record_is_named_after_it(figures, tmp_path, monkeypatch):
    monkeypatch.setattr(records, "RECORDS", tmp_path)
    facts = environment() | {"device": "NVIDIA H100 80GB HBM3", "power_limit_watts": 700.0}
    folder = records.write_record("kernels", figures | {"environment": facts}, "")
    assert folder.name.endswith("-kernels-nvidia-h100-80gb-hbm3")
    assert "power limit: 700 W" in (folder / "table.md").read_text()


def test_targets_are_met_or_missed():
    assert targets.met("<= 1e-4", 1e-5) and not targets.met("<= 1e-4", 2e-4)
    assert targets.met(">= 0.5", 0.5) and not targets.met(">= 0.5", float("nan"))
    assert targets.targets("training", "cpu")["step_over_synthetic"] == ">= 0.9"
    assert targets.targets("training", "NVIDIA H200")["step_over_synthetic"] == ">= 0.97"
