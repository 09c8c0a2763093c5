"""trainer.py: runs that are stopped or killed go on to the last bit; randomness follows the step."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from training_case import lines, losses, newest, settings, stop_after

from repcon import config, train
from repcon.config import OptimConfig
from repcon.training.trainer import Trainer

pytest_plugins = ("training_fixtures",)
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"crops_per_decode": 4, "mix_window": 4, "batch_size": 16, "optim": OptimConfig(lr=1e-3, ema=0.9)},
        {"accumulate": 3, "precision": "bf16", "projection": 8, "epochs": 3},
    ],
    ids=["plain", "mixed-ema", "accumulate-bf16"],
)
@pytest.mark.parametrize("steps", [5, 7])
def test_a_stopped_run_goes_on_to_the_last_bit(
    case: Path, tmp_path: Path, changes: dict[str, Any], steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train.run(settings(case, whole, **changes))
    with monkeypatch.context() as patch:
        stop_after(steps, patch)
        with pytest.raises(KeyboardInterrupt):
            train.run(settings(case, parts, **changes))
    assert not (parts / "results.json").exists()
    train.run(settings(case, parts, **changes, workers=2))
    assert losses(parts) == losses(whole)
    assert [line["heads"] for line in lines(parts, "validation")] == [
        line["heads"] for line in lines(whole, "validation")
    ]
    weights = [torch.load(newest(out), weights_only=True)["student"] for out in (whole, parts)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_run_killed_between_checkpoints_repeats_its_steps(
    case: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was logged after the last checkpoint is logged once, with the same figures."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train.run(settings(case, whole))
    plain = Trainer.train_batch

    def dies(self: Trainer, *arguments: Any) -> torch.Tensor:
        if self.step == 6:
            raise OSError("power cut")
        return plain(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_batch", dies)
        with pytest.raises(OSError, match="power cut"):
            train.run(settings(case, parts))
    assert losses(parts)[-1][0] == 6
    train.run(settings(case, parts))
    assert losses(parts) == losses(whole)


def test_ctrl_c_ends_the_command_with_130_and_it_goes_on(case: Path, tmp_path: Path) -> None:
    recipe, out = tmp_path / "recipe.toml", tmp_path / "run"
    recipe.write_text(config.dump(settings(case, out, epochs=200)))
    command = [sys.executable, "-m", "repcon.cli", "train", "--recipe", str(recipe)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    waited = time.monotonic()
    while not (out / "metrics.jsonl").exists() or len(losses(out)) < 5:
        assert process.poll() is None and time.monotonic() - waited < 120, process.communicate()[0]
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    told = process.communicate(timeout=60)[0]
    assert process.returncode == 130 and "Traceback" not in told, told
    state = torch.load(newest(out), weights_only=True)
    assert state["step"] == losses(out)[-1][0]
