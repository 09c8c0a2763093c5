"""Errors of torch that a user can fix are reported in one line."""

import pytest
import torch
from torch import nn

from repcon.distill.loss_guard import explain_batch_norm_error
from repcon.runtime import device
from repcon.runtime.errors import UserError


def test_a_batch_of_one_value_is_explained():
    with pytest.raises(UserError, match="enlarge batch_size"), explain_batch_norm_error():
        nn.BatchNorm2d(3)(torch.ones(1, 3, 1, 1))
    with pytest.raises(ValueError, match="something else"), explain_batch_norm_error():
        raise ValueError("something else")


@pytest.mark.parametrize("place", ["cpu", "cuda"])
def test_a_missing_compiler_is_told_before_anything_runs(place: str, monkeypatch: pytest.MonkeyPatch):
    from torch._inductor import cpp_builder

    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", lambda: "")
    with pytest.raises(UserError, match="no C\\+\\+ compiler here"):
        device.require_compiler(place)
