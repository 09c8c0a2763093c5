"""Which stored values each head's loss takes, and what is refused."""

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from repcon.config import HeadConfig, Tail
from repcon.distill import loss as loss_module
from repcon.distill.loss import MultiHeadKLLoss, choose_implementation
from repcon.labels import topk
from repcon.labels.store import HeadInfo, TeacherMetadata
from repcon.runtime.console import console
from repcon.runtime.errors import UserError

TEMPERATURES = (1.0, 2.0)
CLASSES = {"birds": 12, "small": 3}
K = 4


def head_info(name: str, classes: int) -> HeadInfo:
    metadata = TeacherMetadata(
        name=name, model=name, architecture=name, weight_hash="none", preprocessing={}, num_classes=classes, licence=""
    )
    return HeadInfo(name=name, classes=classes, k=min(K, classes), temperatures=TEMPERATURES, metadata=metadata)


STORED = {name: head_info(name, classes) for name, classes in CLASSES.items()}


@pytest.fixture(autouse=True)
def nothing_said_yet() -> Iterator[None]:
    loss_module._announced.clear()
    yield


def labels(rows: int, seed: int = 0) -> tuple[dict[str, torch.Tensor], dict[str, tuple[torch.Tensor, torch.Tensor]]]:
    """Teachers' logits, and what the store keeps of them."""
    generator = torch.Generator().manual_seed(seed)
    logits, stored = {}, {}
    for name, classes in CLASSES.items():
        logits[name] = 2 * torch.randn(rows, classes, generator=generator)
        ids, logp = topk.encode(logits[name], K, TEMPERATURES)
        stored[name] = (ids.to(torch.uint16), logp.half())
    return logits, stored


@pytest.mark.parametrize("tail", ["bucket", "uniform", "renormalise"])
def test_it_is_the_kl_against_the_dense_labels(tail: Tail) -> None:
    """Temperature, weight and order of the heads; `topk.dense` says what the labels mean."""
    _, stored = labels(5)
    heads = [HeadConfig(name="small", temperature=2.0, weight=0.5), HeadConfig(name="birds", temperature=2.0)]
    logits = torch.randn(5, 15, generator=torch.Generator().manual_seed(3))
    losses = MultiHeadKLLoss(STORED, heads, tail=tail)(logits, stored)
    for place, (columns, head) in enumerate(zip((slice(0, 3), slice(3, 15)), heads, strict=True)):
        ids, logp = stored[head.name]
        if tail == "bucket" and head.name == "birds":
            continue  # a bucket is no distribution over the classes
        p = topk.dense(ids.long(), logp.float(), CLASSES[head.name], 1, 2.0, tail)
        log_q = (logits[:, columns] / 2).log_softmax(dim=1)
        terms = torch.where(p > 0, p * (p.log() - log_q), 0)
        assert float(losses[place]) == pytest.approx(head.weight * 4 * float(terms.sum(1).mean()), rel=1e-4)


def test_a_student_that_agrees_has_nothing_to_learn_from_a_bucket() -> None:
    teachers, stored = labels(6)
    logits = torch.cat([teachers["birds"], teachers["small"]], dim=1).requires_grad_()
    heads = [HeadConfig(name="birds", temperature=2.0), HeadConfig(name="small")]
    losses = MultiHeadKLLoss(STORED, heads, tail="bucket")(logits, stored)
    losses.sum().backward()
    assert losses.shape == (2,) and losses.dtype == torch.float32
    assert float(losses.detach().abs().max()) < 1e-5
    assert logits.grad is not None and logits.grad.abs().max() < 1e-3


def test_rows_choose_among_the_labels() -> None:
    _, stored = labels(9)
    rows = torch.tensor([7, 0, 7])
    logits = torch.randn(3, 15)
    loss = MultiHeadKLLoss(STORED, [HeadConfig(name=name) for name in STORED])
    taken = {name: (ids.long()[rows], logp[rows]) for name, (ids, logp) in stored.items()}
    torch.testing.assert_close(loss(logits, stored, rows), loss(logits, taken))


@pytest.mark.parametrize(
    ("heads", "tail", "message"),
    [
        ([{"name": "cars"}], "bucket", "heads: the store has no 'cars'; it has birds, small"),
        ([{"name": "birds"}] * 2, "bucket", "heads: 'birds' occurs twice"),
        ([], "bucket", "heads: none are left to train on; name some of the store's: birds, small"),
        ([{"name": "birds", "temperature": 3.0}], "bucket", "head 'birds': temperature 3 is not among those"),
        ([{"name": "birds", "temperature": 3.0}], "uniform", "the store holds (1, 2)"),
        ([{"name": "birds", "temperature": -1.0}], "renormalise", "temperature must be a number above 0"),
        (
            [{"name": "birds", "temperature": float("inf")}],
            "renormalise",
            "temperature: inf is not a finite number",
        ),
        ([{"name": "birds", "weight": -1.0}], "bucket", "weight must be a number of at least 0, not -1.0"),
        ([{"name": "birds", "weight": float("nan")}], "bucket", "weight: nan is not a finite number"),
    ],
)
def test_mistakes_name_the_head(heads: list[dict[str, Any]], tail: Tail, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        MultiHeadKLLoss(STORED, [HeadConfig(**head) for head in heads], tail=tail)


def test_renormalise_takes_any_temperature() -> None:
    _, stored = labels(4)
    loss = MultiHeadKLLoss(STORED, [HeadConfig(name="birds", temperature=3.0)], tail="renormalise")
    assert loss(torch.randn(4, 12), stored).isfinite().all()


def test_labels_without_the_head_are_named() -> None:
    _, stored = labels(4)
    loss = MultiHeadKLLoss(STORED, [HeadConfig(name="birds")])
    with pytest.raises(UserError, match="no labels of head 'birds'"):
        loss(torch.randn(4, 12), {"small": stored["small"]})


def test_logits_of_other_heads_are_refused() -> None:
    """Labels of the first head would be learnt in another head's columns."""
    _, stored = labels(4)
    with pytest.raises(UserError, match="15 columns, but the heads small have 3 classes"):
        MultiHeadKLLoss(STORED, [HeadConfig(name="small")])(torch.randn(4, 15), stored)


def test_the_choice_is_made_by_device_and_said_once() -> None:
    assert choose_implementation("auto", torch.device("cpu"))[0] == "torch"
    assert choose_implementation("auto", torch.device("cuda"))[0] == "triton"
    assert choose_implementation("torch", torch.device("cuda"))[0] == "torch"
    with console.capture() as printed:
        for _ in range(2):
            MultiHeadKLLoss(STORED, [HeadConfig(name="birds")])
    assert printed.get() == "loss: torch on cpu (the choice for cpu), tail uniform, 1 head\n"


def test_triton_on_a_cpu_is_refused_where_nothing_interprets_it(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from repcon_kernels.kl_div import launch

    monkeypatch.setattr(launch, "interpreted", lambda: False)
    with pytest.raises(UserError, match="needs a GPU"):
        choose_implementation("triton", torch.device("cpu"))
    monkeypatch.setattr(launch, "interpreted", lambda: True)
    assert choose_implementation("triton", torch.device("cpu"))[0] == "triton"
