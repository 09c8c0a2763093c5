"""models/merge.py: weighted means of weights, and what is refused."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

from repcon.models.factory import create_model
from repcon.models.merge import SplitModel, average, check_mergeable, check_shares, split_classifier
from repcon.models.preprocessing import preprocessing_of
from repcon.models.timm_import import timm
from repcon.models.weights import require_finite
from repcon.runtime.errors import UserError

SIZE = 32


def model(seed: int, name: str = "test_efficientnet", classes: int = 5) -> nn.Module:
    """Random weights, and batch norms that have seen images."""
    torch.manual_seed(seed)
    made = create_model(name, num_classes=classes, pretrained=False, size=SIZE).train()
    with torch.no_grad():
        made(torch.randn(4, 3, SIZE, SIZE) * (1 + seed))
    return made.eval()


def members(**seeds: int) -> dict[str, SplitModel]:
    return {name: split_classifier(model(seed), SIZE) for name, seed in seeds.items()}


def test_parameters_and_statistics_are_averaged_and_counts_kept() -> None:
    held = members(a=0, b=1, c=2)
    states = [member.backbone.state_dict() for member in held.values()]
    mean = average(held, {"a": 0.5, "b": 0.3, "c": 0.2})
    assert mean.keys() == states[0].keys() and not any("classifier" in key for key in mean)
    assert any(key.endswith("running_var") for key in mean)
    for key, value in mean.items():
        first, second, third = (state[key] for state in states)
        if key.endswith("num_batches_tracked"):
            assert torch.equal(value, first)
        else:
            torch.testing.assert_close(value, 0.5 * first + 0.3 * second + 0.2 * third)
    held["a"].backbone.load_state_dict(mean)


def test_a_share_of_one_gives_the_model_to_the_bit() -> None:
    held = members(a=0, b=1)
    mean = average(held, {"a": 0.0, "b": 1.0})
    assert all(torch.equal(value, mean[key]) for key, value in held["b"].backbone.state_dict().items())


@pytest.mark.parametrize(
    "name", ["test_efficientnet", "test_resnet", "test_vit", "test_convnext", "mobilenetv3_small_050"]
)
def test_a_linear_classifier_gives_the_model_s_answers(name: str) -> None:
    torch.manual_seed(0)
    whole = create_model(name, num_classes=5, pretrained=False).eval()
    images = torch.randn(2, 3, preprocessing_of(whole).size, preprocessing_of(whole).size)
    with torch.no_grad():
        logits = whole(images)
        member = split_classifier(whole)
        assert member.classifier is not None
        torch.testing.assert_close(member.classifier(member.backbone(images)), logits, rtol=1e-3, atol=1e-5)


class Scaled(nn.Linear):
    """A linear layer by its class, and not by what the model makes of it."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(nn.functional.normalize(input)) * 16


@pytest.mark.parametrize(
    "classifier", [lambda width: nn.Sequential(nn.Linear(width, 8), nn.Linear(8, 5)), lambda width: Scaled(width, 5)]
)
def test_a_classifier_that_is_not_linear_is_left_out(classifier: Callable[[int], nn.Module]) -> None:
    whole = model(0)
    whole.classifier = classifier(int(whole.num_features))  # pyright: ignore[reportArgumentType]
    assert split_classifier(whole, SIZE).classifier is None


@pytest.mark.parametrize(
    ("shares", "says"),
    [
        ({"a": 0.5, "b": 0.4}, "sum to 0.9, not to 1"),
        ({"a": 1.5, "b": -0.5}, "b = -0.5: a share must be a number of 0 or more"),
        ({"a": math.nan, "b": 1.0}, "a = nan: a share"),
        ({"a": math.inf}, "a = inf"),
        ({"a": 0.5, "c": 0.5}, "no weights of c to average; there are a, b"),
        ({}, "sum to 0, not to 1"),
    ],
)
def test_shares_that_make_no_mean_are_refused(shares: dict[str, float], says: str) -> None:
    with pytest.raises(UserError, match=f"init_weights: .*{says}"):
        check_shares(shares, ["a", "b"])


def test_shares_are_completed_and_thirds_sum_to_one() -> None:
    assert check_shares({"a": 1.0}, ["a", "b"]) == {"a": 1.0, "b": 0.0}
    assert sum(check_shares(dict.fromkeys("abc", 0.333), "abc").values()) == pytest.approx(1)


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (lambda: model(1, "test_resnet"), "test_resnet is another architecture than test_efficientnet"),
        (lambda: timm.create_model("test_efficientnet", channel_multiplier=2.0), "a tensor of another shape"),
        (
            lambda: timm.create_model("test_efficientnet", pretrained_cfg_overlay={"mean": (0, 0, 0)}),
            "normalised by mean",
        ),
    ],
)
def test_models_that_do_not_fit_are_named(other: Callable[[], nn.Module], says: str) -> None:
    with pytest.raises(UserError, match=f"the weights of b and a cannot be averaged: .*{says}"):
        check_mergeable(members(a=0) | {"b": split_classifier(other(), SIZE)})
    check_mergeable(members(a=0, b=1))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_no_numbers_are_refused(value: float) -> None:
    broken = model(0)
    require_finite(broken.state_dict(), "init: the weights of birds")
    with torch.no_grad():
        broken.conv_stem.weight[0, 0, 0, 0] = value  # pyright: ignore
    with pytest.raises(UserError, match=r"the weights of birds: conv_stem.weight has values that are not finite"):
        require_finite(broken.state_dict(), "init: the weights of birds")
