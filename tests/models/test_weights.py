"""Weight files: which is taken, what is refused, and that models are filled as a whole."""

import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from repcon.models import weights
from repcon.models.factory import create_model
from repcon.models.preprocessing import Preprocessing
from repcon.models.saved_model import save_model
from repcon.models.student import load_student
from repcon.models.timm_import import timm
from repcon.runtime.errors import UserError

PLAIN = Preprocessing(size=64, mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3))
FILE = "model.safetensors"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier of five classes."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("saved") / "five"
    model = timm.create_model("test_resnet", num_classes=5)
    save_model(model, folder, classes=(), preprocessing=PLAIN, extra={})
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "model"))


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    save_file(change(load_file(folder / FILE)), folder / FILE)


def configure(folder: Path, **top: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | top))


def other_classes(count: int) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    return lambda held: (
        held | {"fc.weight": torch.ones(count, held["fc.weight"].shape[1]), "fc.bias": torch.ones(count)}
    )


def only(part: str, keep: bool) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    return lambda held: {name: value for name, value in held.items() if (part in name) == keep}


def replaced(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable:
    return lambda held: held | {name: change(held[name])}


MISFITS: dict[str, tuple[Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], str]] = {
    "prefix": (
        lambda held: {f"model.{name}": value for name, value in held.items()},
        r"missing in the file: conv1.*strip the prefix model\.",
    ),
    "no head": (only("fc.", False), r"missing in the file: fc\.\w+, fc\.\w+; .*num_classes to 0"),
    "head only": (only("fc.", True), r"missing in the file: conv1.* and \d+ more"),
    "seven classes": (other_classes(7), r"fc\.weight is 7 x \d+ in the file, 5 x \d+ in the model.*num_classes to 7"),
    "one more": (lambda held: held | {"extra.weight": torch.ones(2)}, r"not in the model: extra\.weight"),
    "one less": (only("bn1.bias", False), r"missing in the file: .*bn1\.bias"),
    "NaN": (replaced("fc.bias", lambda old: old * float("nan")), r"fc\.bias has values that are not finite"),
    "infinite": (replaced("bn1.running_var", lambda old: old * float("inf")), r"bn1\.running_var has values"),
    "integers": (replaced("fc.weight", lambda old: old.to(torch.int8)), r"fc\.weight is 5 x \d+ of integers"),
    "nothing": (lambda held: {}, "holds no tensors"),
}


@pytest.mark.parametrize("num_classes", [None, 0, 3])
@pytest.mark.parametrize("case", MISFITS)
def test_weights_that_do_not_fit_are_told(folder: Path, case: str, num_classes: int | None) -> None:
    """As a teacher, as a backbone and as a start alike."""
    change, says = MISFITS[case]
    rewrite(folder, change)
    with pytest.raises(UserError, match=rf"model .*model.*{says}") as caught:
        create_model(str(folder), num_classes=num_classes)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 900


@pytest.mark.parametrize("num_classes", [None, 0, 3])
@pytest.mark.parametrize(
    "top, says",
    [
        ({"num_classes": 3}, "several numbers of classes.*set num_classes to 5"),
        ({"model_args": {"num_classes": 1000}}, "fc.weight is 5 x .*set num_classes to 5"),
        ({"num_classes": 3, "model_args": {"num_classes": 5}}, "set num_classes to 5"),
        ({"num_classes": 3, "model_args": {"num_classes": 3}}, "set num_classes to 5"),
        ({"num_classes": 0}, "set num_classes to 5"),
        ({"architecture": "test_efficientnet"}, "cannot be loaded: EfficientNet has no attribute"),
        ({"architecture": "no_such"}, "Unknown model"),
        ({"architecture": 5}, "names no architecture"),
        ({"model_args": 5}, "cannot be loaded"),
        ({"pretrained_cfg": []}, "cannot be loaded"),
    ],
)
def test_a_config_that_says_otherwise_than_the_weights_is_refused(
    folder: Path, top: dict, says: str, num_classes: int | None
) -> None:
    configure(folder, **top)
    with pytest.raises(UserError, match=says):
        create_model(str(folder), num_classes=num_classes)


def test_eight_bits_are_read_and_their_nan_is_found(folder: Path) -> None:
    narrow = torch.float8_e4m3fn
    rewrite(folder, replaced("fc.bias", lambda bias: bias.to(narrow)))
    create_model(str(folder))
    rewrite(folder, replaced("fc.bias", lambda bias: torch.full(bias.shape, float("nan")).to(narrow)))
    with pytest.raises(UserError, match=r"fc\.bias has values that are not finite"):
        create_model(str(folder))


def test_half_precision_and_missing_counters_are_fine(folder: Path) -> None:
    before = load_file(folder / FILE)
    rewrite(folder, lambda held: {k: v.half() for k, v in held.items() if "num_batches" not in k})
    model = create_model(str(folder))
    assert torch.allclose(model.get_classifier().weight, before["fc.weight"], atol=1e-3)


PLACEHOLDERS = {
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "git lfs pull"),
    "annex": (b"/annex/objects/SHA256E-s1--00.safetensors\n", "git annex get"),
    "page": (b"<!DOCTYPE html><html>not found</html>", "a web page"),
    "empty": (b"", "is empty"),
    "text": (b"hello", "cannot be read as weights"),
}


@pytest.mark.parametrize("name", [FILE, "pytorch_model.bin", "heads.pth"])
@pytest.mark.parametrize("kind", PLACEHOLDERS)
def test_what_lies_in_the_place_of_weights_is_named(folder: Path, kind: str, name: str) -> None:
    (folder / FILE).unlink()
    data, says = PLACEHOLDERS[kind]
    (folder / name).write_bytes(data)
    with pytest.raises(UserError, match=rf"{name}.*{says}"):
        create_model(str(folder))


def test_a_link_to_nothing_is_named(folder: Path) -> None:
    (folder / FILE).unlink()
    (folder / FILE).symlink_to("../.git/annex/objects/x")
    with pytest.raises(UserError, match="a link to a file that is not here"):
        create_model(str(folder))


def test_of_several_files_none_is_guessed(folder: Path) -> None:
    state = load_file(folder / FILE)
    (folder / FILE).rename(folder / "heads.safetensors")  # a student's heads are no weights of its backbone
    with pytest.raises(UserError, match="no weight file"):
        create_model(str(folder))
    torch.save(state, folder / "best.pth")
    create_model(str(folder))
    torch.save({k: v * 0 for k, v in state.items()}, folder / "last.pth")
    with pytest.raises(UserError, match=r"several weight files \(best\.pth, last\.pth\)"):
        create_model(str(folder))
    torch.save(state, folder / "pytorch_model.bin")
    assert torch.equal(create_model(str(folder)).get_classifier().weight, state["fc.weight"])


class Thing:
    """Not a tensor."""


def test_checkpoints_are_opened_and_code_is_not_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = load_file(folder / FILE)
    (folder / FILE).unlink()
    path = folder / "last.pth"
    torch.save({"epoch": 3, "state_dict": {f"module.{k}": v for k, v in state.items()}}, path)
    assert torch.equal(create_model(str(folder)).get_classifier().weight, state["fc.weight"])
    torch.save({"state_dict": state, "state_dict_ema": {k: v * 2 for k, v in state.items()}}, path)
    assert torch.equal(create_model(str(folder)).get_classifier().weight, 2 * state["fc.weight"])
    assert "its averaged weights (state_dict_ema) are taken" in " ".join(capsys.readouterr().out.split())
    for held, says in (
        ({"epoch": 3, "net": state}, "holds epoch, net where tensors by name are expected"),
        ([1, 2], "holds list where"),
        ({"model": Thing()}, "would run code; save model.state_dict"),
    ):
        torch.save(held, path)
        with pytest.raises(UserError, match=says) as caught:
            create_model(str(folder))
        assert "weights_only=False" not in str(caught.value)
    torch.jit.script(torch.nn.Linear(2, 2)).save(path)
    with pytest.raises(UserError, match=r"TorchScript program.*torch\.jit\.load"):
        create_model(str(folder))


def test_models_that_others_create_meanwhile_load_as_ever(folder: Path) -> None:
    found = []
    with weights.checked_loading("x", {"fc.weight": torch.zeros(1)}, registered=False):
        other = threading.Thread(target=lambda: found.append(timm.create_model(f"local-dir:{folder}", pretrained=True)))
        other.start()
        other.join()
        with pytest.raises(UserError, match="missing in the file"):
            timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert torch.equal(found[0].get_classifier().weight, load_file(folder / FILE)["fc.weight"])


def test_of_several_known_files_the_one_that_is_taken_is_named(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({name: value * 0 for name, value in load_file(folder / FILE).items()}, folder / "pytorch_model.bin")
    assert bool(create_model(str(folder)).get_classifier().weight.any())
    assert "of its weight files model.safetensors, pytorch_model.bin the first is taken" in capsys.readouterr().out


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "_orig_mod.module."])
def test_two_tensors_for_one_part_are_refused(folder: Path, prefix: str) -> None:
    """One of them would be dropped once the prefixes of parallel training are taken away."""
    rewrite(folder, lambda held: held | {f"{prefix}fc.weight": held["fc.weight"] * 0})
    with pytest.raises(UserError, match=r"two tensors for one part of the model \(.*fc\.weight"):
        create_model(str(folder))


@pytest.mark.parametrize("name", ["config.json", "heads.json"])
def test_an_endless_file_is_refused_before_it_is_read(folder: Path, name: str) -> None:
    with (folder / name).open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(UserError, match=rf"{name}|no student"):
        load_student(folder)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_short_memory_is_neither_damaged_weights_nor_a_wrong_name(
    folder: Path, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def short(*_: object, **__: object) -> None:
        raise error

    torch.save(load_file(folder / FILE), folder / "weights.pth")
    monkeypatch.setattr(torch, "load", short)
    monkeypatch.setattr(weights, "load_file", short)
    monkeypatch.setattr(timm, "create_model", short)
    for read in (
        lambda: weights.read_weights(folder / "weights.pth", "m"),
        lambda: weights.load_safetensors(folder / FILE, "m"),
        lambda: create_model("test_resnet", pretrained=False),
    ):
        with pytest.raises(type(error)):
            read()
