"""The shared step does what plain torch would do, and says so where it cannot."""

import copy
import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from repcon.config import OptimConfig
from repcon.distill.optim import OptimizerUpdates, autocast, resolve_precision
from repcon.runtime.errors import UserError

CPU = torch.device("cpu")


def line(seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(4, 2)


def updates(model: nn.Module, total: int = 10, **changes: object) -> OptimizerUpdates:
    values: dict[str, object] = {"name": "sgd", "lr": 0.1, "weight_decay": 0.0, "warmup_epochs": 0.0, "clip_norm": 0.0}
    return OptimizerUpdates(model, OptimConfig(**(values | changes)), total=total, per_epoch=5, device=CPU)  # pyright: ignore[reportArgumentType]


def test_parts_of_a_batch_add_up_to_the_whole() -> None:
    inputs = torch.randn(8, 4)
    whole, parts = line(), line()
    updates(whole).step(whole(inputs).square().mean())
    stepping = updates(parts)
    for number, part in enumerate(inputs.split(2)):
        stepping.step(parts(part).square().mean() / 4, update=number == 3)
    assert stepping.count == 1
    torch.testing.assert_close(parts.weight, whole.weight)


def test_gradients_are_clipped() -> None:
    model = line()
    before = model.weight.detach().clone(), model.bias.detach().clone()
    updates(model, clip_norm=1.0).step(model(torch.full((1, 4), 1e3)).square().sum())
    moved = torch.cat([(model.weight - before[0]).flatten(), model.bias - before[1]]).norm()
    # timm's "sgd" is Nesterov's with momentum 0.9: its first step is 1.9 gradients long.
    assert float(moved.detach()) == pytest.approx(0.19, rel=1e-3)


def test_the_schedule_warms_up_and_falls_to_nothing() -> None:
    model = line()
    stepping = updates(model, total=10, warmup_epochs=0.4)
    rates = []
    for _ in range(10):
        rates.append(stepping.lr)
        stepping.step(model(torch.randn(2, 4)).square().mean())
    assert rates[0] == pytest.approx(1e-3) and rates[2] == max(rates)
    assert rates[3] == pytest.approx(0.05 * (1 + math.cos(math.pi * 3 / 10)))
    assert stepping.lr == 0 and rates[-1] > 0


@pytest.mark.parametrize("schedule", ["step", "multistep"])
def test_schedules_of_steps_fall_within_the_run(schedule: str) -> None:
    model = line()
    stepping = updates(model, total=10, schedule=schedule)
    rates = []
    for _ in range(10):
        rates.append(stepping.lr)
        stepping.step(model(torch.randn(2, 4)).square().mean())
    falls = [later / earlier for earlier, later in pairwise(rates)]
    assert [place for place, fall in enumerate(falls, 1) if fall == pytest.approx(0.1)] in ([3, 6, 9], [2, 5, 8])
    assert rates[0] == 0.1 and rates[-1] == pytest.approx(1e-4)


@pytest.mark.parametrize("schedule", ["tanh", "poly", "wsd", "rsqrt", "constant", "none"])
def test_timms_other_schedules(schedule: str) -> None:
    model = line()
    stepping = updates(model, total=10, schedule=schedule, warmup_epochs=0.4)
    for _ in range(10):
        assert 0 < stepping.lr <= 0.1
        stepping.step(model(torch.randn(2, 4)).square().mean())


def test_warm_up_takes_at_most_half() -> None:
    assert updates(line(), total=10, warmup_epochs=100.0).schedule.warmup_t == 5


def test_state_goes_on_exactly() -> None:
    data = torch.randn(6, 3, 4)
    unbroken, model = line(), line()
    one = updates(unbroken, name="adamw", ema=0.5)
    for batch in data:
        one.step(unbroken(batch).square().mean())
    first = updates(model, name="adamw", ema=0.5)
    for batch in data[:3]:
        first.step(model(batch).square().mean())
    second = line(1)
    second.load_state_dict(model.state_dict())
    rest = updates(second, name="adamw", ema=0.5)
    rest.load_state_dict(first.state_dict())
    for batch in data[3:]:
        rest.step(second(batch).square().mean())
    assert torch.equal(second.weight, unbroken.weight)
    assert torch.equal(rest.averaged.weight, one.averaged.weight)  # pyright: ignore[reportArgumentType]
    assert rest.lr == one.lr


def test_the_average_follows_slowly() -> None:
    model = line()
    stepping = updates(model, ema=0.9)
    for _ in range(3):
        stepping.step(model(torch.ones(1, 4)).square().mean())
    assert stepping.averaged is not model
    assert not torch.equal(stepping.averaged.weight, model.weight)  # pyright: ignore[reportArgumentType]
    assert updates(model).averaged is model


def test_autocast_keeps_weights_in_float32() -> None:
    model = line()
    with autocast(CPU, "bf16"):
        answer = model(torch.randn(2, 4))
    assert answer.dtype == torch.bfloat16 and model.weight.dtype == torch.float32


@pytest.mark.parametrize("name", ["adamw", "lamb", "sgd", "lion"])
def test_timms_optimisers(name: str) -> None:
    model = line()
    before = model.weight.detach().clone()
    updates(model, name=name).step(model(torch.randn(2, 4)).square().mean())
    assert not torch.equal(before, model.weight)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"name": "adamm"}, "adamm"),
        ({"name": "adahessian"}, "second derivatives"),
        ({"schedule": "zigzag"}, "zigzag"),
        ({"schedule": "plateau"}, "plateau"),
    ],
)
def test_unknown_names(changes: dict[str, str], word: str) -> None:
    with pytest.raises(UserError, match=word):
        updates(line(), **changes)


def test_a_frozen_model_is_refused() -> None:
    with pytest.raises(UserError, match="freeze_blocks"):
        updates(line().requires_grad_(False))


class Depthwise(nn.Module):
    """Two depthwise convolutions, of which the first is frozen."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.frozen = nn.Conv2d(4, 4, 3, groups=4).requires_grad_(False)
        self.wide = nn.Conv2d(4, 8, 1)
        self.learns = nn.Conv2d(8, 8, 3, groups=8)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        wide = self.wide(self.frozen(images))
        return wide, self.learns(wide)


def test_grouped_convolutions_that_learn_stay_in_float32_on_cpus() -> None:
    model, images = Depthwise(), torch.randn(2, 4, 8, 8)
    exact = model(images)[1]
    stepping = OptimizerUpdates(
        model, OptimConfig(name="sgd", ema=0.5), total=10, per_epoch=5, device=CPU, precision="bf16"
    )
    with autocast(CPU, "bf16"):
        wide, out = model(images)
        assert model.frozen(images).dtype == wide.dtype == torch.bfloat16
        assert out.dtype == torch.float32
    torch.testing.assert_close(out, exact, rtol=0.05, atol=0.05)
    # Copies, as of the moving average and of the best epoch, answer by their own weights.
    for other in (copy.deepcopy(model), stepping.averaged):
        assert isinstance(other, Depthwise)
        with torch.no_grad():
            other.learns.weight.zero_()
            other.learns.bias.zero_()  # pyright: ignore[reportOptionalMemberAccess]
            assert not other(images)[1].any() and model(images)[1].any()


@pytest.mark.parametrize(("has", "wanted"), [(True, "bf16"), (False, "fp32")])
def test_precision_follows_the_device_unless_named(has: bool, wanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has)
    assert resolve_precision("auto", CPU) == wanted
    assert resolve_precision("fp16", CPU) == "fp16"
