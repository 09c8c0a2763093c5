import dataclasses
import pickle

import numpy as np
import pytest
import zarr
from store_builder import boxes_of, create_and_fill, expected, fill, labels_of, snapshot, spec, teacher_metadata, write

from repcon.labels.manifest import seal, unseal
from repcon.labels.store import LabelStore
from repcon.runtime.errors import UserError


@pytest.fixture
def store(tmp_path) -> LabelStore:
    return fill(LabelStore.create(str(tmp_path / "labels.zarr"), spec()))


def check_labels(store: LabelStore, tolerance: float = 0.0) -> None:
    for crop_labels in store.reader.iter_crop_labels(range(store.crops)):
        assert set(crop_labels.labels) == set(store.heads)
        for name, (ids, logp) in crop_labels.labels.items():
            wanted_ids, wanted_logp = expected(store, crop_labels.crops[0], name)
            np.testing.assert_array_equal(ids, wanted_ids)
            np.testing.assert_allclose(logp, wanted_logp, atol=tolerance)


@pytest.mark.parametrize("codec", ["zstd", "lz4"])
@pytest.mark.parametrize("place", ["path", "file", "memory"])
def test_what_is_written_is_read(tmp_path, codec, place):
    urls = {"path": str(tmp_path / "s"), "file": f"file://{tmp_path}/s", "memory": f"memory://{tmp_path.name}-{codec}"}
    create_and_fill(urls[place], codec=codec)
    store = LabelStore.open(urls[place])
    assert store.completion.unfinished() == [] and store.completion.missing_rows().size == 0
    assert (store.images, store.crops, list(store.heads)) == (100, 4, ["wide", "small"])
    check_labels(store)


def test_eight_bit_values_come_back_as_float16_like_any_other(tmp_path):
    create_and_fill(str(tmp_path / "s"), values="quantized8")
    store = LabelStore.open(str(tmp_path / "s"))
    crop_labels = store.reader.crop_labels(0)
    assert crop_labels.labels["wide"][1].dtype == np.float16 and crop_labels.labels["wide"][1].shape == (100, 7)
    np.testing.assert_array_equal(crop_labels.labels["wide"][0], expected(store, 0, "wide")[0])
    np.testing.assert_allclose(crop_labels.labels["wide"][1][:, :5], expected(store, 0, "wide")[1][:, :5], atol=0.03)
    assert np.isneginf(crop_labels.labels["small"][1][:, 4:]).all()


def test_boxes_come_back_for_any_range(store):
    boxes, flips = store.reader.boxes(range(1, 3), range(30, 90))
    for unit in store.units():
        wanted_boxes, wanted_flips = boxes_of(unit)
        rows = range(max(30, unit.rows.start), min(90, unit.rows.stop))
        here = slice(rows.start - 30, rows.stop - 30)
        there = slice(rows.start - unit.rows.start, rows.stop - unit.rows.start)
        np.testing.assert_array_equal(boxes[:, here], wanted_boxes[1:3, there])
        np.testing.assert_array_equal(flips[:, here], wanted_flips[1:3, there])
    assert store.reader.crop_labels(2).boxes.shape == (100, 4)
    np.testing.assert_array_equal(store.reader.crop_labels(2).boxes[30:90], boxes[1])


def test_some_heads_and_their_memory(store):
    found = store.reader.crop_labels(1, ["small"])
    assert list(found.labels) == ["small"] and found.crops == (1,)
    with pytest.raises(UserError, match="no head tiny; it holds wide, small"):
        store.reader.crop_labels(0, ["tiny"])
    with pytest.raises(UserError, match="crop 4 of the boxes is not in the store"):
        store.reader.crop_labels(4)
    assert store.reader.crop_labels_bytes() == sum(
        array.nbytes
        for crop_labels in [store.reader.crop_labels(0)]
        for array in (crop_labels.boxes, crop_labels.flips, *sum(crop_labels.labels.values(), ()))
    )


def test_zarr_python_reads_the_same_store(store):
    group = zarr.open_group(store.url, mode="r")
    for crop in range(store.crops):
        crop_labels = store.reader.crop_labels(crop)
        for name, (ids, logp) in crop_labels.labels.items():
            np.testing.assert_array_equal(group[f"heads/{name}/ids"][crop], ids)
            np.testing.assert_array_equal(group[f"heads/{name}/logp"][crop], logp)
        np.testing.assert_array_equal(group["crops/box"][crop], crop_labels.boxes)
        np.testing.assert_array_equal(group["crops/flip"][crop], crop_labels.flips)


def test_a_second_run_finds_nothing_to_do_and_changes_nothing(tmp_path, store):
    before = snapshot(tmp_path)
    again = LabelStore.create(store.url, spec())
    assert again.completion.unfinished() == [] and snapshot(tmp_path) == before


def test_a_resumed_run_ends_byte_identical(tmp_path, store):
    half = LabelStore.create(str(tmp_path / "half" / "labels.zarr"), spec())
    for unit in half.units()[:2]:
        write(half, unit)
    resumed = LabelStore.create(half.url, spec())
    assert [unit.name for unit in resumed.completion.unfinished()] == [resumed.units()[2].name]
    fill(resumed)
    assert snapshot(tmp_path / "half" / "labels.zarr") == snapshot(tmp_path / "labels.zarr")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"pack_fingerprint": "e" * 64}, "pack_fingerprint"),
        ({"crop_recipe": {"seed": 1, "scale": [0.25, 1.0]}}, "crop_recipe.seed: the store has 0, this run has 1"),
        ({"k": 6}, "k: the store has 5, this run has 6"),
        ({"temperatures": (1.0,)}, "temperatures"),
        ({"images": 101}, "images"),
        ({"crops": 8}, "crops: the store has 4, this run has 8"),
        ({"codec": "lz4"}, "codec"),
        ({"values": "quantized8"}, "values"),
        ({"rows_per_shard": 50}, "rows_per_shard"),
        (
            {"teachers": (teacher_metadata("wide", 300), teacher_metadata("small", 4, weight_hash="x"))},
            "teachers.small.weight_hash",
        ),
        (
            {
                "teachers": (
                    teacher_metadata("wide", 300, preprocessing={"size": 64, "mean": [0.5, 0.5, 0.5]}),
                    teacher_metadata("small", 4),
                )
            },
            "teachers.wide.preprocessing.size: the store has 32, this run has 64",
        ),
        (
            {"teachers": (teacher_metadata("wide", 300), teacher_metadata("small", 4, precision="bf16"))},
            "teachers.small.precision",
        ),
        ({"teachers": (teacher_metadata("wide", 300), teacher_metadata("third", 4))}, "teachers.third"),
    ],
)
def test_a_resume_with_anything_else_is_refused_by_name(tmp_path, store, changes, named):
    before = snapshot(tmp_path)
    with pytest.raises(UserError, match=f"made for something else: {named}"):
        LabelStore.create(store.url, spec(**changes))
    assert snapshot(tmp_path) == before


def test_versions_and_licences_do_not_stand_in_the_way_of_a_resume(store):
    newer = tuple(
        teacher_metadata(n, c, versions={"torch": "9"}, licence="MIT") for n, c in (("wide", 300), ("small", 4))
    )
    assert LabelStore.create(store.url, spec(teachers=newer)).completion.unfinished() == []


def test_a_teacher_is_added_on_the_stored_boxes(tmp_path, store):
    before = snapshot(tmp_path)
    store.append_teachers([teacher_metadata("wide", 300), teacher_metadata("third", 1000)])
    added = store.completion.unfinished()
    assert {unit.heads for unit in added} == {("third",)} and not any(unit.writes_boxes for unit in added)
    assert len(added) == 3
    for unit in added[:1]:
        np.testing.assert_array_equal(store.reader.boxes(unit.crops, unit.rows)[0], boxes_of(unit)[0])
        store.writer.write(unit, np.empty(0), np.empty(0), labels_of(store, unit))
    resumed = LabelStore.open(store.url)
    assert len(resumed.completion.unfinished()) == 2
    assert set(resumed.reader.crop_labels(0, ["wide"]).labels) == {"wide"}
    with pytest.raises(UserError, match="never finished"):
        resumed.reader.crop_labels(0)
    check_labels(fill(resumed))
    after = snapshot(tmp_path)
    assert {name: after[name] for name in before if name != "labels.zarr/manifest.json"} == {
        name: data for name, data in before.items() if name != "labels.zarr/manifest.json"
    }
    assert LabelStore.create(store.url, spec()).completion.unfinished() == []  # the first recipe still fits its store


def test_an_added_teacher_of_a_known_name_must_be_the_same(store):
    with pytest.raises(UserError, match=r"teachers\.wide\.weight_hash"):
        store.append_teachers([teacher_metadata("wide", 300, weight_hash="other")])


def test_crops_are_added_and_no_shard_changes(tmp_path, store):
    before = snapshot(tmp_path)
    store.append_crops(8)
    store.append_crops(8)
    assert store.crops == 8 and [unit.crops for unit in store.completion.unfinished()] == [range(4, 8)] * 3
    assert all(unit.writes_boxes for unit in store.completion.unfinished())
    store.append_teachers([teacher_metadata("third", 10)])
    check_labels(fill(LabelStore.open(store.url)))
    after = snapshot(tmp_path)
    untouched = [name for name in before if not name.endswith((".json",)) or "/done/" in name]
    assert len(untouched) > 10 and all(after[name] == before[name] for name in untouched)
    group = zarr.open_group(store.url, mode="r")
    assert group["heads/wide/ids"].shape == (8, 100, 5)
    np.testing.assert_array_equal(group["heads/third/ids"][6], expected(LabelStore.open(store.url), 6, "third")[0])


@pytest.mark.parametrize("crops", [2, 6, 5])
def test_crops_grow_by_whole_shards(store, crops):
    with pytest.raises(UserError, match="in steps of 4"):
        store.append_crops(crops)


def test_two_changes_at_once_do_not_lose_one(store):
    other = LabelStore.open(store.url)
    store.append_crops(8)
    with pytest.raises(UserError, match="another process changed the store"):
        other.append_teachers([teacher_metadata("third", 10)])


@pytest.mark.parametrize("values", ["float16", "quantized8"])
def test_missing_rows_hold_fill_values_are_listed_and_allowed(tmp_path, values):
    store = LabelStore.create(str(tmp_path / "s"), spec(values=values))
    for unit in store.units():
        write(store, unit, [row for row in (3, 77) if row in unit.rows])
    store = LabelStore.open(store.url)
    assert store.completion.missing_rows().tolist() == [3, 77] and store.completion.unfinished() == []
    ids, logp = store.reader.crop_labels(1).labels["wide"]
    assert (ids[[3, 77]] == 65_535).all() and np.isnan(logp[[3, 77]]).all()
    assert (np.delete(ids, [3, 77], 0) < 300).all() and not np.isnan(np.delete(logp, [3, 77], 0)).any()


def test_boxes_flips_and_missing_rows_that_no_reader_would_trust_are_refused(tmp_path):
    store = LabelStore.create(str(tmp_path / "s"), spec())
    unit = store.units()[0]
    boxes, flips = boxes_of(unit)
    for wrong, told in (
        ((boxes.astype(np.int64), flips, {}), "boxes are int64 instead of uint16"),
        ((boxes, flips + np.uint8(2), {}), "flips must be 0 or 1"),
        ((boxes, flips, {unit.rows.stop: "gone"}), f"missing row {unit.rows.stop} is not one of its rows"),
    ):
        with pytest.raises(UserError, match=told):
            store.writer.write(unit, *wrong[:2], labels_of(store, unit), wrong[2])
    assert not store.completion.is_done(unit)


def test_what_other_heads_units_miss_does_not_change_ones_own(store):
    store.append_teachers([teacher_metadata("birds", 50)])
    write(store, store.completion.unfinished()[0], missing=[3])
    assert store.completion.missing_rows().tolist() == [3] == store.completion.missing_rows(["birds"]).tolist()
    assert store.completion.missing_reasons(store.completion.finished()) == {3: "row 3 is no JPEG"}
    assert store.completion.missing_rows(["wide", "small"]).tolist() == []


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda ids, logp: (ids, np.where(np.arange(7) == 2, np.float16("nan"), logp)), "NaN"),
        (lambda ids, logp: (ids, np.where(np.arange(7) == 4, np.float16("-inf"), logp)), "infinite"),
        (lambda ids, logp: (ids + 300, logp), "ids must be integers from 0 to 299"),
        (lambda ids, logp: (ids - 300, logp), "ids must be"),
        (lambda ids, logp: (ids.astype(float), logp), "ids must be"),
        (lambda ids, logp: (ids, logp[..., ::-1]), "must fall"),
        (lambda ids, logp: (ids[:, :-1], logp), "ids has shape"),
        (lambda ids, logp: (ids, logp[..., :-1]), "logp has shape"),
    ],
)
def test_labels_that_nobody_could_trust_are_not_written(tmp_path, change, named):
    store = LabelStore.create(str(tmp_path / "s"), spec())
    unit = store.units()[0]
    labels = labels_of(store, unit)
    labels["wide"] = change(*labels["wide"])
    with pytest.raises(UserError, match=named):
        store.writer.write(unit, *boxes_of(unit), labels)
    assert not store.completion.is_done(unit)


def test_boxes_and_heads_must_be_those_of_the_unit(tmp_path):
    store = LabelStore.create(str(tmp_path / "s"), spec())
    unit = store.units()[0]
    boxes, flips = boxes_of(unit)
    with pytest.raises(UserError, match="boxes has shape"):
        store.writer.write(unit, boxes[:, :-1], flips, labels_of(store, unit))
    with pytest.raises(UserError, match="without an area"):
        store.writer.write(unit, boxes * 0, flips, labels_of(store, unit))
    with pytest.raises(UserError, match="labels of"):
        store.writer.write(unit, boxes, flips, {})


def test_opening_what_is_no_store(tmp_path):
    with pytest.raises(UserError, match="no label store here"):
        LabelStore.open(str(tmp_path / "absent"))
    (tmp_path / "thesis.tex").write_text("years of work")
    (tmp_path / ".draft.tmp").write_text("another program's")
    with pytest.raises(UserError, match="holds other files"):
        LabelStore.create(str(tmp_path), spec())
    assert {path.name for path in tmp_path.iterdir()} == {"thesis.tex", ".draft.tmp"}


def test_another_process_gets_its_own_by_pickling(store):
    other = pickle.loads(pickle.dumps(store))
    assert other.fingerprint == store.fingerprint and other is not store


def test_the_sections_tell_where_labels_come_from(store):
    head = LabelStore.open(store.url).heads["wide"]
    assert head.metadata == teacher_metadata("wide", 300) and (head.k, head.classes, head.temperatures) == (
        5,
        300,
        (1.0, 2.0),
    )
    assert dataclasses.asdict(head.metadata)["weight_hash"] == "hash of wide"


def test_a_teacher_of_which_nothing_is_finished_gives_its_name_to_another(tmp_path):
    url = str(tmp_path / "labels.zarr")
    store = fill(LabelStore.create(url, spec()))
    store.append_teachers([teacher_metadata("late", 20)])
    behind = LabelStore.open(url)
    store.replace_teacher(teacher_metadata("late", 700, weight_hash="mended"))
    unit = next(unit for unit in behind.units() if "late" in unit.heads)
    with pytest.raises(UserError, match="another run has put another teacher in the place of late"):
        write(behind, unit)
    assert not store.completion.is_done(unit)
    fill(LabelStore.open(url))
    check_labels(LabelStore.open(url))
    with pytest.raises(UserError, match="late has labels already"):
        LabelStore.open(url).replace_teacher(teacher_metadata("late", 20))
    store.append_teachers([teacher_metadata("more", 6)])  # changes the manifest, and nothing of what the others write
    other = LabelStore.open(url)
    store.append_teachers([teacher_metadata("most", 6)])
    fill(other)
    assert [unit.heads for unit in LabelStore.open(url).completion.unfinished()] == [("most",)] * 3


def test_a_new_store_leaves_other_files_where_they_are(tmp_path):
    (tmp_path / "mine/.cache").mkdir(parents=True)
    for name in (".notes.tmp", ".cache/.draft.tmp"):
        (tmp_path / "mine" / name).write_text("precious")
    LabelStore.create(str(tmp_path / "mine"), spec())
    assert (tmp_path / "mine/.notes.tmp").read_text() == (tmp_path / "mine/.cache/.draft.tmp").read_text() == "precious"


@pytest.mark.parametrize(
    "names", [("notes.txt",), ("zarr.json",), ("manifest.next.json",), ("crops", "manifest.next.json")]
)
def test_a_folder_of_others_is_refused_and_left_as_it_is(tmp_path, names):
    for name in names:
        (tmp_path / name).write_text("precious")
    with pytest.raises(UserError, match=f"{tmp_path}.*(holds other files|damaged)"):
        LabelStore.create(str(tmp_path), spec())
    assert all((tmp_path / name).read_text() == "precious" for name in names)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)


def test_a_refused_spec_leaves_nothing(tmp_path):
    for changes in (
        {"crop_recipe": {"flip": 1.5}},
        {"crop_recipe": {"seed": -1}},
        {"crop_recipe": {"colour": 1}},
        {"crop_recipe": {"ratio": [float("nan"), 1.0]}},
        {"temperatures": (float("nan"),)},
        {"teachers": (teacher_metadata("a", 3, preprocessing={"size": 0}),)},
        {"teachers": (teacher_metadata("a", 3, preprocessing={"size": 32, "mean": [float("inf")]}),)},
        {"teachers": (teacher_metadata("a", 2, classes=("x", "\udcff")),)},
        {"teachers": (teacher_metadata("a", 3, precision="fp8"),)},
    ):
        with pytest.raises(UserError):
            LabelStore.create(str(tmp_path / "s"), spec(**changes))
        assert not (tmp_path / "s").exists()


def test_a_store_whose_encoding_has_its_older_name_is_read_resumed_and_extended(tmp_path):
    url = str(tmp_path / "s")
    store = LabelStore.create(url, spec(values="quantized8"))
    for unit in store.units()[1:]:
        write(store, unit)
    wanted = store.reader.read_rows(1, range(40, 80)).labels["wide"][1]
    path = tmp_path / "s" / "manifest.json"
    path.write_bytes(seal(unseal(path.read_bytes(), "manifest") | {"values": "gaps8"}))
    older = LabelStore.create(url, spec(values="quantized8"))
    np.testing.assert_array_equal(older.reader.read_rows(1, range(40, 80)).labels["wide"][1], wanted)
    assert older.identity(["wide"]) == store.identity(["wide"])
    assert [unit.name for unit in older.completion.unfinished()] == [store.units()[0].name]
    older.append_teachers([teacher_metadata("third", 10)])
    fill(older)
    assert LabelStore.open(url).manifest.values == "quantized8" and not LabelStore.open(url).completion.unfinished()
