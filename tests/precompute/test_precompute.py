"""The first main path: labels that belong to their crops, resume, append, and faults."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from precompute_case import SIZE, contents, pack_path, recipe, rot, teacher_folders, with_teachers

from repcon import config
from repcon.commands import inspect, precompute, verify
from repcon.config import CropConfig, InspectConfig, PrecomputeConfig, TeacherConfig, VerifyConfig
from repcon.crops.plan import plan_crops
from repcon.decode.reference import crop, decode
from repcon.images.pack import ImagePack
from repcon.labels import topk
from repcon.labels.store import LabelStore
from repcon.models import teacher as teachers
from repcon.models.preprocessing import normalise
from repcon.precompute import engine, ensemble
from repcon.precompute.context import absolute
from repcon.precompute.output_store import lease_folder, run_folder
from repcon.precompute.progress import Display, Event
from repcon.runtime.errors import UserError
from repcon.runtime.run_dir import RunDir

__all__ = ["pack_path", "recipe", "teacher_folders"]
FIXTURES = Path(__file__).parents[1] / "fixtures"


def own(recipe: PrecomputeConfig, factory: str) -> PrecomputeConfig:
    return replace(recipe, teachers=(TeacherConfig(name="own", model=f"precompute_case:{factory}"),))


def recomputed(store: LabelStore, pack: ImagePack, head: str, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One crop of all images, through PIL, the reference's resize and a plain forward pass, one image at a time."""
    info = store.heads[head]
    teacher = teachers.load_stored_teacher(info.metadata, "cpu")
    crop_labels, rows = store.reader.crop_labels(number), []
    for row in range(len(pack)):
        pixels = crop(
            decode(pack.read(row)), crop_labels.boxes[row], teacher.preprocessing.size, bool(crop_labels.flips[row])
        )
        rows.append(teacher(pixels[None])[0])
    return topk.encode(torch.stack(rows), info.k, info.temperatures)


def test_stored_labels_are_the_teachers_answers_on_the_same_crops(recipe, teacher_folders, pack_path):
    figures = precompute.run(with_teachers(recipe, teacher_folders, "five", "wide"))
    pack, store = ImagePack.open(pack_path), LabelStore.open(recipe.out)
    planned = plan_crops(recipe.crop, pack.hashes, pack.sizes, range(8))
    assert store.completion.unfinished() == [] and figures["crops"] == figures["total_crops"] == 8 * len(pack)
    for head in ("five", "wide"):
        for number in (0, 7):
            ids, logp = recomputed(store, pack, head, number)
            crop_labels = store.reader.crop_labels(number)
            held_ids, held = crop_labels.labels[head]
            assert (crop_labels.boxes == planned.boxes[number]).all() and (
                crop_labels.flips == planned.flips[number]
            ).all()
            assert np.allclose(held.astype(np.float32), logp.numpy(), atol=2e-3)
            same = held_ids == ids.numpy()
            assert same.mean() > 0.98  # Ranks swap only where float32 sums in another order make a tie.


def test_every_loader_gives_nearly_the_same_labels(recipe):
    precompute.run(recipe)
    other = replace(recipe, out=recipe.out + "-torch", loader="torch")
    precompute.run(other)
    left, right = (LabelStore.open(out).reader.crop_labels(0).labels["five"][1] for out in (recipe.out, other.out))
    assert np.abs(left.astype(np.float32) - right.astype(np.float32)).max() < 0.1


def test_teachers_of_equal_inputs_share_one_tensor(recipe, teacher_folders, monkeypatch):
    seen = []

    def counted(images, preprocessing, dtype):
        seen.append(len(images))
        return normalise(images, preprocessing, dtype)

    monkeypatch.setattr(ensemble, "normalise", counted)
    loaded = with_teachers(recipe, teacher_folders, "five", "nine", "wide")
    context = precompute.set_up(loaded)
    seen.clear()
    engine.work(context, lambda event: None)
    assert sum(seen) == 2 * 8 * 32  # Two inputs (32 and 48 pixels) for three teachers.


def test_a_finished_store_is_left_alone(recipe):
    precompute.run(recipe)
    before = {path: path.stat().st_mtime_ns for path in Path(recipe.out).rglob("*")}
    figures = precompute.run(recipe)
    assert figures["images"] == figures["crops"] == 0
    assert before == {path: path.stat().st_mtime_ns for path in Path(recipe.out).rglob("*")}


class Stopped(Exception):
    pass


def test_resume_does_the_rest_only_and_ends_byte_identical(recipe):
    precompute.run(recipe)
    cut = replace(recipe, out=recipe.out + "-cut")

    def stop_after_two(event):
        stop_after_two.units += bool(event.unit)
        if stop_after_two.units == 2:
            raise Stopped

    stop_after_two.units = 0
    with pytest.raises(Stopped):
        engine.work(precompute.set_up(cut), stop_after_two)
    left = LabelStore.open(cut.out).completion.unfinished()
    assert 1 <= len(left) <= 2
    figures = precompute.run(cut)
    assert figures["images"] == sum(len(unit.rows) for unit in left)
    assert contents(cut.out) == contents(recipe.out)


@pytest.mark.parametrize(
    "change, field",
    [
        ({"k": 3}, "k:"),
        ({"temperatures": (1.0,)}, "temperatures"),
        ({"crop": CropConfig(seed=4)}, "crop_recipe.seed"),
        ({"codec": "lz4"}, "codec"),
        ({"rows_per_shard": 16}, "rows_per_shard"),
        ({"crops": 4}, "crops"),
    ],
)
def test_a_resume_with_another_recipe_is_refused(recipe, change, field):
    precompute.run(recipe)
    before = contents(recipe.out)
    with pytest.raises(UserError, match=field):
        precompute.run(replace(recipe, **change))
    assert contents(recipe.out) == before


def test_a_resume_with_other_weights_preprocessing_or_pack_is_refused(recipe, teacher_folders, tmp_path, pack_path):
    precompute.run(recipe)
    other = replace(recipe, teachers=(replace(recipe.teachers[0], model=str(teacher_folders["nine"])),))
    with pytest.raises(UserError, match=r"teachers\.five"):
        precompute.run(other)
    with pytest.raises(UserError, match=r"teachers\.five\.preprocessing\.size"):
        precompute.run(replace(recipe, teachers=(replace(recipe.teachers[0], size=48),)))
    with pytest.raises(UserError, match=r"teachers\.five\.precision"):
        precompute.run(replace(recipe, teachers=(replace(recipe.teachers[0], precision="bf16"),)))
    from repcon.commands import pack as packing

    folder = tmp_path / "one" / "class"
    folder.mkdir(parents=True)
    (folder / "a.jpg").write_bytes(ImagePack.open(pack_path).read(0))
    packing.run(config.PackConfig(source=str(tmp_path / "one"), out=str(tmp_path / "other"), num_workers=1))
    with pytest.raises(UserError, match=r"pack_fingerprint|images"):
        precompute.run(replace(recipe, pack=str(tmp_path / "other")))


def test_a_resume_is_refused_where_the_teacher_answers_otherwise(recipe, monkeypatch):
    """Weights and architecture are the same: only its answers show it."""
    mine = own(recipe, "moody")
    precompute.run(mine)
    for marker in sorted(Path(recipe.out, "done").glob("*.json"))[1:]:
        marker.unlink()
    monkeypatch.setenv("MOOD", "1.5")
    with pytest.raises(UserError, match=r"teacher own: it answers otherwise than when the store's labels were made"):
        precompute.run(mine)
    assert len(LabelStore.open(recipe.out).completion.unfinished()) == 3
    monkeypatch.setenv("MOOD", "1.001")  # as far as another device's last digits
    assert precompute.run(mine)["units"] == 3


def test_a_teacher_that_failed_before_its_first_unit_can_be_mended(recipe, teacher_folders):
    """Beside a finished teacher, and alone; what is finished is never given to another."""
    for out, first in ((recipe.out, True), (recipe.out + "-alone", False)):
        if first:
            precompute.run(recipe)
        broken = replace(own(recipe, "nan"), out=out)
        with pytest.raises(UserError, match="not a number"):
            precompute.run(broken)
        mended = TeacherConfig(name="own", model=str(teacher_folders["wide"]))  # another network, more classes
        precompute.run(replace(broken, teachers=(mended,)))
        store = LabelStore.open(out)
        assert store.completion.unfinished() == [] and store.heads["own"].classes == 40
        assert list(store.heads) == (["five", "own"] if first else ["own"])
        with pytest.raises(UserError, match="own"):
            precompute.run(broken)
    plain = replace(recipe, teachers=(mended,), out=recipe.out + "-plain")
    precompute.run(plain)
    left, right = (LabelStore.open(out).reader.crop_labels(1).labels["own"] for out in (recipe.out, plain.out))
    assert all(map(np.array_equal, left, right))


def test_a_teacher_that_writes_into_its_input_spoils_no_other(recipe, teacher_folders):
    tidy = TeacherConfig(name="five", model=str(teacher_folders["five"]))
    rude = TeacherConfig(name="rude", model="precompute_case:rude")
    precompute.run(replace(recipe, teachers=(tidy,)))
    both = replace(recipe, teachers=(rude, tidy), out=recipe.out + "-both")
    precompute.run(both)
    left, right = (LabelStore.open(out).reader.crop_labels(2).labels["five"] for out in (recipe.out, both.out))
    assert all(map(np.array_equal, left, right))


def test_an_appended_teacher_equals_one_that_was_there_from_the_start(recipe, teacher_folders):
    both = with_teachers(replace(recipe, out=recipe.out + "-both"), teacher_folders, "five", "wide")
    precompute.run(both)
    precompute.run(recipe)
    before = contents(recipe.out, "heads/five")
    figures = precompute.run(with_teachers(recipe, teacher_folders, "wide"))  # One at a time: only the new one named.
    assert figures["crops"] == 8 * 32
    assert contents(recipe.out, "heads/five") == before
    assert contents(recipe.out, "heads/wide") == contents(both.out, "heads/wide")
    assert precompute.run(replace(both, out=recipe.out))["crops"] == 0


def test_more_crops_leave_the_first_as_they_are(recipe, teacher_folders):
    precompute.run(recipe)
    before = contents(recipe.out, "heads")
    figures = precompute.run(replace(recipe, crops=16))
    after, store = contents(recipe.out, "heads"), LabelStore.open(recipe.out)
    assert figures["crops"] == 8 * 32 and store.crops == 16 and store.completion.unfinished() == []
    assert all(after[name] == digest for name, digest in before.items() if not name.endswith("zarr.json"))
    pack = ImagePack.open(recipe.pack)
    assert (store.reader.crop_labels(12).boxes == plan_crops(recipe.crop, pack.hashes, pack.sizes, [12]).boxes[0]).all()
    with pytest.raises(UserError, match="takes every teacher, also five"):
        precompute.run(with_teachers(replace(recipe, crops=24), teacher_folders, "nine"))


def test_a_rotten_image_is_marked_and_the_rest_is_as_ever(recipe, pack_path, tmp_path):
    precompute.run(recipe)
    rotten = tmp_path / "rotten"
    shutil.copytree(pack_path, rotten)
    keys = [rot(rotten, row) for row in (5, 17)]
    damaged = replace(recipe, pack=str(rotten), out=recipe.out + "-rotten")
    with pytest.raises(UserError, match="2 images could not be decoded") as caught:
        precompute.run(damaged)
    assert caught.value.figures["missing"] == 2
    store, whole = LabelStore.open(damaged.out), LabelStore.open(recipe.out)
    assert store.completion.missing_rows().tolist() == [5, 17] and store.completion.unfinished() == []
    rest = np.setdiff1d(np.arange(32), [5, 17])
    ids, logp = store.reader.crop_labels(3).labels["five"]
    assert np.isnan(logp[[5, 17]].astype(np.float32)).all()
    wanted = whole.reader.crop_labels(3).labels["five"]
    assert (ids[rest] == wanted[0][rest]).mean() > 0.99
    assert np.allclose(logp[rest].astype(np.float32), wanted[1][rest].astype(np.float32), atol=2e-3)
    lines = [json.loads(line) for line in (run_folder(damaged.out) / "metrics.jsonl").read_text().splitlines()]
    noted = {line["image"]: line["reason"] for line in lines if line["event"] == "missing"}
    assert set(noted) == set(keys) and all("changed" in reason for reason in noted.values())
    reasons = inspect.run(InspectConfig(store=damaged.out))["missing_rows"]
    assert [*reasons] == ["5", "17"] and all("changed" in reason for reason in reasons.values())
    assert str(rotten) not in str(reasons)
    figures = precompute.run(replace(damaged, tolerate_missing=True))
    assert figures["crops"] == 0 and figures["missing"] == 2


def test_a_file_that_cannot_be_read_stops_the_run_and_marks_nothing(recipe, pack_path, tmp_path):
    gone = tmp_path / "gone"
    shutil.copytree(pack_path, gone)
    for shard in gone.glob("*.tar"):
        shard.unlink()
    with pytest.raises(UserError, match="cannot be read"):
        precompute.run(replace(recipe, pack=str(gone)))
    store = LabelStore.open(recipe.out)
    assert len(store.completion.unfinished()) == 4 and len(store.completion.missing_rows()) == 0
    precompute.run(replace(recipe, pack=str(pack_path)))
    assert LabelStore.open(recipe.out).completion.unfinished() == []


def test_a_loader_that_fails_on_centred_squares_stops_the_run_and_marks_nothing(recipe, monkeypatch):
    def fails(self, resizer, places, state):
        raise UserError("out of memory in the loader")

    with monkeypatch.context() as patch, pytest.raises(UserError, match="out of memory in the loader"):
        patch.setattr("repcon.decode.threads.ThreadedLoader._fill", fails)
        precompute.run(replace(recipe, loader="torch"))
    store = LabelStore.open(recipe.out)
    assert len(store.completion.unfinished()) == 4 and len(store.completion.missing_rows()) == 0


def test_nan_from_a_teacher_names_teacher_and_image(recipe, pack_path):
    key = ImagePack.open(pack_path).keys[0]
    with pytest.raises(UserError, match=rf"teacher own: .*not a number.*image {key}, crop 0"):
        precompute.run(own(recipe, "nan"))
    assert len(LabelStore.open(recipe.out).completion.unfinished()) == 4


@pytest.mark.parametrize("values", ["float16", "quantized8"])
def test_masked_classes_are_stored_as_impossible_ones(recipe, pack_path, values):
    """A teacher that rules classes out answers -inf: with k of all its classes they are among the k."""
    precompute.run(replace(own(recipe, "masked"), values=values))
    store = LabelStore.open(recipe.out)
    ids, logp = store.reader.crop_labels(0).labels["own"]
    assert store.completion.unfinished() == [] and np.isfinite(logp[:, : store.heads["own"].k]).all()
    sums = np.where(np.isin(ids, (0, 3)), np.exp(logp[:, : ids.shape[1]].astype(np.float64)), 0).sum(1)
    np.testing.assert_allclose(sums, 1, atol=0.03)
    models = ("own=precompute_case:masked",)
    figures = verify.run(VerifyConfig(store=recipe.out, pack=str(pack_path), models=models, loaders=("torch",)))
    assert figures["passed"]


def test_out_of_memory_halves_the_batch_and_says_so(recipe, capsys):
    precompute.run(own(replace(recipe, out=recipe.out + "-plain", batch_size=4), "plain"))
    precompute.run(own(recipe, "small_memory"))
    said = capsys.readouterr().out
    assert "out of memory with 16 crops per pass: going on with 8" in said and "going on with 4" in said
    left, right = (
        LabelStore.open(out).reader.crop_labels(0).labels["own"] for out in (recipe.out, recipe.out + "-plain")
    )
    assert (left[0] == right[0]).all() and np.allclose(left[1].astype(float), right[1].astype(float), atol=1e-3)


def test_the_estimate_prints_and_writes_nothing(recipe, tmp_path, capsys):
    before = sorted(tmp_path.iterdir())
    figures = precompute.run(replace(recipe, estimate=True))
    assert sorted(tmp_path.iterdir()) == before
    assert figures["total_crops"] == 8 * 32 and figures["crops_per_second"] > 0
    losses = [figures["teachers"]["five"][k]["kl"] for k in (4, 8)]
    assert losses[0] >= losses[1] == 0.0  # Five classes: at k = 8 all of them are stored.
    both = figures["encodings"]
    assert both["quantized8"]["bytes"] < both["float16"]["bytes"] == figures["bytes"][recipe.k]
    said = " ".join(capsys.readouterr().out.split())
    assert "nothing was written" in said and "values = float16 (chosen): " in said and "values = quantized8: " in said


@pytest.mark.parametrize(
    "change, says",
    [
        ({"teachers": ()}, "none named"),
        ({"crops": -1}, "crops: -1"),
        ({"batch_size": -1}, "batch_size: -1"),
        ({"k": -1}, "k: -1"),
        ({"pack": "/no/such/pack"}, "no finished pack"),
    ],
)
def test_what_makes_no_sense_is_refused(recipe, change, says):
    with pytest.raises(UserError, match=says):
        precompute.run(replace(recipe, **change))


def test_names_must_differ_and_the_output_folder_must_be_free(recipe, tmp_path):
    with pytest.raises(UserError, match="a name of its own"):
        precompute.run(replace(recipe, teachers=recipe.teachers * 2))
    Path(recipe.out).mkdir()
    (Path(recipe.out) / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="holds other files"):
        precompute.run(recipe)
    assert (Path(recipe.out) / "thesis.txt").read_text() == "mine"


def test_the_batch_size_follows_from_the_models_and_is_the_same_again(recipe):
    sizes = {precompute.set_up(replace(recipe, batch_size=0)).config.batch_size for _ in range(2)}
    assert sizes == {32}


def test_bf16_and_the_model_s_own_size(recipe):
    teacher = replace(recipe.teachers[0], precision="bf16", size=0)
    precompute.run(replace(recipe, teachers=(teacher,)))
    metadata = LabelStore.open(recipe.out).heads["five"].metadata
    assert metadata.precision == "bf16" and metadata.preprocessing["size"] == SIZE


def test_ctrl_c_keeps_what_was_finished_and_says_how_to_go_on(recipe, tmp_path):
    slow = replace(own(recipe, "slow"), batch_size=8)  # Units of more than a second: the signal must find one at work.
    (tmp_path / "recipe.toml").write_text(config.dump(slow))
    command = [sys.executable, "-m", "repcon.cli", "precompute", "--recipe", str(tmp_path / "recipe.toml")]
    path = os.pathsep.join([str(FIXTURES), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path}
    # A shell's background jobs ignore SIGINT, and so would their children: the command must start without that.
    heeding = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, preexec_fn=heeding) as run:
        done, limit = Path(slow.out, "done"), time.monotonic() + 120
        while not (done.is_dir() and list(done.glob("*.json"))) and time.monotonic() < limit:
            time.sleep(0.02)
        run.send_signal(signal.SIGINT)
        said = run.communicate(timeout=60)[0]
    assert run.returncode == 130, said
    assert "the same command goes on there" in said.replace("\n", " ")
    assert not Path(lease_folder(slow.out)).exists()
    left = LabelStore.open(slow.out).completion.unfinished()
    assert 1 <= len(left) < 4
    assert precompute.run(slow)["images"] == sum(len(unit.rows) for unit in left)
    fresh = replace(slow, out=slow.out + "-fresh")
    precompute.run(fresh)
    assert contents(slow.out) == contents(fresh.out)


def test_an_append_does_not_wait_for_boxes_that_nobody_draws(recipe, teacher_folders, monkeypatch):
    precompute.run(recipe)
    markers = sorted(Path(recipe.out, "done").glob("*.json"))
    for marker in markers[1:]:
        marker.unlink()
    monkeypatch.setattr(engine, "STALL_SECONDS", 0.0)
    monkeypatch.setattr(engine, "WAIT_SECONDS", 0.01)
    with pytest.raises(UserError, match=r"3 units that hold the boxes were never finished.* recipe of five first"):
        precompute.run(with_teachers(recipe, teacher_folders, "nine"))
    precompute.run(with_teachers(recipe, teacher_folders, "five"))
    precompute.run(with_teachers(recipe, teacher_folders, "nine"))
    assert LabelStore.open(recipe.out).completion.unfinished() == []


def test_a_resume_with_fewer_teachers_is_refused_by_name(recipe, teacher_folders):
    precompute.run(with_teachers(recipe, teacher_folders, "five", "nine"))
    next(iter(Path(recipe.out, "done").glob("*.json"))).unlink()
    with pytest.raises(UserError, match="not finished need nine as well"):
        precompute.run(recipe)


def test_a_shard_that_is_cut_off_stops_the_run_and_marks_nothing(recipe, pack_path, tmp_path):
    cut = Path(shutil.copytree(pack_path, tmp_path / "cut"))
    for shard in cut.glob("*.tar"):
        os.truncate(shard, shard.stat().st_size // 3)
    with pytest.raises(UserError, match="is cut off"):
        precompute.run(replace(recipe, pack=str(cut)))
    assert len(LabelStore.open(recipe.out).completion.missing_rows()) == 0
    precompute.run(recipe)
    assert LabelStore.open(recipe.out).completion.unfinished() == []


def test_the_record_of_the_work_outlives_a_run_that_finds_nothing_to_do(recipe, capsys):
    precompute.run(recipe)
    results = run_folder(recipe.out) / "results.json"
    before = results.read_bytes()
    precompute.run(recipe)
    assert results.read_bytes() == before and "all labels are there already" in capsys.readouterr().out


def test_an_answer_of_another_shape_names_the_teacher(recipe):
    with pytest.raises(UserError, match=r"teacher own: its answer is \(15, 6\), and should be \(16, 6\)"):
        precompute.run(own(recipe, "forgetful"))


def test_paths_that_go_to_other_machines_are_from_the_root(recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own").mkdir()
    model = (TeacherConfig(name="a", model="own"), TeacherConfig(name="b", model="package:efficientnet_lite0"))
    sent = absolute(replace(recipe, pack="packs/a", out="s3://bucket/x", teachers=model))
    assert (sent.pack, sent.out) == (str(tmp_path / "packs/a"), "s3://bucket/x")
    assert [teacher.model for teacher in sent.teachers] == [str(tmp_path / "own"), "package:efficientnet_lite0"]


@pytest.mark.parametrize(
    "changes",
    [
        {"crop": CropConfig(flip=1.5)},
        {"crop": CropConfig(seed=-1)},
        {"temperatures": (0.0,)},
        {"codec": "zstd", "k": 10**6},
    ],
)
def test_a_refused_recipe_leaves_no_store_that_refuses_the_mended_one(recipe, changes):
    with pytest.raises(UserError):
        precompute.run(replace(recipe, **changes))
    assert not Path(recipe.out).exists() and not Path(recipe.out + ".leases").exists()
    assert precompute.run(recipe)["crops"] == 32 * 8


def test_growth_that_is_refused_adds_no_teacher(recipe, teacher_folders):
    precompute.run(recipe)
    before = contents(recipe.out)
    with pytest.raises(UserError, match="crops can grow from 8 in steps of 8"):
        precompute.run(replace(with_teachers(recipe, teacher_folders, "five", "nine"), crops=12))
    assert contents(recipe.out) == before


def test_the_store_s_settings_are_the_default_when_a_teacher_is_added(recipe, teacher_folders):
    first = replace(recipe, temperatures=(1.0, 3.0), crop=CropConfig(seed=5), k=3, codec="lz4", values="quantized8")
    precompute.run(first)
    added = replace(with_teachers(recipe, teacher_folders, "nine"), out=first.out)
    bare = replace(added, crops=0, k=0, temperatures=(), crop=CropConfig(), codec="auto", values="auto")
    assert precompute.run(bare)["crops"] == 8 * 32
    manifest = LabelStore.open(first.out).manifest
    assert (manifest.k, manifest.temperatures, manifest.codec, manifest.values) == (3, (1.0, 3.0), "lz4", "quantized8")
    for changes, field in (
        ({"k": 4}, "k: "), ({"temperatures": (2.0,)}, "temperatures"), ({"codec": "zstd"}, "codec"),
        ({"values": "float16"}, "values"), ({"crop": CropConfig(seed=6)}, "crop_recipe.seed"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=field):
            precompute.run(replace(bare, **changes))


def test_the_estimate_counts_what_the_store_lacks(recipe, teacher_folders, capsys):
    precompute.run(recipe)
    with_new = with_teachers(recipe, teacher_folders, "five", "nine")
    figures = precompute.run(replace(with_new, estimate=True))
    assert list(figures["teachers"]) == ["nine"] and figures["unlabelled_crops"] == 8 * 32
    next(iter(Path(recipe.out, "done").glob("*.json"))).unlink()
    assert precompute.run(replace(recipe, estimate=True))["unlabelled_crops"] == 8 * 8
    assert "the 64 of 256 crops that are left" in " ".join(capsys.readouterr().out.split())


def test_teachers_of_relative_paths_are_found_beside_the_store_and_all_missing_ones_named(
    recipe, teacher_folders, tmp_path, monkeypatch
):
    shutil.copytree(teacher_folders["five"], tmp_path / "runs" / "five")
    monkeypatch.chdir(tmp_path)
    near = replace(
        recipe, out=str(tmp_path / "runs" / "x.zarr"), teachers=(TeacherConfig(name="five", model="runs/five"),)
    )
    precompute.run(near)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert precompute.run(near)["crops"] == 0
    verify.run(VerifyConfig(store=near.out, pack=recipe.pack, sample=2, loaders=("reference",), device="cpu"))
    lost = tuple(TeacherConfig(name=name, model=f"runs/{name}") for name in ("gone", "lost"))
    with pytest.raises(UserError, match=r"runs/gone: no such folder; .*runs/lost: no such .* --teachers gone=MODEL"):
        precompute.run(replace(near, teachers=(*near.teachers, *lost)))


def test_progress_counts_answered_crops_only(recipe, tmp_path):
    record = RunDir(tmp_path / "run", "precompute", "")
    display = Display(record, crops=100)
    display.on_event(Event(images=5, crops=40))
    display.on_event(Event(unit="one", missing=(("a.jpg", "damaged"),), missing_crops=10))
    display.on_event(Event(remaining_crops=30))
    (task,) = display._bars.tasks
    assert (task.completed, task.total) == (60, 90)  # 20 of them by another command's processes
    assert display.figures()["crops"] == 40


def test_a_disk_without_room_for_the_labels_is_refused_before_work(recipe, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match=r"needs at least .* of disk, and .* are free; make room"):
        precompute.run(recipe)
    assert not (Path(recipe.out) / "manifest.json").exists()
    monkeypatch.undo()
    precompute.run(recipe)
