"""The device of a command."""

import pytest
import torch

from repcon import device
from repcon.errors import UserError


def test_auto_takes_cuda_where_there_is_any(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert [device.choose(wish).type for wish in ("auto", "cuda", "cpu")] == ["cuda", "cuda", "cpu"]


def test_cuda_is_refused_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert [device.choose(wish).type for wish in ("auto", "cpu")] == ["cpu", "cpu"]
    with pytest.raises(UserError, match="device cuda: torch sees no CUDA"):
        device.choose("cuda")
