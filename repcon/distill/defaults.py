"""The settings of `repcon train` that follow from store and pack where the recipe leaves them open.

The fixed defaults (epochs) are those of `config.TrainConfig`.
"""

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence

from repcon.config import HeadConfig, TrainConfig
from repcon.distill.loss import default_temperature
from repcon.labels.layout import HeadInfo
from repcon.labels.store import LabelStore
from repcon.runtime.console import console

SIZE = 224
"""Pixels, where no teacher's size is known."""
BATCH_SIZES = ((20_000, 64), (80_000, 128), (None, 256))
"""Batch size for up to so many images."""
LEAST_STEPS, SMALLEST_BATCH = 16, 8
"""Smaller batches, down to 8, where an epoch would have fewer steps."""
RATE, RATE_BATCH = 3e-4, 64
"""The rate for a step of so many crops or more; in smaller steps it falls with their number. At 3e-4 in steps of 8
crops, heads that start warm end worse than they began."""


def resolve(settings: TrainConfig, store: LabelStore) -> TrainConfig:
    """The settings with heads, size, batch size, rate and norms decided; prints in one line what was chosen here.

    Heads that the store does not have are left as they are: the loss refuses them by name.
    """
    chosen = []
    heads = tuple(_head(head, store.heads) for head in settings.heads) or all_heads(store)
    if not settings.heads:
        chosen.append(f"heads {', '.join(head.name for head in heads)}")
    size, batch_size, freeze_norm = settings.size, settings.batch_size, settings.freeze_norm
    if not size:
        size = teachers_size([store.heads[head.name] for head in heads if head.name in store.heads])
        chosen.append(f"{size} pixels")
    if not batch_size:
        batch_size = batch_size_for(store.images)
        chosen.append(f"batches of {batch_size}")
    optim = settings.optim
    if not optim.lr:
        optim = dataclasses.replace(optim, lr=rate_for(batch_size * settings.grad_accum_steps))
        chosen.append(f"rate {optim.lr:.2g}")
    balance_heads = not settings.heads if settings.balance_heads == "auto" else settings.balance_heads
    if freeze_norm == "auto":
        freeze_norm = settings.pretrained
        chosen.append(f"batch-norm statistics {'kept' if freeze_norm else 'learnt'}")
    if any(not head.temperature for head in settings.heads or (HeadConfig(name=""),)):
        chosen.append("temperature " + ", ".join(sorted({f"{head.temperature:g}" for head in heads})))
    if chosen:
        console.print(f"chosen: {'; '.join(chosen)}", highlight=False, markup=False, soft_wrap=True)
    return dataclasses.replace(
        settings, heads=heads, balance_heads=balance_heads, size=size, batch_size=batch_size, freeze_norm=freeze_norm,
        optim=optim,
    )  # fmt: skip


def all_heads(store: LabelStore) -> tuple[HeadConfig, ...]:
    """All of the store's heads, weight 1."""
    return tuple(_head(HeadConfig(name=name), store.heads) for name in store.heads)


def _head(head: HeadConfig, stored: Mapping[str, HeadInfo]) -> HeadConfig:
    if head.temperature or head.name not in stored:
        return head
    return dataclasses.replace(head, temperature=default_temperature(stored[head.name].temperatures))


def teachers_size(heads: Sequence[HeadInfo]) -> int:
    """The input side in pixels of most teachers, the larger one of several."""
    sizes = Counter(int(head.metadata.preprocessing.get("size", 0)) or SIZE for head in heads)
    return max(sizes, key=lambda size: (sizes[size], size), default=SIZE)


def batch_size_for(images: int) -> int:
    """Crops per step for an epoch of so many images."""
    size = next(size for limit, size in BATCH_SIZES if limit is None or images <= limit)
    while size > SMALLEST_BATCH and size * LEAST_STEPS > images:
        size //= 2
    return size


def rate_for(crops: int) -> float:
    """The learning rate for steps of so many crops."""
    return RATE * min(1.0, crops / RATE_BATCH)
