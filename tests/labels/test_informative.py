"""Which teachers know nothing about the images."""

import math

import pytest
import torch
from store_builder import spec, teacher_metadata

from repcon.commands import inspect
from repcon.config import InspectConfig
from repcon.labels import topk
from repcon.labels.statistics import why_uninformative
from repcon.labels.store import LabelStore
from repcon.precompute.estimate import _uninformative
from repcon.runtime.console import console


@pytest.mark.parametrize(
    ("entropy", "classes", "top", "says"),
    [
        (0.95 * math.log(50), 50, 0.1, "nearly uniform (entropy 3.72 of at most 3.91 nat)"),
        (0.5, 50, 0.95, "the same class is on top of 95 % of its answers"),
        (0.5 * math.log(50), 50, 0.5, ""),
        (0.85 * math.log(2), 2, 0.6, ""),
    ],
)
def test_the_reason(entropy: float, classes: int, top: float, says: str) -> None:
    reason = why_uninformative(entropy, classes, top)
    assert says in reason and bool(says) == bool(reason)


def test_a_sample_of_answers_and_a_store_s_rows_say_the_same(tmp_path) -> None:
    """A teacher that guesses, one that always says the same, and one that knows."""
    generator = torch.Generator().manual_seed(0)
    made = torch.randn(100, 40, generator=generator)
    logits = {"guesses": 0.1 * made, "stuck": made + 20 * torch.eye(40)[7], "knows": 5 * made}
    wanted = {"guesses": "nearly uniform", "stuck": "the same class", "knows": ""}
    for name, answers in logits.items():
        assert wanted[name] in _uninformative(answers) and bool(wanted[name]) == bool(_uninformative(answers))

    teachers = tuple(teacher_metadata(name, 40) for name in logits)
    store = LabelStore.create(str(tmp_path / "s"), spec(teachers=teachers, crops=1, rows_per_shard=100))
    (unit,) = store.units()
    labels = {}
    for name, answers in logits.items():
        ids, logp = topk.encode(answers, 5, (1.0, 2.0))
        labels[name] = (ids[None].numpy(), logp[None].numpy().astype("float16"))
    boxes = torch.ones(1, 100, 4, dtype=torch.int64).numpy().astype("uint16")
    store.writer.write(unit, boxes, boxes[..., 0].astype("uint8"), labels, {})
    with console.capture() as told:
        found = inspect.run(InspectConfig(store=str(tmp_path / "s")))
    assert {name: bool(head["uninformative"]) for name, head in found["heads"].items()} == {
        name: bool(says) for name, says in wanted.items()
    }
    for name in ("guesses", "stuck"):
        assert f"warning: teacher {name} tells little about these images: " in told.get()
    assert "teacher knows" not in told.get()
