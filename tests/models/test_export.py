"""A student's features and heads from an exported file are those of the student, for every size of batch."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import repcon
from repcon import cli
from repcon.commands import outcome
from repcon.models import export
from repcon.models.factory import create_model
from repcon.models.preprocessing import normalise, preprocessing_of
from repcon.models.student import Student, load_student, save_student
from repcon.runtime import extras
from repcon.runtime.errors import UserError

SIZE = 64


@pytest.fixture(scope="module", params=[("test_efficientnet", 0), ("test_vit", 8)], ids=["convolutions", "transformer"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved student with two heads, of a convolutional network, and of a transformer with projections."""
    name, projection = request.param
    torch.manual_seed(0)
    backbone = create_model(name, num_classes=0, pretrained=False, size=SIZE)
    model = Student(backbone, {"birds": 5, "food": 7}, projection).eval()
    path = tmp_path_factory.mktemp(name) / "run" / "student"
    card = {"classes": {"birds": ["a", "b", "c", "d", "e"]}}
    save_student(model, path, preprocessing=preprocessing_of(backbone, SIZE), card=card)
    return path


def pixels(batch: int) -> torch.Tensor:
    return torch.randint(256, (batch, 3, SIZE, SIZE), generator=torch.Generator().manual_seed(7), dtype=torch.uint8)


def opened(path: Path, images: torch.Tensor) -> dict[str, np.ndarray]:
    """What the file answers, in the way that the closing line names."""
    if path.suffix == ".pt2":
        return {name: value.detach().numpy() for name, value in torch.export.load(path).module()(images).items()}
    session = pytest.importorskip("onnxruntime").InferenceSession(path)
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, {"images": images.numpy()}), strict=True))


def description(path: Path) -> str:
    """The JSON that the file says of itself."""
    if path.suffix == ".pt2":
        held = {export.METADATA: ""}
        torch.export.load(path, extra_files=held)
        return held[export.METADATA]
    session = pytest.importorskip("onnxruntime").InferenceSession(path)
    assert session.get_inputs()[0].shape == ["batch", 3, SIZE, SIZE]
    return session.get_modelmeta().custom_metadata_map[export.METADATA]


def expected_description(model: Student, heads: dict[str, list[str]], *, normalize: bool) -> str:
    inputs = preprocessing_of(model.backbone)
    taken = {"size": SIZE, "mean": list(inputs.mean), "std": list(inputs.std), "normalize": normalize}
    return json.dumps({"input": taken, "heads": heads})


@pytest.mark.parametrize("to", ["torch", "onnx"])
def test_features_are_the_student_s(folder: Path, to: str, tmp_path: Path) -> None:
    figures = repcon.export(folder.parent, to=to, out=tmp_path / f"one{export.SUFFIXES[to]}")
    path = Path(figures["file"])
    assert figures["bytes"] == path.stat().st_size and figures["difference"] < 1e-4
    assert [made.name for made in tmp_path.iterdir()] == [path.name]
    model = load_student(folder).eval()
    for batch in (1, 5):
        images = normalise(pixels(batch), preprocessing_of(model.backbone), torch.float32)
        found = opened(path, images)
        assert list(found) == ["features"]
        wanted = model.features(images).detach().numpy()
        np.testing.assert_allclose(found["features"], wanted, rtol=1e-3, atol=1e-4 * np.abs(wanted).max())
    assert description(path) == expected_description(model, {}, normalize=False)


@pytest.mark.parametrize("to", ["torch", "onnx"])
def test_with_heads_and_normalisation_it_takes_pixels(folder: Path, to: str, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["export", str(folder), "--to", to, "--normalize", "--heads"]) == 0
    path = folder / f"student{export.SUFFIXES[to]}"
    assert f"exported: {path}; next: {outcome.LOAD[to].format(repr(str(path)))}" in capsys.readouterr().out
    model = load_student(folder).eval()
    for batch in (1, 5):
        found = opened(path, pixels(batch))
        assert list(found) == ["features", "logits/birds", "logits/food"]
        logits = model(normalise(pixels(batch), preprocessing_of(model.backbone), torch.float32))
        for name, columns in model.head_slices.items():
            wanted = logits[:, columns].detach().numpy()
            np.testing.assert_allclose(found[f"logits/{name}"], wanted, rtol=1e-3, atol=1e-4 * np.abs(wanted).max())
    heads = {"birds": ["a", "b", "c", "d", "e"], "food": []}
    assert description(path) == expected_description(model, heads, normalize=True)


def test_what_cannot_be_exported_leaves_no_file(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"must end in \.onnx"):
        repcon.export(folder, to="onnx", out=tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="holds no student"):
        repcon.export(tmp_path, to="torch")
    monkeypatch.setattr(export, "_load_torch", lambda path: lambda images: {"features": np.zeros(1)})
    with pytest.raises(UserError, match="not written: its answers differ"):
        repcon.export(folder, to="torch", out=tmp_path / "one.pt2")
    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"--to onnx needs onnx, onnxscript.*pip install 'repcon\[export\]'"):
        repcon.export(folder, to="onnx", out=tmp_path / "one.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_branches_on_its_batch_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def branching(self: Student, images: torch.Tensor) -> torch.Tensor:
        return self.backbone(images) if images.mean() > 0 else self.backbone(-images)

    backbone = create_model("test_resnet", num_classes=0, pretrained=False)
    save_student(Student(backbone, {"one": 2}), tmp_path, preprocessing=preprocessing_of(backbone, 32), card={})
    monkeypatch.setattr(Student, "features", branching)
    with pytest.raises(UserError, match="test_resnet cannot be exported for batches of any size") as caught:
        repcon.export(tmp_path, to="torch", heads=True)
    assert "\n" not in str(caught.value)


def test_the_page_runs_as_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    page = (Path(__file__).parents[2] / "docs" / "how-to" / "export.md").read_text()
    monkeypatch.chdir(tmp_path)
    backbone = create_model("test_resnet", num_classes=0, pretrained=False)
    inputs = preprocessing_of(backbone, 128)
    save_student(Student(backbone, {"one": 2}), "demo-run/student/student", preprocessing=inputs, card={})
    for words in re.findall(r"^repcon (.*)$", page, re.MULTILINE):
        assert cli.main(words.split()) == 0
    for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        names: dict = {}
        exec(compile(code, "export.md", "exec"), names)
        assert names["features"].shape == (5, backbone.num_features)
