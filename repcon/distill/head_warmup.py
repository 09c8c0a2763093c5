"""Heads with random weights learn on the features of a backbone that stands still, before both move.

A random head would pull the pretrained backbone about while it is learnt. One pass over the images gives the features,
and some hundred steps of a linear model on them take seconds.
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from copy import deepcopy

import torch
from torch import nn

from repcon.config import HeadConfig, Tail
from repcon.distill.loader import DistillLoader
from repcon.distill.loss import MultiHeadKLLoss
from repcon.distill.sample import Sample, collect, trained_on
from repcon.labels.store import LabelStore
from repcon.models.preprocessing import Preprocessing, normalise
from repcon.models.student import Student

IMAGES = 8192
"""Images at most, one crop of each."""
BATCH_SIZE = 512
LOGIT_STEP = 0.2
"""Most that the first update moves a logit of an average crop."""
WEIGHT_DECAY = 1e-2
APART = 8
"""One of so many crops is kept apart, to tell when to stop."""
EVERY = 20
"""Steps between two looks at them."""


def warm_up(
    student: Student,
    store: LabelStore,
    heads: Iterable[HeadConfig],
    loader: DistillLoader,
    *,
    tail: Tail,
    steps: int,
    preprocessing: Preprocessing,
    autocast: Callable[[], AbstractContextManager[object]],
) -> tuple[str, ...]:
    """Fit the heads of `heads` that `Student.start_head` has not set; gives their names. Each counts alike."""
    cold = [
        HeadConfig(name=head.name, temperature=head.temperature)
        for head in heads
        if head.name not in student.warm_heads
    ]
    if not cold or not steps:
        return ()
    device = next(student.parameters()).device
    student.eval()

    @torch.no_grad()
    def features(pixels: torch.Tensor) -> torch.Tensor:
        with autocast():
            return student.features(normalise(pixels, preprocessing, torch.float32)).float()

    sample = collect(loader, trained_on(loader, IMAGES), device, features)
    loss = MultiHeadKLLoss(store.heads, cold, tail=tail, implementation="torch", device=device, announced=False)
    fitted = _fit(sample, loss, {head.name: student.heads[head.name] for head in cold}, student.projection, steps)
    _give(fitted, student)
    return tuple(loss.names)


class _Given(nn.Module):
    """Stands for the backbone of a student that is given features."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_features = width


def _fit(sample: Sample, loss: MultiHeadKLLoss, classes: dict[str, int], projection: int, steps: int) -> Student:
    """Heads for features as they are, learnt on features of mean 0 and, for each crop, a norm of about 1."""
    features = torch.cat(sample.parts)
    mean, deviation = features.mean(0), features.std(0, correction=0)
    # A feature that hardly varies would be all noise.
    deviation = deviation.clamp_min(1e-2 * float(deviation.mean()) + 1e-12) * features.shape[1] ** 0.5
    features = (features - mean) / deviation
    model = Student(_Given(features.shape[1]), classes, projection).to(features.device)
    if not projection:
        nn.init.zeros_(model.answer.weight)
        nn.init.zeros_(model.answer.bias)
    _learn(model, features, sample, loss, steps)
    first: nn.Linear = model.project[0] if projection else model.answer  # pyright: ignore[reportAssignmentType]
    with torch.no_grad():
        first.weight.div_(deviation)
        first.bias.sub_(first.weight @ mean)
    return model


def _learn(model: Student, features: torch.Tensor, sample: Sample, loss: MultiHeadKLLoss, steps: int) -> None:
    """Train the heads on features (n, F); the model ends with the state that did best on the crops kept apart."""
    numbers = torch.arange(len(features))
    apart = numbers % APART == APART - 1
    learnt, kept = numbers[~apart], numbers[apart].to(features.device)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LOGIT_STEP / features.shape[1] ** 0.5, weight_decay=WEIGHT_DECAY
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(0)
    best, state = float("inf"), model.state_dict()
    for step in range(steps + 1):
        if step % EVERY == 0 or step == steps:
            with torch.no_grad():
                figure = float(loss(model.head_logits(features[kept]), sample.labels, kept).sum()) if len(kept) else 0.0
            if figure <= best:
                best, state = figure, deepcopy(model.state_dict())
        rows = learnt[torch.randint(len(learnt), (min(BATCH_SIZE, len(learnt)),), generator=generator)]
        rows = rows.to(features.device)
        loss(model.head_logits(features[rows]), sample.labels, rows).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    model.load_state_dict(state)


@torch.no_grad()
def _give(fitted: Student, student: Student) -> None:
    if student.projection:
        student.project.load_state_dict(fitted.project.state_dict())
        student.answers.load_state_dict(fitted.answers.state_dict())
        return
    for name, rows in fitted.head_slices.items():
        student.start_head(name, fitted.answer.weight[rows], fitted.answer.bias[rows])
