"""Checkpoints: whole files only, the last few and the best, and never another run's."""

import os
from pathlib import Path

import pytest
import torch

from repcon.distill import checkpoint
from repcon.distill.checkpoint import BEST, CheckpointManager, flatten
from repcon.runtime.errors import UserError


def test_the_newest_comes_back(tmp_path: Path) -> None:
    checkpoints = CheckpointManager(tmp_path, {"lr": 0.1}, keep=2)
    assert checkpoints.load_latest() is None
    for step in (1, 2, 10):
        checkpoints.save({"step": step, "weights": torch.full((2,), step)}, step, best=step == 2)
    state = checkpoints.load_latest()
    assert state is not None and state["step"] == 10 and torch.equal(state["weights"], torch.full((2,), 10))
    assert sorted(path.name for path in tmp_path.iterdir()) == [BEST, "step-000000002.pt", "step-000000010.pt"]
    assert torch.load(tmp_path / BEST, weights_only=True)["step"] == 2


def test_a_killed_save_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = CheckpointManager(tmp_path, {}, keep=2)
    checkpoints.save({"step": 1}, 1, best=False)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            checkpoints.save({"step": 2}, 2, best=False)
    state = checkpoints.load_latest()
    assert state is not None and state["step"] == 1
    checkpoints.save({"step": 3}, 3, best=False)
    assert not list(tmp_path.glob(".*"))


def test_a_save_killed_before_its_end_is_repeated_with_its_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step's file says that the best so far is kept; so it is the last to appear."""
    checkpoints, replace = CheckpointManager(tmp_path, {}, keep=2), os.replace

    def killed_at_the_second(source: Path, target: Path) -> None:
        if any(tmp_path.glob("*.pt")):
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed_at_the_second)
        with pytest.raises(KeyboardInterrupt):
            checkpoints.save({"step": 1}, 1, best=True)
    assert checkpoints.load_latest() is None and (tmp_path / BEST).is_file()


def test_each_difference_is_named(tmp_path: Path) -> None:
    CheckpointManager(tmp_path, {"optim.lr": 0.1, "store": "a", "size": 96}, keep=1).save({"step": 1}, 1, best=False)
    with pytest.raises(UserError, match=r"optim.lr was 0.1 and is 0.2, store was 'a' and is 'b'"):
        CheckpointManager(tmp_path, {"optim.lr": 0.2, "store": "b", "size": 96}, keep=1).load_latest()


def test_another_versions_checkpoint_is_refused_by_its_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "FORMAT", None)
        CheckpointManager(tmp_path, {}, keep=1).save({"step": 1}, 1, best=False)
    with pytest.raises(UserError, match=r"step-000000001.pt: a checkpoint of format None, this version reads 1"):
        CheckpointManager(tmp_path, {}, keep=1).load_latest()


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    checkpoints = CheckpointManager(tmp_path, {}, keep=3)
    checkpoints.save({"step": 1}, 1, best=False)
    checkpoints.save({"step": 2}, 2, best=False)
    newest = tmp_path / "step-000000002.pt"
    newest.write_bytes(newest.read_bytes()[:100])
    with pytest.raises(UserError, match=r"step-000000002.pt: unreadable.*delete it"):
        checkpoints.load_latest()
    newest.unlink()
    state = checkpoints.load_latest()
    assert state is not None and state["step"] == 1


def test_flat_names() -> None:
    assert flatten({"a": 1, "optim": {"lr": 2, "deep": {"x": 3}}}) == {"a": 1, "optim.lr": 2, "optim.deep.x": 3}


@pytest.mark.parametrize("name", ["load", "save"])
def test_short_memory_is_neither_damage_nor_a_full_disk(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def short(*_: object, **__: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    checkpoints = CheckpointManager(tmp_path, {}, keep=1)
    checkpoints.save({"step": 1}, 1, best=False)
    monkeypatch.setattr(torch, name, short)
    with pytest.raises(RuntimeError, match="can't allocate"):
        checkpoints.load_latest() if name == "load" else checkpoints.save({"step": 2}, 2, best=False)
