"""Several processes over gloo: the same crops once each, the same training, also when their number changes."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from training_case import CROPS, losses, make_case, newest, settings

from repcon import config
from repcon.commands import train
from repcon.config import OptimConfig, TrainConfig

pytest_plugins = ("training_fixtures",)

WORKER = Path(__file__).parents[1] / "fixtures" / "training_worker.py"


def launch(world: int, settings_: TrainConfig, folder: Path, shown: Path, stop_at: int = 0) -> int:
    """Trains in `world` processes; gives torchrun's exit code."""
    recipe = folder / f"recipe-{world}.toml"
    recipe.write_text(config.dump(settings_))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [*command, str(WORKER), str(recipe), str(shown), str(stop_at)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    if done.returncode and not stop_at:
        pytest.fail(done.stderr[-3000:])
    return done.returncode


def test_one_process_then_two_then_three_train_like_one(tmp_path: Path, picture_folder: Path) -> None:
    """Batch norm frozen, so that the mathematics is the same; a SIGTERM to ONE process stops and saves all."""
    case = make_case(tmp_path / "case", picture_folder)
    changes = {"freeze_norm": True, "crops_per_decode": 2, "mix_window": 2, "epochs": CROPS, "batch_size": 12}
    train.run(settings(case, tmp_path / "one", **changes))

    several, shown = settings(case, tmp_path / "several", **changes), tmp_path / "shown.jsonl"
    assert launch(1, several, tmp_path, shown, stop_at=3) != 0
    assert launch(2, several, tmp_path, shown, stop_at=6) != 0
    assert not (tmp_path / "several" / "results.json").exists()
    assert launch(3, several, tmp_path, shown) == 0

    seen = Counter(tuple(pair) for line in shown.read_text().splitlines() for pair in json.loads(line)["shown"])
    assert set(seen.values()) == {1}
    assert len(seen) == json.loads((tmp_path / "one" / "results.json").read_text())["images"]
    for (step, loss), (same_step, same_loss) in zip(
        losses(tmp_path / "one"), losses(tmp_path / "several"), strict=True
    ):
        assert same_step == step and same_loss == pytest.approx(loss, rel=1e-3)
    one, many = (torch.load(newest(tmp_path / name), weights_only=True)["student"] for name in ("one", "several"))
    for name, value in one.items():
        torch.testing.assert_close(many[name], value, rtol=1e-3, atol=1e-4)


def test_all_processes_validate_the_student_that_is_saved(tmp_path: Path, picture_folder: Path) -> None:
    """Each takes its batch norms' statistics, and their moving average, from its own part of the batches."""
    case = make_case(tmp_path / "case", picture_folder)
    recipe = settings(case, tmp_path / "run", epochs=1, batch_size=8, optim=OptimConfig(lr=1e-3, ema=0.5))
    assert launch(2, recipe, tmp_path, tmp_path / "shown.jsonl") == 0
    lines = (tmp_path / "shown.statistics").read_text().splitlines()  # of both, at the start and after the epoch
    assert len(lines) == 4 and len(set(lines[:2])) == len(set(lines[2:])) == 1 and lines[0] != lines[2]
