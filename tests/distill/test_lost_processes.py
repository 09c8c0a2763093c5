"""A distributed run that lost a process: one line, from every process that is left."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from repcon.distill.distributed import init_distributed
from repcon.runtime.errors import UserError

SURVIVOR = """
import os, sys, torch
from repcon.distill.distributed import init_distributed
from repcon.runtime.errors import UserError
try:
    with init_distributed("cpu") as distributed:
        distributed.barrier()
        if distributed.rank == 1:
            os._exit(9)
        for _ in range(100):
            distributed.all_sum(torch.ones(3))
except UserError as error:
    print(error)
"""


def test_the_survivors_of_a_killed_process_say_so_in_one_line(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = tmp_path / "survivor.py"
    script.write_text(SURVIVOR)
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    place["PYTHONPATH"] = os.pathsep.join(sys.path)
    parts = [
        subprocess.Popen(
            [sys.executable, script], env=os.environ | place | {"RANK": str(rank)}, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    told, errors = parts[0].communicate(timeout=200)
    parts[1].communicate(timeout=60)
    assert told.startswith("another process of this run has ended"), told + errors
    assert parts[0].returncode == 0
    assert "Traceback" not in errors


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"WORLD_SIZE": "2"}, "RANK is not"), ({"WORLD_SIZE": "2", "RANK": "0"}, "MASTER_ADDR is not"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1"}, "MASTER_PORT is not"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE: 'two'"), ({"WORLD_SIZE": "2", "RANK": "-1"}, "RANK: '-1'"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "x"}, "do not find each other"),
    ],
)  # fmt: skip
def test_an_environment_in_part_is_named(given: dict[str, str], named: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=named), init_distributed("cpu"):
        pass


def test_empty_variables_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "RANK"):
        monkeypatch.setenv(name, "")
    with init_distributed("cpu") as distributed:
        assert (distributed.rank, distributed.world_size) == (0, 1)
