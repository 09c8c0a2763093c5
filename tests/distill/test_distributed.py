"""Several processes over gloo: the same crops once each, the same training, also when their number changes."""

import json
import os
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
import training_worker
from forkserver import CONTEXT
from training_case import CROPS, losses, make_case, newest, settings
from training_worker import train_fork

from repcon import config
from repcon.commands import train
from repcon.config import OptimConfig, TrainConfig


def launch(world: int, settings_: TrainConfig, folder: Path, shown: Path, stop_at: int = 0) -> list[int | None]:
    """Trains in `world` processes with the environment that torchrun gives; their exit codes."""
    recipe, log = folder / f"recipe-{world}.toml", folder / f"log-{world}.txt"
    recipe.write_text(config.dump(settings_))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    whole = {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [whole | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world)]
    parts = [CONTEXT.Process(target=train_fork, args=(rank, log, str(recipe), shown, stop_at)) for rank in ranks]
    for part in parts:
        part.start()
    for part in parts:
        part.join(240)
    codes = [part.exitcode for part in parts]
    if any(codes) and not stop_at:
        pytest.fail(log.read_text()[-3000:])
    return codes


def test_one_process_then_two_then_three_train_like_one(tmp_path: Path, picture_folder: Path) -> None:
    """Batch norm frozen, so that the mathematics is the same; a SIGTERM to ONE process stops and saves all."""
    case = make_case(tmp_path / "case", picture_folder)
    changes = {"freeze_norm": True, "crops_per_decode": 2, "mix_window": 2, "epochs": CROPS, "batch_size": 12}
    train.run(settings(case, tmp_path / "one", **changes))

    several, shown = settings(case, tmp_path / "several", **changes), tmp_path / "shown.jsonl"
    assert launch(1, several, tmp_path, shown, stop_at=3) == [130]
    assert launch(2, several, tmp_path, shown, stop_at=6) == [130, 130]
    assert not (tmp_path / "several" / "results.json").exists()
    assert launch(3, several, tmp_path, shown) == [0, 0, 0]

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
    """With torchrun. Each takes its batch norms' statistics, and their moving average, from its part of the batches."""
    case = make_case(tmp_path / "case", picture_folder)
    recipe = settings(case, tmp_path / "run", epochs=1, batch_size=8, optim=OptimConfig(lr=1e-3, ema=0.5))
    (tmp_path / "recipe.toml").write_text(config.dump(recipe))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*torchrun, training_worker.__file__, str(tmp_path / "recipe.toml"), str(tmp_path / "shown.jsonl")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = (tmp_path / "shown.statistics").read_text().splitlines()  # of both, at the start and after the epoch
    assert len(lines) == 4 and len(set(lines[:2])) == len(set(lines[2:])) == 1 and lines[0] != lines[2]
