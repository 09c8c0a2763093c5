"""Teachers of the user's own code: answers that repeat, that are logits, and parts that torch knows of."""

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from precompute_case import Colours, pack_path, recipe, teacher_folders
from torch import nn

from repcon.commands import precompute
from repcon.config import PrecomputeConfig, TeacherConfig
from repcon.labels.store import LabelStore
from repcon.models import output_checks, teacher
from repcon.models.custom import check_registered, full_weight_hash
from repcon.models.factory import create_model
from repcon.models.identity import weight_hash
from repcon.runtime.errors import UserError

__all__ = ["pack_path", "recipe", "teacher_folders"]
PLAIN = {"size": 16, "mean": [0.5] * 3, "std": [0.25] * 3}


def net(*tail: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(8, 6), *tail)  # fmt: skip


class Own(nn.Module):
    """A module whose forward is given; `parts` are kept as they come."""

    def __init__(self, forward: Callable[["Own", torch.Tensor], object], parts: object = None) -> None:
        super().__init__()
        self.body, self.how, self.parts, self.calls = net(), forward, parts, 0

    def forward(self, images: torch.Tensor) -> object:
        self.calls += 1
        return self.how(self, images)


def wrapped(forward: Callable[[Own, torch.Tensor], object]) -> Callable[[], nn.Module]:
    return lambda: Own(forward)


def batch_normed(logits: torch.Tensor) -> torch.Tensor:
    return nn.functional.batch_norm(logits, None, None, training=True) if len(logits) > 1 else logits


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "softmax": (lambda: net(nn.Softmax(1)), r"answers are probabilities \(.*\); return the logits before softmax"),
    "per cent": (wrapped(lambda own, x: 100 * own.body(x).softmax(1)), "answers are percentages"),
    "dropout": (wrapped(lambda own, x: nn.functional.dropout(own.body(x), 0.1)), "asked the same again"),
    "noise": (wrapped(lambda own, x: own.body(x + 0.1 * torch.randn_like(x))), "asked the same again"),
    "counts its calls": (wrapped(lambda own, x: own.body(x) * own.calls), "asked the same again"),
    "batch mean": (wrapped(lambda own, x: own.body(x) - own.body(x).mean(0)), "when other images are beside it"),
    "batch norm": (
        wrapped(lambda own, x: batch_normed(own.body(x))),
        "beside it",
    ),
    "tuple": (wrapped(lambda own, x: (own.body(x), x)), r"must answer \(B, C\) logits"),
    "tuple later": (wrapped(lambda own, x: own.body(x) if len(x) == 1 else (own.body(x),)), "answers with a tuple"),
    "one by one": (
        wrapped(lambda own, x: own.body(x).view(1, 6)),
        "its module failed with a batch of 8: RuntimeError",
    ),
    "exits": (wrapped(lambda own, x: own.body(x) if len(x) == 1 else sys.exit(3)), "batch of 8: SystemExit"),
    "exits at once": (wrapped(lambda own, x: sys.exit(3)), "does not take 16 pixels: SystemExit"),
    "integers": (wrapped(lambda own, x: own.body(x).argsort(1)), "must be logits in floating point"),
    "infinite": (wrapped(lambda own, x: own.body(x) / 0), "not a number"),
    "none": (wrapped(lambda own, x: None), r"must answer \(B, C\) logits"),
    "a list of parts": (lambda: Own(lambda own, x: own.parts[0](x), [net()]), r"module\.parts\[0\] \(Sequential\)"),
    "a function of parts": (lambda: Own(lambda own, x: own.parts(x), net().forward), "is not registered"),
    "too few names": (lambda: named(["a", "b"]), "2 names for the 6 classes"),
    "one text for names": (lambda: named("abcdef"), "must be a list of 6 names"),
}


def named(names: object) -> nn.Module:
    module = net()
    module.class_names = names
    return module


def answer(recipe: PrecomputeConfig, made: nn.Module, patch: pytest.MonkeyPatch, **more: object) -> LabelStore:
    patch.setattr("precompute_case.plain", lambda: (made, PLAIN))
    own = TeacherConfig(name="own", model="precompute_case:plain")
    precompute.run(replace(recipe, teachers=(own,), crops=1, **more))
    return LabelStore.open(recipe.out)


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_teacher_is_refused(case: str, recipe: PrecomputeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    make, says = REFUSED[case]
    with pytest.raises(UserError, match=f"teacher own: .*{says}") as caught:
        answer(recipe, make(), monkeypatch)
    assert "\n" not in str(caught.value)
    assert not Path(recipe.out).exists() or len(LabelStore.open(recipe.out).completion.unfinished()) == 4


ALLOWED: dict[str, Callable[[], nn.Module]] = {
    "batch norm in evaluation": net,
    "log-probabilities": lambda: net(nn.LogSoftmax(1)),
    "parts in a module list": lambda: Own(lambda own, x: own.parts[0](x), nn.ModuleList([net()])),
    "half precision inside": wrapped(lambda own, x: own.body(x).half()),
    "large offset": wrapped(lambda own, x: own.body(x) + 20_000),
    "names by id": lambda: named({"5": "f", "0": "a", "1": "b", "2": "c", "3": "d", "4": "e"}),
}


@pytest.mark.parametrize("case", ALLOWED)
def test_what_is_one_labels(case: str, recipe: PrecomputeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    store = answer(recipe, ALLOWED[case](), monkeypatch)
    assert store.completion.unfinished() == []
    assert case != "names by id" or store.heads["own"].metadata.classes == tuple("abcdef")


@pytest.mark.parametrize(
    "forward, warns",
    [
        (lambda own, x: own.body(x * 1e-6), "answers hardly differ between images"),
        (lambda own, x: (5 * own.body(x)).sigmoid(), "all its answers lie between 0 and 1"),
        (lambda own, x: 10 * own.body(x), ""),
    ],
)
def test_a_warning_where_answers_may_be_wrong(
    forward: Callable, warns: str, recipe: PrecomputeConfig, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    answer(recipe, Own(forward), monkeypatch)
    said = " ".join(capsys.readouterr().out.split())
    assert (warns in said and "warning: teacher own" in said) if warns else "warning:" not in said


def test_information_is_that_of_the_answers() -> None:
    assert output_checks.mutual_information(torch.zeros(5, 3)) == pytest.approx(0, abs=1e-6)
    sure = torch.tensor([[50.0, 0.0], [0.0, 50.0]])
    assert output_checks.mutual_information(sure) == pytest.approx(torch.tensor(2.0).log().item(), abs=1e-5)


def test_the_estimate_refuses_probabilities(recipe: PrecomputeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="teacher own: its answers are probabilities"):
        answer(recipe, net(nn.Softmax(1)), monkeypatch, estimate=True)


class Holder:
    def __init__(self, held: object) -> None:
        self.held = held


FROZEN = nn.Linear(2, 2)


class Outside(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return FROZEN(x)


def test_parts_are_found_wherever_they_are_kept() -> None:
    part = net()
    for kept in ([part], (part,), {"a": [part]}, Holder([part]), part.forward, lambda x: part(x), partial(part.eval)):
        with pytest.raises(UserError, match="is not registered"):
            check_registered(Own(lambda own, x: x, kept), "t")
    with pytest.raises(UserError, match="FROZEN"):
        check_registered(Outside(), "t")
    back = Own(lambda own, x: x)
    back.parts = [back.body, back]  # what is registered elsewhere in the module
    check_registered(back, "t")
    for architecture in ("test_vit", "test_resnet", "test_efficientnet", "test_convnext"):
        check_registered(create_model(architecture, pretrained=False), "t")


def test_tensors_outside_the_state_are_part_of_the_identity() -> None:
    def own(value: float) -> nn.Module:
        return Own(lambda own, x: x, {"w": torch.full((2,), value)})

    assert full_weight_hash(own(1.0)) == full_weight_hash(own(1.0)) != full_weight_hash(own(2.0))
    plain = Colours()
    assert full_weight_hash(plain) == weight_hash(plain)


def test_a_store_names_neither_downloads_nor_absurd_sizes(
    teacher_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    metadata = teacher.load_teacher(TeacherConfig(name="five", model=str(teacher_folders["five"])), "cpu").metadata
    monkeypatch.setattr(teacher, "create_model", lambda *a, **b: pytest.fail("loaded"))
    for model in ("hf-hub:somebody/something", "resnet18", "vit_base_patch16_224.augreg_in21k", "hf_hub:x/y", "s3:x"):
        with pytest.raises(UserError, match=r"teacher five: .*--models five="):
            teacher.load_stored_teacher(replace(metadata, model=model), "cpu")
    for size in (0, -1, 2_000, 10**9, "224", None, 1.5, True):
        odd = replace(metadata, preprocessing=metadata.preprocessing | {"size": size})
        with pytest.raises(UserError, match="teacher five: the store gives its input as"):
            teacher.load_stored_teacher(odd, "cpu")
    with pytest.raises(UserError, match="precision"):
        teacher.load_stored_teacher(replace(metadata, precision="int3"), "cpu")  # pyright: ignore[reportArgumentType]
