"""One linear layer for all heads, starts, freezing, saving."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from training_case import teacher_metadata

from repcon.labels.store import HeadInfo
from repcon.models.factory import create_model
from repcon.models.identity import weight_hash
from repcon.models.preprocessing import preprocessing_of
from repcon.models.saved_model import save_model
from repcon.models.student import Student, build_student, check_student_writable, load_student, save_student
from repcon.models.timm_import import timm
from repcon.runtime.errors import UserError


def heads(**classes: int) -> dict[str, HeadInfo]:
    return {name: HeadInfo(name, count, 2, (1.0,), teacher_metadata(name, count)) for name, count in classes.items()}


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def test_heads_lie_side_by_side_in_one_layer(images: torch.Tensor) -> None:
    model = build_student("test_efficientnet", heads(a=5, b=7), pretrained=False).eval()
    assert model.head_slices == {"a": slice(0, 5), "b": slice(5, 12)}
    linear = [module for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert [layer.out_features for layer in linear] == [12]
    features = model.features(images)
    torch.testing.assert_close(model(images), model.answer(features))


def test_a_projection_keeps_heads_apart(images: torch.Tensor) -> None:
    model = build_student("test_efficientnet", heads(a=5, b=7), pretrained=False, projection=16).eval()
    model(images)[:, model.head_slices["a"]].sum().backward()
    used = [answer.weight.grad is not None and bool(answer.weight.grad.any()) for answer in model.answers]
    assert used == [True, False]
    hidden = model.project[0].weight.grad
    assert hidden is not None and hidden[:16].any() and not hidden[16:].any()


def test_a_head_starts_from_the_backbones_own_classifier(tmp_path: Path, images: torch.Tensor) -> None:
    generalist = timm.create_model("test_efficientnet", num_classes=9).eval()
    inputs = preprocessing_of(generalist, 64)
    save_model(generalist, tmp_path / "generalist", classes=(), preprocessing=inputs, extra={})
    own = weight_hash(create_model(str(tmp_path / "generalist")))
    stored = {
        "same": HeadInfo("same", 9, 2, (1.0,), teacher_metadata("same", 9, own)),
        "other": HeadInfo("other", 9, 2, (1.0,), teacher_metadata("other", 9, "other")),
    }
    model = build_student(str(tmp_path / "generalist"), stored).eval()
    logits = model(images)
    torch.testing.assert_close(logits[:, model.head_slices["same"]], generalist(images))
    assert not torch.allclose(logits[:, model.head_slices["other"]], generalist(images))
    fresh = build_student(str(tmp_path / "generalist"), stored, init_heads=False).eval()
    assert not torch.allclose(fresh(images)[:, :9], generalist(images))


def test_heads_of_the_same_teachers_go_on_where_an_earlier_student_is_the_backbone(
    tmp_path: Path, images: torch.Tensor
) -> None:
    stored = {
        "a": HeadInfo("a", 5, 2, (1.0,), teacher_metadata("a", 5, "weights of a")),
        "b": HeadInfo("b", 7, 2, (1.0,), teacher_metadata("b", 7, "weights of b")),
    }
    earlier = build_student("test_efficientnet", stored, pretrained=False, size=64).eval()
    inputs = preprocessing_of(earlier.backbone, 64)
    card = {"teachers": [{"name": name, "weight_hash": f"weights of {name}"} for name in stored]}
    save_student(earlier, tmp_path / "run" / "student", preprocessing=inputs, card=card)
    later = {
        "new": HeadInfo("new", 7, 2, (1.0,), teacher_metadata("new", 7, "weights of new")),
        "renamed": HeadInfo("renamed", 7, 2, (1.0,), teacher_metadata("renamed", 7, "weights of b")),
        "a": HeadInfo("a", 5, 2, (1.0,), teacher_metadata("a", 5, "other weights")),
    }
    for backbone in (tmp_path / "run", tmp_path / "run" / "student"):
        model = build_student(str(backbone), later, size=64).eval()
        answers, before = model(images), earlier(images)
        torch.testing.assert_close(answers[:, model.head_slices["renamed"]], before[:, earlier.head_slices["b"]])
        assert not torch.allclose(answers[:, model.head_slices["new"]], before[:, earlier.head_slices["b"]])
        assert not torch.allclose(answers[:, model.head_slices["a"]], before[:, earlier.head_slices["a"]])
    fresh = build_student(str(tmp_path / "run"), later, size=64, init_heads=False).eval()
    assert not torch.allclose(fresh(images)[:, 7:14], earlier(images)[:, 5:])


@pytest.mark.parametrize("backbone", ["test_efficientnet", "test_resnet", "test_vit"])
def test_frozen_parts_stay_and_cost_no_gradient(backbone: str) -> None:
    size = 160 if "vit" in backbone else 64
    model = build_student(backbone, heads(a=5), pretrained=False, freeze_blocks=1).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    model(torch.randn(4, 3, size, size)).square().sum().backward()
    optimizer.step()
    after = model.state_dict()
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen and len(trained) > len(list(model.answer.parameters()))
    assert all(torch.equal(before[name], after[name]) for name in frozen)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert any(name.startswith("backbone.") for name in moved)
    prefixes = {name.rsplit(".", 1)[0] for name in frozen}
    assert not [name for name in moved if name.rsplit(".", 1)[0] in prefixes]  # Nor their running statistics.


def test_frozen_norms_keep_their_statistics() -> None:
    model = build_student("test_efficientnet", heads(a=5), pretrained=False, freeze_norm=True).train()
    model(torch.randn(4, 3, 64, 64))
    means = [buffer for name, buffer in model.named_buffers() if name.endswith("running_mean")]
    assert means and all(not mean.any() for mean in means)


FAMILIES = ("byobnet", "convnext", "efficientnet", "mambaout", "nfnet", "resnet", "vit", "vit3")


@pytest.mark.parametrize(("family", "projection"), [("efficientnet", 16), *((family, 0) for family in FAMILIES)])
def test_save_and_load(tmp_path: Path, images: torch.Tensor, family: str, projection: int) -> None:
    """The same answers again, and the same features from timm, which is given the folder and nothing else."""
    stored = heads(a=5, b=7)
    model = build_student(f"test_{family}", stored, size=64, pretrained=False, projection=projection).eval()
    save_student(model, tmp_path / "student", preprocessing=preprocessing_of(model.backbone, 64), card={})
    loaded = load_student(tmp_path / "student").eval()
    assert isinstance(loaded, Student) and loaded.head_slices == model.head_slices
    opened = timm.create_model(f"local-dir:{tmp_path / 'student'}", pretrained=True).eval()
    with torch.no_grad():
        assert torch.equal(model(images), loaded(images))
        assert torch.equal(model.features(images), opened(images))
    assert "| a | 5 |" in (tmp_path / "student" / "README.md").read_text()


def test_a_folder_without_student_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no student"):
        load_student(tmp_path)


def damaged(index: object) -> bytes:
    return json.dumps(index).encode()


GOOD = {"heads": {"a": 5, "b": 7}, "projection": 0}


@pytest.mark.parametrize(
    "name, data, says",
    [
        ("heads.json", b"", "holds no student"),
        ("heads.json", b"\xff\xfe", "holds no student"),
        ("heads.json", b"[" * 100_000, "holds no student"),
        ("heads.json", damaged([]), r"heads\.json: must give heads"),
        ("heads.json", damaged({"heads": {}}), r"heads\.json: must give heads"),
        ("heads.json", damaged(GOOD | {"heads": {"a": "5"}}), r"heads\.json: must give heads"),
        ("heads.json", damaged(GOOD | {"heads": {"a": -5}}), r"heads\.json: must give heads"),
        ("heads.json", damaged(GOOD | {"heads": {"a": 10**12}}), r"heads\.safetensors: does not fit"),
        ("heads.json", damaged(GOOD | {"heads": {"a": 5, "b": 6}}), r"heads\.safetensors: does not fit"),
        ("heads.json", damaged(GOOD | {"projection": 9}), r"heads\.safetensors: does not fit"),
        ("heads.json", damaged(GOOD | {"projection": "x"}), r"heads\.json: must give heads"),
        ("heads.json", damaged(GOOD | {"teachers": ["a"]}), "must be by head"),
        ("heads.json", damaged(GOOD | {"classes": {"a": 5}}), "must be by head"),
        ("heads.safetensors", b"", "is empty"),
        ("heads.safetensors", b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        ("heads.safetensors", b"\0" * 64, "cannot be read as weights"),
        ("model.safetensors", b"", "is empty"),
    ],
)
def test_a_damaged_student_is_named(tmp_path: Path, name: str, data: bytes, says: str) -> None:
    """Where it is opened, and where its backbone and heads are a start."""
    model = build_student("test_resnet", heads(a=5, b=7), pretrained=False)
    save_student(model, tmp_path, preprocessing=preprocessing_of(model.backbone, 64), card={})
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=says):
        load_student(tmp_path)
    if "holds no student" not in says:
        with pytest.raises(UserError, match=says):
            build_student(str(tmp_path), heads(a=5, b=7))


def test_what_keeps_a_student_from_being_written_shows_before(tmp_path: Path) -> None:
    model = build_student("test_resnet", heads(a=5), pretrained=False)
    about = {"preprocessing": preprocessing_of(model.backbone, 64), "card": {}}
    check_student_writable(model, tmp_path / "student", **about)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "student").write_text("a file")
    for folder in (tmp_path / "student", tmp_path / "nowhere" / "student"):
        with pytest.raises(
            UserError, match=r"student: the student cannot be written there \(.*\); nothing was trained"
        ):
            check_student_writable(model, folder, **about)


def test_a_student_is_written_whatever_it_is_called(tmp_path: Path) -> None:
    model = build_student("test_resnet", heads(a=5), pretrained=False)
    odd = "caf\udce9"
    card = {"name": odd, "recipe": f'out = "{odd}"', "classes": {"a": [odd] * 5}}
    save_student(model, tmp_path, preprocessing=preprocessing_of(model.backbone, 64), card=card)
    assert load_student(tmp_path).heads == {"a": 5}
    assert b"# caf\xe9" in (tmp_path / "README.md").read_bytes()
    with pytest.raises(UserError, match="cannot be written there"):  # a name that no file can hold
        check_student_writable(
            model, tmp_path / "x", preprocessing=preprocessing_of(model.backbone, 64), card={"name": "\ud800"}
        )
