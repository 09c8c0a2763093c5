"""Runs that are stopped or killed go on to the last bit; randomness follows the step."""

import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from training_case import lines, losses, newest, settings, stop_after

from repcon import config
from repcon.commands import train
from repcon.config import HeadConfig, OptimConfig
from repcon.distill.loader import Batch
from repcon.distill.loss_guard import LossGuard
from repcon.distill.trainer import Trainer
from repcon.distill.validation import Validation
from repcon.models.student import load_student
from repcon.runtime.errors import UserError

pytest_plugins = ("training_fixtures",)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"crops_per_decode": 4, "mix_window": 4, "batch_size": 16, "optim": OptimConfig(lr=1e-3, ema=0.9)},
        {"grad_accum_steps": 3, "precision": "bf16", "projection": 8, "epochs": 3},
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
    train.run(settings(case, parts, **changes, num_workers=2))
    assert losses(parts) == losses(whole)
    assert [line["heads"] for line in lines(parts, "validation")] == [
        line["heads"] for line in lines(whole, "validation")
    ]
    weights = [torch.load(newest(out), weights_only=True)["student"] for out in (whole, parts)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_no_step_waits_for_the_gpu(case: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Trainer.train_batch

    def strict(self: Trainer, *arguments: Any) -> torch.Tensor:
        torch.cuda.set_sync_debug_mode("error" if self.step >= 2 else "default")  # the first make what is kept
        try:
            return plain(self, *arguments)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(Trainer, "train_batch", strict)
    assert train.run(settings(case, tmp_path / "run", device="cuda", epochs=2))["steps"] == 8


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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_command_with_130_and_it_goes_on(
    case: Path, tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, out = tmp_path / "recipe.toml", tmp_path / "run"
    recipe.write_text(config.dump(settings(case, out, epochs=200)))
    command = [sys.executable, "-m", "repcon.cli", "train", "--recipe", str(recipe)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    waited = time.monotonic()
    while not (out / "metrics.jsonl").exists() or len(losses(out)) < 5:
        assert process.poll() is None and time.monotonic() - waited < 120, process.communicate()[0]
        time.sleep(0.05)
    process.send_signal(number)
    told = process.communicate(timeout=60)[0]
    assert process.returncode == 130 and "Traceback" not in told, told
    state = torch.load(newest(out), weights_only=True)
    assert state["step"] == losses(out)[-1][0]
    stop_after(1, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        train.run(settings(case, out, epochs=200))
    assert [step for step, _ in losses(out)] == list(range(1, state["step"] + 2))


def test_accumulated_batches_count_as_one(case: Path, tmp_path: Path) -> None:
    """Two batches of 8 move the weights as one of 16 does, under clipping too."""
    optim = OptimConfig(name="sgd", lr=0.05, weight_decay=0.0, warmup_epochs=0.0, clip_norm=0.5)
    changes: dict[str, Any] = {"val_fraction": 0.0, "freeze_norm": True, "epochs": 2, "optim": optim}
    train.run(settings(case, tmp_path / "whole", **changes, batch_size=16))
    train.run(settings(case, tmp_path / "parts", **changes, batch_size=8, grad_accum_steps=2))
    states = [torch.load(newest(tmp_path / name), weights_only=True) for name in ("whole", "parts")]
    assert [state["updates"]["count"] for state in states] == [4, 4]
    for name, value in states[0]["student"].items():
        torch.testing.assert_close(states[1]["student"][name], value, rtol=1e-4, atol=1e-5)


def test_bf16_and_channels_last(case: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Activations are bfloat16; weights, losses and images are not, and what has channels has them last."""
    plain, seen = LossGuard.watch, []

    def watch(self: LossGuard, step: int, losses: torch.Tensor, logits: torch.Tensor, batch: Batch) -> None:
        seen.append((losses.dtype, logits.dtype, batch.pixels.is_contiguous(memory_format=torch.channels_last)))
        plain(self, step, losses, logits, batch)

    convolution = []
    monkeypatch.setattr(LossGuard, "watch", watch)
    monkeypatch.setattr(
        Trainer,
        "_no_sync",
        lambda self, last: convolution.append(self.student.backbone.conv_stem.weight) or nullcontext(),
    )
    train.run(settings(case, tmp_path / "run", epochs=1, precision="bf16"))
    assert set(seen) == {(torch.float32, torch.bfloat16, True)}
    (stem,) = set(convolution)
    assert stem.dtype == torch.float32 and stem.is_contiguous(memory_format=torch.channels_last)
    assert not stem.is_contiguous()


def test_what_is_written_is_the_moving_average(case: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train.run(settings(case, out, epochs=2, optim=OptimConfig(lr=3e-3, ema=0.9)))
    state = torch.load(newest(out), weights_only=True)
    written = load_student(out / "student").state_dict()
    assert all(torch.equal(written[name], value) for name, value in state["updates"]["ema"].items())
    assert not torch.equal(written["answer.weight"], state["student"]["answer.weight"])


def test_the_best_checkpoint_is_of_the_lowest_kl(case: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = iter([0.5, 3.0, 1.0, 2.0, 1.5])  # the first is the start's, of which there is no checkpoint
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(
            Validation, "measure", lambda *_: {"heads": {"tones": {"kl": next(told), "agreement": 0.5}}, "images": 2}
        )
        train.run(settings(case, out, heads=(HeadConfig(name="tones"),)))
    wanted = lines(out, "validation")[2]["step"]
    assert torch.load(out / "checkpoints" / "best.pt", weights_only=True)["step"] == wanted

    train.run(settings(case, tmp_path / "blind", epochs=2, val_fraction=0.0))
    blind = tmp_path / "blind"
    best, last = (torch.load(path, weights_only=True) for path in (blind / "checkpoints" / "best.pt", newest(blind)))
    assert best["step"] == last["step"]


def test_weights_that_the_last_update_broke_are_not_kept(case: Path, tmp_path: Path) -> None:
    """No later loss tells of the last update before a checkpoint, or of the run's last one."""
    out = tmp_path / "run"
    changes: dict[str, Any] = {"optim": OptimConfig(name="sgd", lr=1e30, schedule="cosine", warmup_epochs=0)}
    with pytest.raises(UserError, match=r"step 1: since its update the student's answers are not finite"):
        train.run(settings(case, out, epochs=1, checkpoint_minutes=0.0, **changes))
    assert not list(out.glob("checkpoints/*.pt")) and not (out / "student").exists()
