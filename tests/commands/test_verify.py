import dataclasses
import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from store_builder import boxes_of, fill, labels_of, spec, write

from repcon import cli
from repcon.commands import pack as packing
from repcon.commands import precompute, verify
from repcon.commands.verify import label_problems
from repcon.config import PackConfig, PrecomputeConfig, TeacherConfig, VerifyConfig
from repcon.decode.libraries import installed
from repcon.images.pack import ImagePack
from repcon.labels import topk
from repcon.labels.layout import HeadInfo
from repcon.labels.manifest import seal, unseal
from repcon.labels.store import LabelStore, TeacherMetadata
from repcon.models.factory import create_model
from repcon.models.preprocessing import Preprocessing
from repcon.models.saved_model import save_model
from repcon.precompute.recompute import compare
from repcon.runtime.errors import UserError

FAST = {"torch": 0.25, "dali": 0.05, "ffcv": 0.05}
"""Mean absolute difference to the reference's pixels, of 255."""


@pytest.fixture
def store(tmp_path) -> LabelStore:
    return fill(LabelStore.create(str(tmp_path / "labels.zarr"), spec()))


def failure(url: str, **changes) -> UserError:
    with pytest.raises(UserError) as caught:
        verify.run(VerifyConfig(store=url, **changes))
    assert caught.value.figures["passed"] is False
    return caught.value


@pytest.mark.parametrize("values", ["float16", "quantized8"])
@pytest.mark.parametrize("temperatures", [(1.0, 2.0), (2.0,)])
def test_a_sound_store_passes(tmp_path, values, temperatures):
    store = fill(LabelStore.create(str(tmp_path / "s"), spec(values=values, temperatures=temperatures)))
    figures = verify.run(VerifyConfig(store=store.url))
    assert figures["passed"] and figures["rows_checked"] == 400 and figures["problems"] == []


def test_missing_rows_are_no_problem(tmp_path):
    store = LabelStore.create(str(tmp_path / "s"), spec())
    for unit in store.units():
        write(store, unit, [row for row in (3, 77) if row in unit.rows])
    assert verify.run(VerifyConfig(store=store.url))["missing"] == 2


def test_every_kind_of_damage_is_told_at_once(store):
    root = Path(store.url)
    (root / "heads/wide/ids/c/0/0/0").write_bytes(b"")
    (root / "heads/small/logp/c/0/1/0").unlink()
    (root / "done/part-0-crop-0-row-80.json").unlink()
    error = failure(store.url)
    problems = " ".join(error.figures["problems"])
    assert len(error.figures["problems"]) == 3 and "3 problems" in str(error)
    for name in ("heads/wide/ids/c/0/0/0", "heads/small/logp/c/0/1/0", "part-0-crop-0-row-80"):
        assert name in problems


def test_the_exit_code_and_the_figures_tell_a_script(store, tmp_path, capsys):
    words = ["verify", store.url, "--json", str(tmp_path / "figures.json")]
    assert cli.main(words) == 0
    assert json.loads((tmp_path / "figures.json").read_text())["passed"] is True
    (Path(store.url) / "heads/wide/ids/c/0/0/0").write_bytes(b"")
    assert cli.main(words) == 1
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["passed"] is False and len(figures["problems"]) == 1
    assert "1 problem" in capsys.readouterr().err.replace("\n", " ")


def test_a_flipped_byte_that_no_reader_looks_at_is_found_by_its_hash(store):
    path = Path(store.url) / "heads/wide/ids/c/0/0/0"
    data = bytearray(path.read_bytes())
    data.insert(len(data) - 68, 0)  # a byte between the chunks and the index
    path.write_bytes(bytes(data))
    assert "sha256" in str(failure(store.url))


def test_a_marker_that_lists_other_files_is_found(store):
    path = Path(store.url) / "done/part-0-crop-0-row-0.json"
    values = unseal(path.read_bytes(), "m")
    del values["files"]["crops/flip/c/0/0"]
    path.write_bytes(seal(values))
    assert "do not agree" in str(failure(store.url))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda ids, logp: (np.where(np.arange(5) == 1, ids[..., :1], ids), logp), "name a class twice"),
        (lambda ids, logp: (ids, logp - np.float16(0.5)), "do not sum to one"),
        (lambda ids, logp: (ids, np.where(np.arange(7) >= 5, np.float16("-inf"), logp)), "tail"),
    ],
)
def test_labels_that_no_teacher_gave_are_found(store, change, told):
    """Written by a faulty program through the store's own door, with right checksums."""
    unit = store.units()[1]
    labels = labels_of(store, unit)
    labels["wide"] = change(*labels["wide"])
    store.writer.write(unit, *boxes_of(unit), labels)
    error = failure(store.url)
    assert told in str(error) and "crop 0 of rows 40 to 79, wide" in str(error)


def test_boxes_must_lie_in_their_images(store):
    class Sizes:
        sizes = np.full((100, 2), 300)

    found = [
        what for unit in store.units() for what in label_problems(store, unit, Sizes(), store.completion.missing_rows())
    ]
    assert found and all("boxes reach out of their image" in what for what in found)


@pytest.fixture(scope="module")
def real(tmp_path_factory, picture_folder) -> Path:
    """A pack, two teachers in folders, and the store that `repcon precompute` made of them."""
    root = tmp_path_factory.mktemp("real")
    packing.run(PackConfig(source=str(picture_folder), out=str(root / "images"), ffcv=installed("ffcv")))
    pack = ImagePack.open(root / "images")
    for seed, classes in ((0, 5), (1, 30)):
        torch.manual_seed(seed)
        data = Preprocessing(size=32, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
        model = create_model("test_resnet", num_classes=classes, pretrained=False)
        names = tuple(f"class {number}" for number in range(classes))
        save_model(model, root / f"teacher-{classes}", classes=names, preprocessing=data, extra={})
    recipe = PrecomputeConfig(
        pack=str(pack.url),
        out=str(root / "labels.zarr"),
        teachers=tuple(TeacherConfig(name=f"t{count}", model=str(root / f"teacher-{count}")) for count in (5, 30)),
        crops=2,
        k=8,
        loader="reference",
        batch_size=16,
        device="cpu",
    )
    precompute.run(recipe)
    (root / "pack").write_text(str(pack.url))
    return root


def config(real: Path, store: str = "", **changes) -> VerifyConfig:
    facts = {
        "store": store or str(real / "labels.zarr"),
        "pack": (real / "pack").read_text(),
        "sample": 12,
        "device": "cpu",
    }
    return VerifyConfig(**(facts | {"loaders": ("reference", "torch")} | changes))


def test_teachers_give_the_stored_answers_again_through_each_loader(real):
    figures = verify.run(config(real, loaders=("auto",)))
    assert figures["passed"] and set(figures["reruns"]) == {"t5", "t30"}
    for loaders in figures["reruns"].values():
        assert set(loaders) == {"reference", *(kind for kind in FAST if installed(kind))}
        assert loaders["reference"]["kl"] < 1e-5 and loaders["reference"]["agreement"] == 1
        for kind, limit in FAST.items():
            if kind in loaders:
                assert loaders[kind]["kl"] < 0.01 and loaders[kind]["pixel_difference"] <= limit
                assert loaders[kind]["agreement"] >= 0.99


def test_thresholds_decide(real):
    with pytest.raises(UserError, match=r"mean KL .* above -1"):
        verify.run(config(real, max_kl=-1.0))
    with pytest.raises(UserError, match=r"through the reference loader: the same class .* below 110\.0%") as caught:
        verify.run(config(real, min_agreement=1.1))
    assert caught.value.figures["reruns"]["t5"]["reference"]["agreement"] == 1


def test_labels_of_other_crops_are_found(real, tmp_path):
    """Two images' labels have changed places, as labels that are indexed by position do."""
    shutil.copytree(real / "labels.zarr", tmp_path / "shifted")
    store = LabelStore.open(str(tmp_path / "shifted"))
    (unit,) = store.units()
    slabs = [store.reader.crop_labels(crop) for crop in unit.crops]
    boxes, flips = (
        np.stack([crop_labels.boxes for crop_labels in slabs]),
        np.stack([crop_labels.flips for crop_labels in slabs]),
    )
    labels = {
        name: tuple(
            np.roll(np.stack([crop_labels.labels[name][part] for crop_labels in slabs]), 1, axis=1) for part in (0, 1)
        )
        for name in store.heads
    }
    store.writer.write(unit, boxes, flips, labels)
    with pytest.raises(UserError, match=r"mean KL|the same class"):
        verify.run(config(real, store.url, max_kl=1e-4, min_agreement=1.0, sample=32))


def test_another_pack_is_refused(real, store):
    with pytest.raises(UserError, match="another pack"):
        verify.run(config(real, store.url))


def test_other_weights_are_refused(real, tmp_path):
    """The model's folder holds something else by now."""
    root = shutil.copytree(real, tmp_path / "copy")
    path = root / "labels.zarr" / "manifest.json"
    values = unseal(path.read_bytes(), "m")
    teacher = values["teachers"][0]
    model = create_model(teacher["model"])
    with torch.no_grad():
        next(model.parameters()).add_(1e-3)
    inputs = Preprocessing(**{name: teacher["preprocessing"][name] for name in ("size", "mean", "std")})
    save_model(model, tmp_path / "changed", classes=(), preprocessing=inputs, extra={})
    teacher["model"] = str(tmp_path / "changed")
    path.write_bytes(seal(values))
    with pytest.raises(UserError, match=r"t5: .* is not the model that made the labels: weight_hash"):
        verify.run(config(root, str(root / "labels.zarr")))


def test_a_wrong_tail_is_found_at_every_temperature():
    """A tail that was tempered as if it were one class: the trap of soft labels that are cut to the top k."""
    torch.manual_seed(0)
    logits = 3 * torch.randn(20, 30)
    ids, logp = (part.numpy() for part in topk.encode(logits, 4, (1.0, 2.0)))
    metadata = TeacherMetadata(name="t", model="", architecture="", weight_hash="", preprocessing={}, num_classes=30)
    head = HeadInfo("t", 30, 4, (1.0, 2.0), metadata)
    assert compare(head, ids, logp, logits)["kl"] < 1e-5
    wrong = logp.copy()
    wrong[:, 5] = wrong[:, 4] / 2
    assert compare(head, ids, wrong, logits)["kl"] > 0.1


def test_a_teacher_that_was_moved_is_found_where_the_recipe_says(real, tmp_path):
    root = shutil.copytree(real, tmp_path / "copy")
    path = root / "labels.zarr" / "manifest.json"
    values = unseal(path.read_bytes(), "m")
    here = values["teachers"][0]["model"]
    values["teachers"][0]["model"] = str(tmp_path / "once" / "there")
    path.write_bytes(seal(values))
    asked = config(root, str(root / "labels.zarr"))
    with pytest.raises(UserError, match=r"there: no such folder; .*--models t5=MODEL.* labels are sound") as caught:
        verify.run(asked)
    assert caught.value.figures["rows_checked"] and caught.value.figures["passed"] is False
    assert verify.run(dataclasses.replace(asked, models=(f"t5={here}",)))["passed"]
    for entry in ("t5", "t6=there", "t5="):
        # Alone: nothing was checked before.
        with pytest.raises(UserError, match=r"models: .* must be NAME=MODEL, with a NAME of t5, t30$"):
            verify.run(dataclasses.replace(asked, models=(entry,)))


def test_a_stores_own_word_runs_no_code(real, tmp_path, monkeypatch):
    (tmp_path / "stranger.py").write_text("raise SystemExit('ran')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    root = shutil.copytree(real, tmp_path / "copy")
    path = root / "labels.zarr" / "manifest.json"
    values = unseal(path.read_bytes(), "m")
    values["teachers"][0]["model"] = "stranger:teacher"
    path.write_bytes(seal(values))
    with pytest.raises(UserError, match="stranger:teacher is a function"):
        verify.run(config(root, str(root / "labels.zarr")))
    with pytest.raises(UserError, match=r"failed in line 1 of .*stranger\.py: it ends the program"):  # it ran
        verify.run(config(root, str(root / "labels.zarr"), models=("t5=stranger:teacher",)))


def test_a_loader_that_is_named_must_be_there(real):
    with pytest.raises(UserError, match="loader nonsense"):
        verify.run(config(real, loaders=("nonsense",)))


def test_without_a_sample_no_teacher_is_loaded(real):
    assert verify.run(dataclasses.replace(config(real), sample=0))["reruns"] == {}


def test_a_bigger_sample_than_images_takes_all(real):
    assert verify.run(config(real, sample=1000, loaders=("torch",)))["passed"]


@pytest.mark.parametrize("change", [{"loaders": ()}, {"sample": -1}, {"seed": -1}])
def test_what_would_check_nothing_is_refused(store, change):
    with pytest.raises(UserError, match="sample and seed must be"):
        verify.run(VerifyConfig(store=store.url, **change))


def pin(url: str, name: str, change) -> None:
    """Changes a `zarr.json`, and its hash in the manifest."""
    root = Path(url)
    data = json.dumps(change(json.loads((root / name).read_text()))).encode()
    (root / name).write_bytes(data)
    values = unseal((root / "manifest.json").read_bytes(), "m")
    values["metadata"][name] = hashlib.sha256(data).hexdigest()
    (root / "manifest.json").write_bytes(seal(values))


def inner(metadata: dict) -> list:
    return metadata["codecs"][0]["configuration"]["codecs"]


def big_endian(metadata: dict) -> dict:
    inner(metadata)[0]["configuration"]["endian"] = "big"
    return metadata


def pickled(metadata: dict) -> dict:
    inner(metadata)[:] = [{"name": "numcodecs.pickle", "configuration": {}}]
    return metadata


def index_first(metadata: dict) -> dict:
    metadata["codecs"][0]["configuration"]["index_location"] = "start"
    return metadata


@pytest.mark.parametrize(
    "change",
    [
        big_endian,
        pickled,
        index_first,
        lambda metadata: metadata | {"fill_value": 0},
        lambda metadata: metadata | {"shape": [4, 99, 5]},
        lambda metadata: metadata | {"data_type": "int16"},
        lambda metadata: metadata | {"chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}}},
        lambda metadata: metadata | {"storage_transformers": [{"name": "other"}]},
        lambda metadata: metadata | {"attributes": {"scale_factor": 2}},
        lambda metadata: metadata | {"zarr_format": True},
        lambda metadata: [metadata],
    ],
)
def test_an_array_that_plain_zarr_would_read_otherwise_is_unsound(store, change):
    pin(store.url, "heads/wide/ids/zarr.json", change)
    assert "heads/wide/ids/zarr.json: plain zarr would read it otherwise" in str(failure(store.url))


def test_metadata_that_the_group_holds_for_its_arrays_is_unsound(store):
    """Consolidated metadata in the root is what plain zarr opens arrays by."""
    held = json.loads((Path(store.url) / "heads/wide/ids/zarr.json").read_text())
    inside = {"kind": "inline", "must_understand": False, "metadata": {"heads/wide/ids": big_endian(held)}}
    pin(store.url, "zarr.json", lambda group: group | {"consolidated_metadata": inside})
    assert "zarr.json: plain zarr would read it otherwise" in str(failure(store.url))


def test_fields_without_a_meaning_may_be_there(store):
    nothing = {"attributes": {}, "storage_transformers": []}
    pin(store.url, "heads/wide/ids/zarr.json", lambda metadata: metadata | nothing)
    pin(store.url, "zarr.json", lambda group: group | {"consolidated_metadata": None})
    assert verify.run(VerifyConfig(store=store.url))["passed"]


def test_an_array_that_the_manifest_does_not_know_is_unsound(store):
    shutil.copytree(Path(store.url) / "heads/wide", Path(store.url) / "heads/stray")
    assert "heads/stray: an array or group that the manifest does not know" in str(failure(store.url))
    (Path(store.url) / "notes").mkdir()  # no part of the store, and none for zarr
    shutil.rmtree(Path(store.url) / "heads/stray")
    assert verify.run(VerifyConfig(store=store.url))["passed"]


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace('"endian": "little"', '"endian": "big", "endian": "little"').encode(),
        lambda text: text.replace('"fill_value": 65535', '"fill_value": Infinity').encode(),
        lambda text: text.encode("utf-16"),
        lambda text: b"\xef\xbb\xbf" + text.encode(),
    ],
)
def test_metadata_that_readers_take_differently_is_unsound(store, change):
    """What Python's JSON takes in its own way: a key that is there twice, NaN as a number, other encodings."""
    name = "heads/wide/ids/zarr.json"
    path = Path(store.url) / name
    data = change(path.read_text())
    assert data != path.read_bytes()
    path.write_bytes(data)
    manifest = Path(store.url) / "manifest.json"
    values = unseal(manifest.read_bytes(), "m")
    values["metadata"][name] = hashlib.sha256(data).hexdigest()
    manifest.write_bytes(seal(values))
    assert f"{name}: cannot be read by every zarr" in str(failure(store.url))


@pytest.mark.parametrize("name", [".zgroup", "heads/wide/ids/.zarray", "heads/a b/zarr.json", ".hidden/.zarray"])
def test_metadata_of_another_version_or_under_odd_names_is_unsound(store, name):
    path = Path(store.url) / name
    path.parent.mkdir(exist_ok=True)
    shutil.copy(Path(store.url) / "heads/wide/ids/zarr.json", path)
    assert f"{name}: metadata of another version of zarr" in str(failure(store.url))
    path.unlink()
    (path.parent / ".DS_Store").write_bytes(b"")
    assert verify.run(VerifyConfig(store=store.url))["passed"]


def test_a_change_that_was_cut_short_is_told(store):
    root = Path(store.url)
    shutil.copy(root / "manifest.json", root / "manifest.next.json")
    assert "manifest.next.json: a change of this store is under way, or was cut short" in str(failure(store.url))


def test_labels_of_rows_that_are_marked_as_missing_are_told(store):
    path = Path(store.url) / "done/part-0-crop-0-row-0.json"
    path.write_bytes(seal(unseal(path.read_bytes(), "m") | {"missing": [3], "reasons": ["no JPEG"]}))
    assert "rows that are marked as missing have labels" in str(failure(store.url))


def restated(real: Path, folder: Path, **changes) -> str:
    """A copy of the store whose manifest says something else; its completion records do not say of what they are."""
    shutil.copytree(real / "labels.zarr", folder)
    values = unseal((folder / "manifest.json").read_bytes(), "m")
    (folder / "manifest.json").write_bytes(seal(values | changes))
    for path in (folder / "done").iterdir():
        path.write_bytes(seal(unseal(path.read_bytes(), "m") | {"source": ""}))
    return str(folder)


def test_a_manifest_of_fewer_images_than_the_pack_is_refused(real, tmp_path):
    store = restated(real, tmp_path / "s", images=31)
    with pytest.raises(UserError, match="its manifest counts 31 images and the pack has 32"):
        verify.run(config(real, store, sample=0))
    assert "plain zarr would read it otherwise" in str(failure(store))


def test_boxes_that_the_recipe_does_not_draw_are_told(real, tmp_path):
    values = unseal((real / "labels.zarr/manifest.json").read_bytes(), "m")
    store = restated(real, tmp_path / "s", crop_recipe=values["crop_recipe"] | {"seed": 7})
    assert "their boxes are not those that the manifest's crop_recipe draws" in str(failure(store, **of(real)))


def of(real: Path) -> dict:
    return {"pack": (real / "pack").read_text(), "sample": 0}


def test_a_teacher_without_an_input_size_cannot_be_asked_again(real, tmp_path):
    values = unseal((real / "labels.zarr/manifest.json").read_bytes(), "m")
    teachers = [teacher | {"preprocessing": {}} for teacher in values["teachers"]]
    store = restated(real, tmp_path / "s", teachers=teachers)
    with pytest.raises(UserError, match="its preprocessing names no input size"):
        verify.run(config(real, store))
