"""`init_students`: the mean of earlier students as a start, head by head; what is refused; resumes."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from start_case import make_case, start_settings
from training_case import stop_after

from repcon.commands import train
from repcon.config import HeadConfig, OptimConfig
from repcon.models import initial_weights
from repcon.models.student import load_student
from repcon.runtime.console import console
from repcon.runtime.errors import UserError

STILL = OptimConfig(lr=1e-60, weight_decay=0.0)
ALL = tuple(HeadConfig(name=name) for name in ("generalist", "birds", "other"))


@pytest.fixture(scope="session")
def related(tmp_path_factory: pytest.TempPathFactory, picture_folder: Path) -> Path:
    """The case with two students: `first` of generalist and birds, `second` of generalist and other."""
    root = make_case(tmp_path_factory.mktemp("students"), picture_folder)
    for out, other, seed in (("first", "birds", 0), ("second", "other", 1)):
        heads = (HeadConfig(name="generalist"), HeadConfig(name=other))
        train.run(start_settings(root, root / out, heads=heads, seed=seed, optim=OptimConfig(lr=1e-2)))
    return root


def students(related: Path) -> tuple[str, str]:
    return str(related / "first"), str(related / "second")


def backbone_of(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "student" / "model.safetensors")


def head_of(out: str | Path, name: str) -> torch.Tensor:
    made = load_student(out)
    return made.answer.weight[made.head_slices[name]]


def test_the_start_is_the_mean_of_the_students_and_each_head_that_of_those_that_have_it(
    related: Path, tmp_path: Path
) -> None:
    """A head that both have starts as the mean, any other as it is; with a rate of nothing all come out again."""
    first, second = students(related)
    out = tmp_path / "run"
    with console.capture() as told:
        results = train.run(start_settings(related, out, heads=ALL, init_students=(first, second), optim=STILL))
    start = results["init"]
    assert start["init"] == "students" and start["shares"] == {first: 0.5, second: 0.5}
    assert start["warm_heads"] == ["generalist", "birds", "other"] and not start["warmed_up_heads"]
    parts = [backbone_of(Path(folder)) for folder in (first, second)]
    for key, value in backbone_of(out).items():
        if value.is_floating_point():
            torch.testing.assert_close(value, (parts[0][key] + parts[1][key]) / 2)
    torch.testing.assert_close(
        head_of(out, "generalist"), (head_of(first, "generalist") + head_of(second, "generalist")) / 2
    )
    assert torch.equal(head_of(out, "birds"), head_of(first, "birds"))
    assert torch.equal(head_of(out, "other"), head_of(second, "other"))
    words = re.sub(r"\s+", " ", told.get())
    assert f"0.50 {first} + 0.50 {second}" in words and "from the students: generalist, birds, other" in words
    card = (out / "student" / "README.md").read_text()
    assert "the mean of weights, 0.50 of" in card and "Heads from these students: generalist, birds, other" in card


def test_a_head_that_no_student_has_is_learnt_first(related: Path, tmp_path: Path) -> None:
    first, _ = students(related)
    settings = start_settings(related, tmp_path / "run", heads=ALL, init_students=(first,), optim=STILL)
    results = train.run(settings)
    assert results["init"]["warm_heads"] == ["generalist", "birds"]
    assert results["init"]["warmed_up_heads"] == ["other"]


@pytest.mark.parametrize("changes", [{"init_heads": False}, {"projection": 8}], ids=["init_heads", "projection"])
def test_without_heads_of_the_students_the_backbone_is_their_mean(
    related: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    out = tmp_path / "run"
    results = train.run(start_settings(related, out, init_students=students(related), optim=STILL, **changes))
    assert results["init"]["init"] == "students" and not results["init"]["warm_heads"]
    first, second = (backbone_of(Path(folder))["conv_stem.weight"] for folder in students(related))
    torch.testing.assert_close(backbone_of(out)["conv_stem.weight"], (first + second) / 2)


def test_a_resume_needs_the_same_students_but_does_not_read_them_again(
    related: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"init_students": students(related), "epochs": 2}
    whole = train.run(start_settings(related, tmp_path / "whole", **settings))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(5, patch)
        train.run(start_settings(related, tmp_path / "parts", **settings))
    with pytest.raises(UserError, match="init_students was"):
        train.run(start_settings(related, tmp_path / "parts", epochs=2, init_students=students(related)[:1]))
    monkeypatch.setattr(initial_weights, "load_students", None)
    parts = train.run(start_settings(related, tmp_path / "parts", **settings))
    assert parts["init"] == whole["init"]
    first, second = backbone_of(tmp_path / "whole"), backbone_of(tmp_path / "parts")
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"init": "average"}, "init: the start is that of init_students"),
        ({"init_weights": {"birds": 1.0}}, "init_weights: the start is that of init_students"),
        ({"models": ("birds=x",)}, "models: the start is that of init_students"),
        ({"pretrained": False}, "init_students: .*pretrained is false"),
        ({"init_students": ("nowhere",)}, "init_students: nowhere: holds no student of `repcon train`"),
        ({"backbone": "other"}, "init_students: .*test_efficientnet is another architecture than test_resnet"),
    ],
)
def test_mistakes_are_named(related: Path, tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    if "backbone" in changes:
        changes = {"backbone": str(related / changes["backbone"])}
    given = {"init_students": students(related)} | changes
    with pytest.raises(UserError, match=says):
        train.run(start_settings(related, tmp_path / "run", **given))


def test_a_head_of_another_teacher_of_that_name_is_refused(related: Path, tmp_path: Path) -> None:
    index = tmp_path / "first" / "student" / "heads.json"
    shutil.copytree(related / "first", tmp_path / "first")
    index.write_text(index.read_text().replace('"birds": "', '"birds": "0'))
    with pytest.raises(UserError, match=r"first: its head birds is of another teacher \(5 classes, weights 0"):
        train.run(start_settings(related, tmp_path / "run", init_students=(str(tmp_path / "first"),)))


def test_weights_that_are_no_numbers_are_refused(related: Path, tmp_path: Path) -> None:
    shutil.copytree(related / "first", tmp_path / "broken")
    file = tmp_path / "broken" / "student" / "model.safetensors"
    state = load_file(file)
    state["bn1.running_mean"][0] = float("nan")
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"broken.*bn1.running_mean has values that are not finite"):
        train.run(start_settings(related, tmp_path / "run", init_students=(str(tmp_path / "broken"),)))
