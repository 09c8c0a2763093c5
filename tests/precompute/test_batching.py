"""Passes within the memory: halving, and its end."""

import pytest
import torch

from repcon.precompute.batching import AdaptiveBatcher
from repcon.runtime.errors import UserError

CPU = torch.device("cpu")


def holding(limit: int):
    """A pass that fails above `limit` crops, and otherwise gives back what it was given."""

    def answer(pixels):
        if len(pixels[4]) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return pixels[4]

    return answer


def test_the_parts_are_the_batch_in_order_and_what_fitted_stays():
    said: list[str] = []
    passes = AdaptiveBatcher(8, CPU, said.append)
    batch = torch.arange(11)[:, None]
    assert torch.equal(torch.cat(passes.run({4: batch}, holding(3))), batch)
    assert passes.size == 2 and [line.rsplit(" ", 1)[1] for line in said] == ["4", "2"]
    assert [len(part) for part in passes.run({4: batch}, holding(3))] == [2, 2, 2, 2, 2, 1]
    assert len(said) == 2


def test_not_even_one_crop_is_a_clear_line():
    with pytest.raises(UserError, match="out of memory with one crop; name fewer teachers"):
        AdaptiveBatcher(4, CPU, print).run({4: torch.zeros(4, 1)}, holding(0))


def test_other_errors_are_not_taken_for_memory():
    def broken(pixels):
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes"):
        AdaptiveBatcher(4, CPU, print).run({4: torch.zeros(4, 1)}, broken)
