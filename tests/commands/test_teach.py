"""A generalist becomes a task teacher: on real JPEGs, with timm's smallest network."""

import io
import json
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from repcon.commands import pack, teach
from repcon.config import ClassSubset, OptimConfig, PackConfig, TeachConfig, TeacherConfig
from repcon.distill import finetune
from repcon.models import teacher as teachers
from repcon.models.preprocessing import normalise, preprocessing_of
from repcon.models.saved_model import save_model
from repcon.models.timm_import import timm
from repcon.runtime.errors import UserError


@pytest.fixture(scope="module")
def generalist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small classifier of 10 classes, random weights."""
    torch.manual_seed(0)
    model = timm.create_model("test_efficientnet", num_classes=10)
    folder = tmp_path_factory.mktemp("generalist")
    preprocessing = preprocessing_of(model, 32)
    save_model(model, folder, classes=[f"thing {i}" for i in range(10)], preprocessing=preprocessing, extra={})
    return folder


@pytest.fixture(scope="module")
def recipe(generalist: Path, picture_folder: Path) -> TeachConfig:
    return TeachConfig(
        data=str(picture_folder), out="", model=str(generalist), size=32, epochs=6, batch_size=8, val_fraction=0.25,
        optim=OptimConfig(lr=3e-3), loader="torch", device="cpu", license="CC0",
    )  # fmt: skip


@pytest.fixture(scope="module")
def taught(recipe: TeachConfig, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    out = tmp_path_factory.mktemp("teach") / "teacher"
    return out, teach.run(replace(recipe, out=str(out)))


def test_learns_and_keeps_the_best_epoch(taught: tuple[Path, dict]):
    out, results = taught
    epochs = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    epochs = [epoch for epoch in epochs if epoch["event"] == "epoch"]
    assert len(epochs) == 6
    assert epochs[-1]["loss"] < epochs[0]["loss"]
    best = max(epochs, key=lambda epoch: (epoch["held_accuracy"], -epoch["held_loss"]))
    assert results["best_epoch"] == best["epoch"]
    assert results["validation_accuracy"] == best["held_accuracy"]
    assert results["classes"] == 4 and results["train_images"] == 24 and results["validation_images"] == 8


def test_folder_opens_with_timm_and_as_a_teacher(taught: tuple[Path, dict]):
    out, results = taught
    model = timm.create_model(f"local-dir:{out}", pretrained=True)
    assert model.num_classes == 4
    teacher = teachers.load_teacher(TeacherConfig(name="task", model=str(out), size=32), "cpu")
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    inputs = normalise(pixels, preprocessing_of(model, 32), torch.float32)
    with torch.inference_mode():
        assert torch.allclose(model.eval()(inputs), teacher(pixels), atol=1e-5)
    assert list(teacher.metadata.classes) == results["class_names"]
    assert results["license"] == "CC0" and teacher.metadata.licence == "CC0"


def test_same_seed_same_teacher(recipe: TeachConfig, taught: tuple[Path, dict], tmp_path: Path):
    again = tmp_path / "again"
    teach.run(replace(recipe, out=str(again)))
    first, second = (timm.create_model(f"local-dir:{folder}", pretrained=True) for folder in (taught[0], again))
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name


def test_a_stopped_run_goes_on_to_the_same_teacher(
    recipe: TeachConfig, taught: tuple[Path, dict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    out = tmp_path / "stopped"
    for last in (0, 3):

        def interrupted(trainer, number, advance, *, last=last, epoch=finetune._Finetuner.train_epoch):
            if number > last:
                raise KeyboardInterrupt
            return epoch(trainer, number, advance)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(finetune._Finetuner, "train_epoch", interrupted)
            teach.run(replace(recipe, out=str(out)))
    with pytest.raises(UserError, match=r"epochs was 6 and is 7"):
        teach.run(replace(recipe, out=str(out), epochs=7))
    results = teach.run(replace(recipe, out=str(out)))
    assert results == taught[1] and not (out / "checkpoints").exists()
    first, second = (timm.create_model(f"local-dir:{folder}", pretrained=True) for folder in (taught[0], out))
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines if line["event"] == "epoch"] == [1, 2, 3, 4, 5, 6]
    env = (out / "env.json").read_bytes()
    assert teach.run(replace(recipe, out=str(out))) == results and (out / "env.json").read_bytes() == env


def test_frozen_blocks_and_norm_stay(recipe: TeachConfig, generalist: Path, tmp_path: Path):
    out = tmp_path / "frozen"
    teach.run(replace(recipe, out=str(out), epochs=1, freeze_blocks=2, freeze_norm=True))
    start, end = (
        timm.create_model(f"local-dir:{folder}", pretrained=True).state_dict() for folder in (generalist, out)
    )
    changed = {
        name for name in start if start[name].shape == end[name].shape and not torch.equal(start[name], end[name])
    }
    assert changed
    assert not any(name.startswith(("conv_stem", "bn1", "blocks.0.", "blocks.1.")) for name in changed)
    assert not any("running_" in name for name in changed)


def test_class_halves_share_nothing(recipe: TeachConfig, tmp_path: Path):
    halves = []
    for place, (start, stop) in enumerate(((0, 0.5), (0.5, 1))):
        subset = ClassSubset(seed=3, start=start, stop=stop)
        halves.append(teach.run(replace(recipe, out=str(tmp_path / str(place)), epochs=1, classes=subset)))
    names = [set(half["class_names"]) for half in halves]
    assert names[0].isdisjoint(names[1]) and len(names[0] | names[1]) == 4


def test_no_validation_keeps_the_last_epoch(recipe: TeachConfig, tmp_path: Path):
    results = teach.run(replace(recipe, out=str(tmp_path / "all"), epochs=2, val_fraction=0.0))
    assert results["best_epoch"] == 2 and results["validation_images"] == 0
    assert np.isnan(results["validation_accuracy"])


@pytest.mark.parametrize(("change", "words"), [
    ({"val_fraction": 1.0}, "val_fraction"), ({"epochs": 0}, "epochs"), ({"classes": ClassSubset(stop=0.25)}, "class"),
    ({"optim": OptimConfig(lr=1e30, clip_norm=0.0, warmup_epochs=0.0)}, "optim.lr"), ({"data": "nowhere"}, "nowhere"),
])  # fmt: skip
def test_mistakes_are_named(recipe: TeachConfig, tmp_path: Path, change: dict, words: str):
    with pytest.raises(UserError, match=words):
        teach.run(replace(recipe, out=str(tmp_path / "out"), **change))


def test_unlabelled_images_are_refused(recipe: TeachConfig, picture_folder: Path, tmp_path: Path):
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in (picture_folder / "apple").iterdir():
        (flat / path.name).write_bytes(path.read_bytes())
    with pytest.raises(UserError, match="label"):
        teach.run(replace(recipe, data=str(flat), out=str(tmp_path / "out")))


def test_a_finished_teacher_is_neither_taught_again_nor_replaced(recipe: TeachConfig, taught: tuple[Path, dict]):
    out, results = taught
    weights = (out / "model.safetensors").read_bytes()
    assert teach.run(replace(recipe, out=str(out))) == json.loads(json.dumps(results))
    with pytest.raises(UserError, match="holds another run of `repcon teach`: epochs is"):
        teach.run(replace(recipe, out=str(out), epochs=7))
    assert (out / "model.safetensors").read_bytes() == weights
    assert len((out / "metrics.jsonl").read_text().splitlines()) >= 6


def test_files_are_for_whom_the_user_s_mask_allows(taught: tuple[Path, dict]):
    out, _ = taught
    assert (out / "model.safetensors").stat().st_mode == (out / "config.json").stat().st_mode


def test_corrected_labels_are_other_data(recipe: TeachConfig, picture_folder: Path, tmp_path: Path):
    """The images are the same, and so is the fingerprint of their pack."""
    packs = []
    for name, order in (("wrong", [1, 0, 2, 3]), ("right", [0, 1, 2, 3])):
        path = tmp_path / f"{name}.tar"
        folders = sorted(picture_folder.iterdir())
        with tarfile.open(path, "w") as tar:
            for number, image in enumerate(sorted(picture_folder.rglob("*.jpg"))):
                label = folders[order[folders.index(image.parent)]].name
                for suffix, data in ((".jpg", image.read_bytes()), (".cls", label.encode())):
                    entry = tarfile.TarInfo(f"{number:04d}{suffix}")
                    entry.size = len(data)
                    tar.addfile(entry, io.BytesIO(data))
        pack.run(PackConfig(source=str(path), out=str(tmp_path / name), num_workers=1))
        packs.append(tmp_path / name)
    wrong, right = (replace(recipe, data=str(held), out=str(tmp_path / "out"), epochs=1) for held in packs)
    first = teach.run(wrong)
    assert teach.run(wrong) == first
    with pytest.raises(UserError, match="other labels of these images"):
        teach.run(right)


def test_a_record_that_a_power_cut_damaged_is_named(taught: tuple[Path, dict], recipe: TeachConfig, tmp_path):
    out = Path(shutil.copytree(taught[0], tmp_path / "out"))
    (out / "config.toml").write_bytes(b"\xff\x00")
    with pytest.raises(UserError, match=r"config\.toml: cannot be read"):
        teach.run(replace(recipe, out=str(out)))
