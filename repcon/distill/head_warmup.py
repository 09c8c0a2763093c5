"""Head warm-up: fit randomly initialised heads on the features of the frozen backbone, before both are trained.

The gradients of a random head would damage the pretrained backbone. One pass over the images gives the features, and a
few hundred steps of a linear model on them take seconds.
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from copy import deepcopy

import torch
from torch import nn

from repcon.config import HeadConfig, Tail
from repcon.distill.labelled_sample import LabelledSample, draw_images, load_sample
from repcon.distill.loader import DistillLoader
from repcon.distill.loss import MultiHeadKLLoss
from repcon.labels.store import LabelStore
from repcon.models.preprocessing import Preprocessing, normalise
from repcon.models.student import Student

MAX_IMAGES = 8192
"""One crop of each is used."""
BATCH_SIZE = 512
LOGIT_STEP = 0.2
"""Upper bound on the first update's change of a logit, for an average crop."""
WEIGHT_DECAY = 1e-2
VALIDATION_STRIDE = 8
"""Every 8th crop validates, for early stopping."""
VALIDATION_STEPS = 20
"""Steps between two validations."""


def warm_up_heads(
    student: Student,
    store: LabelStore,
    heads: Iterable[HeadConfig],
    loader: DistillLoader,
    *,
    tail: Tail,
    steps: int,
    preprocessing: Preprocessing,
    autocast: Callable[[], AbstractContextManager[object]],
) -> list[str]:
    """Fit those of the heads that `Student.init_head` has not set; gives their names. All have the same weight."""
    cold = [
        HeadConfig(name=head.name, temperature=head.temperature)
        for head in heads
        if head.name not in student.warm_heads
    ]
    if not cold or not steps:
        return []
    device = next(student.parameters()).device
    student.eval()

    @torch.no_grad()
    def features(pixels: torch.Tensor) -> torch.Tensor:
        with autocast():
            return student.features(normalise(pixels, preprocessing, torch.float32)).float()

    sample = load_sample(loader, draw_images(loader, MAX_IMAGES), device, features)
    loss = MultiHeadKLLoss(store.heads, cold, tail=tail, implementation="torch", device=device, announce=False)
    fitted = _fit(sample, loss, {head.name: student.heads[head.name] for head in cold}, student.projection, steps)
    _copy_heads(fitted, student)
    return list(loss.names)


def _fit(
    sample: LabelledSample, loss: MultiHeadKLLoss, classes: dict[str, int], projection: int, steps: int
) -> Student:
    """Heads for the plain features, fitted on standardised ones: mean 0 and, for each crop, a norm of about 1."""
    features = torch.cat(sample.batches)
    mean, deviation = features.mean(0), features.std(0, correction=0)
    # The lower bound keeps a feature that hardly varies from being scaled up to noise.
    deviation = deviation.clamp_min(1e-2 * float(deviation.mean()) + 1e-12) * features.shape[1] ** 0.5
    features = (features - mean) / deviation
    placeholder = nn.Identity()  # for the backbone: the model is called with features
    placeholder.num_features = features.shape[1]  # pyright: ignore[reportArgumentType]
    model = Student(placeholder, classes, projection).to(features.device)
    if not projection:
        nn.init.zeros_(model.answer.weight)
        nn.init.zeros_(model.answer.bias)
    _train_heads(model, features, sample, loss, steps)
    first: nn.Linear = model.project[0] if projection else model.answer  # pyright: ignore[reportAssignmentType]
    with torch.no_grad():
        first.weight.div_(deviation)
        first.bias.sub_(first.weight @ mean)
    return model


def _train_heads(
    model: Student, features: torch.Tensor, sample: LabelledSample, loss: MultiHeadKLLoss, steps: int
) -> None:
    """Train the heads on features (n, F); the model ends with the state of the lowest validation loss."""
    numbers = torch.arange(len(features))
    validates = numbers % VALIDATION_STRIDE == VALIDATION_STRIDE - 1
    train, validation = numbers[~validates], numbers[validates].to(features.device)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LOGIT_STEP / features.shape[1] ** 0.5, weight_decay=WEIGHT_DECAY
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(0)
    best, state = float("inf"), model.state_dict()
    for step in range(steps + 1):
        if step % VALIDATION_STEPS == 0 or step == steps:
            with torch.no_grad():
                logits = model.head_logits(features[validation])
                total = float(loss(logits, sample.labels, validation).sum()) if len(validation) else 0.0
            if total <= best:
                best, state = total, deepcopy(model.state_dict())
        rows = train[torch.randint(len(train), (min(BATCH_SIZE, len(train)),), generator=generator)]
        rows = rows.to(features.device)
        loss(model.head_logits(features[rows]), sample.labels, rows).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    model.load_state_dict(state)


@torch.no_grad()
def _copy_heads(fitted: Student, student: Student) -> None:
    if student.projection:
        student.project.load_state_dict(fitted.project.state_dict())
        student.answers.load_state_dict(fitted.answers.state_dict())
        return
    for name, rows in fitted.head_slices.items():
        student.init_head(name, fitted.answer.weight[rows], fitted.answer.bias[rows])
