import json

import numpy as np
import pytest
from store_builder import expected, fill, spec, teacher_metadata, write

from repcon.labels.statistics import figures
from repcon.labels.store import LabelStore


def make(tmp_path, **changes) -> LabelStore:
    return fill(LabelStore.create(str(tmp_path / "s"), spec(**changes)))


def test_figures_are_those_of_the_labels(tmp_path):
    store = make(tmp_path)
    found = figures(store)
    head = found["heads"]["wide"]
    logp = np.concatenate([expected(store, crop, "wide")[1] for crop in range(4)]).astype(np.float64)
    first = np.concatenate([expected(store, crop, "wide")[0][:, 0] for crop in range(4)])
    assert found["sampled_crops"] == 400
    assert head["mass"] == pytest.approx(np.exp(logp[:, :5]).sum(1).mean())
    assert head["top1_probability"] == pytest.approx(np.exp(logp[:, 0]).mean())
    assert head["top1_counts"] == np.bincount(first, minlength=300).tolist()
    assert head["classes_on_top"] == len(set(first.tolist()))
    assert head["kl_by_k"][-1] == pytest.approx(0, abs=1e-9) and len(head["kl_by_k"]) == len(head["mass_by_k"]) == 5
    assert (found["heads"]["small"]["k"], found["heads"]["small"]["mass"]) == (4, pytest.approx(1, abs=2e-3))
    assert json.loads(json.dumps(found)) == found


def test_sizes_add_up_to_the_files(tmp_path):
    store = make(tmp_path, teachers=(teacher_metadata("wide", 300), teacher_metadata("c", 4)))
    found = figures(store)
    shards = [path for path in (tmp_path / "s").rglob("*") if path.is_file() and path.suffix != ".json"]
    assert found["bytes"] == sum(path.stat().st_size for path in shards)
    assert found["bytes_per_crop"] == pytest.approx(found["bytes"] / 400)
    assert all(head["bytes_per_crop"] > 0 for head in found["heads"].values())


def test_a_sample_is_spread_and_bounded(tmp_path):
    found = figures(make(tmp_path, images=300, rows_per_shard=50), sample_rows=100)
    assert found["sampled_crops"] == 100


def test_missing_rows_are_left_out(tmp_path):
    store = LabelStore.create(str(tmp_path / "s"), spec())
    for unit in store.units():
        write(store, unit, [row for row in (3, 77) if row in unit.rows])
    found = figures(LabelStore.open(store.url))
    assert (found["missing"], found["sampled_crops"]) == (2, 392) and np.isfinite(found["heads"]["wide"]["mass"])


def test_a_store_that_is_not_finished_is_read_as_far_as_it_is(tmp_path):
    store = LabelStore.create(str(tmp_path / "s"), spec())
    empty = figures(store)
    assert (empty["units_finished"], empty["sampled_crops"], empty["agreement"]) == (0, 0, {})
    write(store, store.units()[1])
    found = figures(LabelStore.open(store.url))
    assert (found["units_finished"], found["sampled_crops"]) == (1, 160) and "mass" in found["heads"]["wide"]
    store.append_teachers([teacher_metadata("third", 9)])
    assert figures(store)["sampled_crops"] == 0  # no crop has all the heads yet


def test_both_encodings_are_shown_and_what_is_unknown_is_left_open(tmp_path):
    plain = figures(make(tmp_path / "a"))["heads"]["wide"]["encodings"]
    assert (
        plain["quantized8"]["bytes_per_crop"] < plain["float16"]["bytes_per_crop"]
        and 0 < plain["quantized8"]["kl"] < 1e-4
    )
    packed = figures(make(tmp_path / "b", values="quantized8"))["heads"]["wide"]["encodings"]
    assert packed["quantized8"]["kl"] is None and packed["quantized8"]["saturated"] == 0


def test_agreement_of_teachers(tmp_path):
    names = ("a", "b", "c", "d")
    twins = tuple(teacher_metadata(f"twin{number}", 4, classes=names) for number in (1, 2))
    store = make(tmp_path, teachers=(*twins, teacher_metadata("other", 4)))
    found = figures(store)["agreement"]
    assert set(found) == {"twin1 / twin2", "twin1 / other", "twin2 / other"}
    assert "same_class" in found["twin1 / twin2"] and "same_class" not in found["twin1 / other"]
    assert abs(found["twin1 / other"]["mutual_information"]) < 0.1
