"""Automatic settings of `repcon train`: those that the recipe leaves open and that depend on the store.

Fixed defaults (epochs) are those of `config.TrainConfig`.
"""

import dataclasses
from collections import Counter
from collections.abc import Mapping

from repcon.config import HeadConfig, TrainConfig
from repcon.distill.loss import default_temperature
from repcon.labels.layout import HeadInfo
from repcon.labels.store import LabelStore
from repcon.runtime.console import print_plain

DEFAULT_SIZE = 224
"""Input side in pixels where no teacher's is known."""
BATCH_SIZES = ((20_000, 64), (80_000, 128), (None, 256))
"""(images up to, batch size)."""
MIN_STEPS, MIN_BATCH_SIZE = 16, 8
"""Batches are halved, down to 8, where an epoch would have fewer steps."""
MAX_LR, FULL_LR_CROPS = 3e-4, 64
"""The learning rate of steps with 64 crops or more; smaller steps take a proportional one. At 3e-4 in steps of
8 crops, warm-started heads end worse than at the start."""


def resolve_auto_settings(settings: TrainConfig, store: LabelStore) -> TrainConfig:
    """The settings with heads, size, batch size, rate and batch-norm mode filled in; prints one line about the choices.

    Heads that the store does not have are left unchanged: the loss refuses them by name.
    """
    chosen = []
    asked = settings.heads or tuple(HeadConfig(name=name) for name in store.heads)
    heads = tuple(_with_temperature(head, store.heads) for head in asked)
    if not settings.heads:
        chosen.append(f"heads {', '.join(head.name for head in heads)}")
    size, batch_size, freeze_norm = settings.size, settings.batch_size, settings.freeze_norm
    if not size:
        teachers = [store.heads[head.name].metadata for head in heads if head.name in store.heads]
        sides = Counter(int(teacher.preprocessing.get("size", 0)) or DEFAULT_SIZE for teacher in teachers)
        # The most common one, of equally common ones the largest.
        size = max(sides, key=lambda side: (sides[side], side), default=DEFAULT_SIZE)
        chosen.append(f"{size} pixels")
    if not batch_size:
        batch_size = batch_size_for(store.images)
        chosen.append(f"batches of {batch_size}")
    optim = settings.optim
    if not optim.lr:
        optim = dataclasses.replace(optim, lr=learning_rate_for(batch_size * settings.grad_accum_steps))
        chosen.append(f"rate {optim.lr:.2g}")
    balance_heads = not settings.heads if settings.balance_heads == "auto" else settings.balance_heads
    if freeze_norm == "auto":
        freeze_norm = settings.pretrained
        chosen.append(f"batch-norm statistics {'kept' if freeze_norm else 'learnt'}")
    if any(not head.temperature for head in settings.heads or (HeadConfig(name=""),)):
        chosen.append("temperature " + ", ".join(sorted({f"{head.temperature:g}" for head in heads})))
    if chosen:
        print_plain(f"chosen: {'; '.join(chosen)}")
    return dataclasses.replace(
        settings, heads=heads, balance_heads=balance_heads, size=size, batch_size=batch_size, freeze_norm=freeze_norm,
        optim=optim,
    )  # fmt: skip


def _with_temperature(head: HeadConfig, stored: Mapping[str, HeadInfo]) -> HeadConfig:
    if head.temperature or head.name not in stored:
        return head
    return dataclasses.replace(head, temperature=default_temperature(stored[head.name].temperatures))


def batch_size_for(images: int) -> int:
    """Crops per step for an epoch of this many images."""
    size = next(size for limit, size in BATCH_SIZES if limit is None or images <= limit)
    while size > MIN_BATCH_SIZE and size * MIN_STEPS > images:
        size //= 2
    return size


def learning_rate_for(crops: int) -> float:
    """The learning rate for steps of this many crops."""
    return MAX_LR * min(1.0, crops / FULL_LR_CROPS)
