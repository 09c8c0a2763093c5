"""The device of a command."""

import os
import subprocess
import sys

import pytest
import torch

from repcon.runtime import device
from repcon.runtime.errors import UserError


def test_auto_takes_cuda_where_there_is_any(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert [device.choose(wish).type for wish in ("auto", "cuda", "cpu")] == ["cuda", "cuda", "cpu"]


def test_cuda_is_refused_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert [device.choose(wish).type for wish in ("auto", "cpu")] == ["cpu", "cpu"]
    with pytest.raises(UserError, match="device cuda: torch sees no CUDA"):
        device.choose("cuda")


@pytest.mark.parametrize(("given", "wanted"), [({}, "32"), ({"CUDA_DEVICE_MAX_CONNECTIONS": "1"}, "1")])
def test_a_gpus_queues_are_asked_for_unless_the_user_did(given: dict[str, str], wanted: str) -> None:
    environ = {name: value for name, value in os.environ.items() if name != "CUDA_DEVICE_MAX_CONNECTIONS"} | given
    code = "import os; from repcon import DistillLoader; print(os.environ['CUDA_DEVICE_MAX_CONNECTIONS'])"
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [wanted]
