"""A student's heads beside their teachers: which images count, what is refused, and that the figures are theirs."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from repcon.commands import evaluate, teach
from repcon.config import ClassSubset, EvaluateConfig, OptimConfig, TeachConfig, TeacherConfig
from repcon.evaluation import heads
from repcon.evaluation.probes import split_classes
from repcon.images.format import MANIFEST
from repcon.images.pack import ImagePack
from repcon.images.packing import open_or_pack
from repcon.models import teacher as teachers
from repcon.models.factory import create_model
from repcon.models.identity import class_names_of
from repcon.models.preprocessing import preprocessing_of
from repcon.models.saved_model import save_model
from repcon.models.student import Student, save_student
from repcon.models.timm_import import timm
from repcon.runtime.errors import UserError


@pytest.fixture(scope="module")
def pack(picture_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    opened = open_or_pack(str(picture_folder), tmp_path_factory.mktemp("packs"))
    assert len(opened) == 32
    return next(Path(tmp_path_factory.getbasetemp()).glob(f"packs*/*/{MANIFEST}")).parent


@pytest.fixture(scope="module")
def teacher(pack: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher of three of the four classes, a quarter of each held out."""
    root = tmp_path_factory.mktemp("teacher")
    torch.manual_seed(0)
    start = timm.create_model("test_efficientnet", num_classes=5)
    save_model(start, root / "start", classes=list("abcde"), preprocessing=preprocessing_of(start, 32), extra={})
    teach.run(
        TeachConfig(
            data=str(pack), out=str(root / "teacher"), model=str(root / "start"), classes=ClassSubset(stop=0.75),
            size=32, epochs=2, batch_size=8, optim=OptimConfig(lr=1e-3), val_fraction=0.25, device="cpu",
            loader="torch",
        )
    )  # fmt: skip
    return root / "teacher"


def write_student(folder: Path, teacher: Path, *, copied: bool, names: list[str] | None = None) -> Path:
    """A student whose backbone is the teacher's, and whose head is its classifier where `copied`."""
    model = create_model(str(teacher))
    classifier, inputs = model.get_classifier(), preprocessing_of(model)
    classes = names or list(class_names_of(model))
    model.reset_classifier(0)
    made = Student(model, {"other": 4, "task": len(classes)})
    if copied:
        made.init_head("task", classifier.weight, classifier.bias)
    card = {"classes": {"task": classes, "other": list("wxyz")}, "teachers": []}
    save_student(made, folder, preprocessing=inputs, card=card)
    return folder


@pytest.fixture(scope="module")
def recipe(pack: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> EvaluateConfig:
    folder = write_student(tmp_path_factory.mktemp("student") / "student", teacher, copied=True)
    return EvaluateConfig(
        data=str(pack), out="", backbones=(f"student={folder}",), heads=True, teachers=(f"task={teacher}",), metrics=(),
        loader="torch", device="cpu",
    )  # fmt: skip


def test_a_copied_head_is_level_with_its_teacher_on_what_it_held_out(recipe, pack, tmp_path, capsys):
    [row] = evaluate.run(replace(recipe, out=str(tmp_path / "out")))["heads"]
    assert row["held_out"] and row["images"] == 6 and row["classes"] == 3  # Two of eight in each of three classes.
    assert row["teacher_accuracy"] == row["head_accuracy"] and row["difference"]["mean"] == 0
    assert (row["student"], row["head"]) == ("student", "task")
    said = capsys.readouterr().out
    assert "Heads beside their teachers" in said and "flattered" not in said


def test_the_figures_are_those_of_the_models_themselves(recipe, pack, teacher, tmp_path):
    folder = write_student(tmp_path / "student", teacher, copied=False)
    [check] = heads.plan_heads(
        replace(recipe, backbones=(f"s={folder}",)), {"s": str(folder)}, {"data": open_or_pack(str(pack), tmp_path)}
    )
    held = split_classes(
        check.pack.labels[np.isin(check.pack.labels, np.unique(check.pack.labels[check.rows]))], 0.25, 0
    )
    assert len(held[1]) == len(check.rows)
    [row] = evaluate.run(replace(recipe, backbones=(f"s={folder}",), out=str(tmp_path / "out")))["heads"]
    accuracies = (row["head_accuracy"]["mean"], row["teacher_accuracy"]["mean"])
    assert np.isclose(row["difference"]["mean"], accuracies[0] - accuracies[1])


def test_images_that_are_not_the_teachers_own_are_marked(recipe, picture_folder, tmp_path, capsys):
    """Another pack: what the teacher was trained on is not known."""
    for number, folder in enumerate(sorted(picture_folder.iterdir())):
        (tmp_path / "data" / folder.name).mkdir(parents=True)
        for path in sorted(folder.iterdir())[: 3 + number]:
            (tmp_path / "data" / folder.name / path.name).write_bytes(path.read_bytes())
    results = evaluate.run(replace(recipe, data=str(tmp_path / "data"), out=str(tmp_path / "out")))
    [row] = results["heads"]
    assert not row["held_out"] and row["classes"] == 3 and "verdict" not in results
    assert "flattered" in " ".join(capsys.readouterr().out.split())


def test_a_name_of_several_classes_matches_no_image(pack, teacher):
    """Which of them the image belongs to is not known."""
    held = teachers.load_teacher(TeacherConfig(name="task", model=str(teacher)), "cpu")
    first, second, third = held.metadata.classes
    for names, left in (((first, second, third), 3), ((first, second, first), 1)):
        metadata = replace(held.metadata, classes=names, model="x")
        rows, targets, _ = heads._images(replace(held, metadata=metadata), ImagePack.open(pack))
        assert len(set(targets.tolist())) == left and len(rows) == 8 * left


def test_backbones_that_are_called_like_a_head_are_its_teachers(recipe, teacher, tmp_path, capsys):
    both = replace(recipe, teachers=(), backbones=(*recipe.backbones, f"task={teacher}"), metrics=("knn",))
    results = evaluate.run(replace(both, out=str(tmp_path / "out")))
    assert [row["head"] for row in results["heads"]] == ["task"] and results["verdict"]["subject"] == "student"
    assert list(results["backbones"]) == ["student", "task"]


@pytest.mark.parametrize(("change", "words"), [
    ({"backbones": ("x=package:efficientnet_lite0",)}, "none of the backbones is a student"),
    ({"teachers": ("nobody=x",)}, "teachers: 'nobody=x' must be NAME=MODEL, with a NAME of "),
    ({"teachers": ()}, "teachers: none named"),
    ({"heads": False}, "metrics: none named"),
])  # fmt: skip
def test_mistakes_are_named(recipe, tmp_path, change, words):
    with pytest.raises(UserError, match=words):
        evaluate.run(replace(recipe, out=str(tmp_path / "out"), **change))


def test_other_classes_than_the_heads_are_refused(recipe, teacher, picture_folder, tmp_path):
    folder = write_student(tmp_path / "student", teacher, copied=False, names=["apple", "beech", "cedar"])
    with pytest.raises(UserError, match="is not the teacher of the head task: "):
        evaluate.run(replace(recipe, backbones=(f"s={folder}",), out=str(tmp_path / "out")))
    for name, source in (("elm", "apple"), ("fir", "birch")):
        (tmp_path / "data" / name).mkdir(parents=True)
        for path in sorted((picture_folder / source).iterdir())[:3]:
            (tmp_path / "data" / name / path.name).write_bytes(path.read_bytes())
    with pytest.raises(UserError, match=r"no class of the data \(elm, fir\)"):
        evaluate.run(replace(recipe, data=str(tmp_path / "data"), out=str(tmp_path / "other")))
