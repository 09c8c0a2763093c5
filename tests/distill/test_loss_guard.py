"""A loss that is no number stops the run and leaves what is needed to find out why."""

from pathlib import Path

import pytest
import torch
from training_case import settings

from repcon.commands import train
from repcon.config import OptimConfig
from repcon.runtime.errors import UserError

pytest_plugins = ("training_fixtures",)


def test_a_loss_that_is_no_number_stops_with_step_head_and_dump(case: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(UserError, match=r"step \d+: the loss of head 'colours'.*not-finite") as error:
        train.run(settings(case, out, optim=OptimConfig(lr=1e30, clip_norm=0.0, warmup_epochs=0.0)))
    (dump,) = out.glob("not-finite-step-*.pt")
    assert str(dump) in str(error.value)
    state = torch.load(dump, weights_only=True)
    assert len(state["pixels"]) == len(state["labels"]["tones"][0]) == len(state["logits"])
