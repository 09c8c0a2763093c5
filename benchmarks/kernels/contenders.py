"""What computes the loss and its gradient by the logits: repcon_kernels, and the ways it would be done without it.

Every contender starts from the same: logits, the slab of stored labels, the row numbers of the batch. What they do with
the classes that were not stored differs: ours spreads them evenly, as training does by default, `sparse` takes them as
one, and `dense` and Liger's leave them out, which is less work.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from repcon_kernels import HeadSpec, multi_head_kl
from torch import Tensor

K, TAIL = 16, "uniform"
Step = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Logits that require gradients to (loss, gradient)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """A batch's labels for some heads, on one device."""

    heads: tuple[HeadSpec, ...]
    ids: tuple[Tensor, ...]
    logp: tuple[Tensor, ...]
    wide_ids: tuple[Tensor, ...]
    """The same ids as int64, which torch's own operations want; given to them ready made."""
    rows: Tensor
    weights: Tensor

    @property
    def columns(self) -> int:
        return self.heads[-1].stop

    def label_bytes(self) -> int:
        """Stored bytes that one batch reads."""
        return len(self.rows) * sum(2 * head.k + 2 * (head.k + 1) for head in self.heads)


def problem(batch: int, classes: tuple[int, ...], device: str, *, slab_rows: int = 8192) -> Problem:
    """Random teachers; a slab of at least `slab_rows` rows, of which the batch takes some."""
    generator = torch.Generator(device).manual_seed(0)
    heads, ids, logp, start = [], [], [], 0
    rows = max(batch, slab_rows)
    for count in classes:
        k = min(K, count)
        values = torch.empty(rows, k + 1, device=device).uniform_(generator=generator)
        log_p = (4 * values).log_softmax(dim=1)
        columns = torch.rand(rows, min(count, 4 * k), device=device, generator=generator).argsort(dim=1)[:, :k]
        heads.append(HeadSpec(start=start, classes=count, k=k))
        ids.append(columns * (count // min(count, 4 * k)))
        logp.append(log_p.half())
        start += count
    return Problem(
        heads=tuple(heads),
        ids=tuple(part.to(torch.uint16) for part in ids),
        logp=tuple(logp),
        wide_ids=tuple(ids),
        rows=torch.randint(rows, (batch,), device=device, generator=generator),
        weights=torch.ones(len(heads), device=device),
    )


def ours(task: Problem, implementation: str) -> Step:
    """The package's function with its gradient, as a training step calls it."""

    def step(logits: Tensor) -> tuple[Tensor, Tensor]:
        loss = multi_head_kl(
            logits,
            task.heads,
            task.ids,
            task.logp,
            rows=task.rows,
            weights=task.weights,
            tail=TAIL,
            implementation=implementation,
        ).sum()
        return loss.detach(), torch.autograd.grad(loss, logits)[0]

    return step


def operator(task: Problem, implementation: str) -> Step:
    """The operator alone, which gives losses and gradient at once; autograd's own launches are left out."""
    heads = task.heads
    arguments = (
        list(task.ids),
        list(task.logp),
        task.rows,
        task.weights,
        [head.start for head in heads],
        [head.classes for head in heads],
        [head.tail_column for head in heads],
        [head.temperature for head in heads],
        TAIL,
        implementation,
        True,
    )

    def step(logits: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            return torch.ops.repcon_kernels.multi_head_kl(logits, *arguments)

    return step


def dense(task: Problem, *, compiled: bool = False) -> Step:
    """log_softmax and kl_div against a target that is scattered into (B, C) zeros."""

    def loss(logits: Tensor) -> Tensor:
        total = logits.new_zeros((), dtype=torch.float32)
        for head, ids, logp in zip(task.heads, task.wide_ids, task.logp, strict=True):
            z = logits[:, head.start : head.stop].float()
            p = logp[task.rows][:, : head.k].float().exp()
            target = torch.zeros_like(z).scatter_(1, ids[task.rows], p)
            total = total + F.kl_div(z.log_softmax(dim=1), target, reduction="batchmean")
        return total

    return _by_autograd(torch.compile(loss) if compiled else loss)


def sparse(task: Problem, *, compiled: bool = False) -> Step:
    """logsumexp and gather, the bucket of the rest by 1 - sum."""

    def loss(logits: Tensor) -> Tensor:
        total = logits.new_zeros((), dtype=torch.float32)
        for head, ids, logp in zip(task.heads, task.wide_ids, task.logp, strict=True):
            z = logits[:, head.start : head.stop].float()
            log_p = logp[task.rows].float()
            log_q = z.gather(1, ids[task.rows]) - z.logsumexp(dim=1, keepdim=True)
            log_q_tail = torch.log1p(-log_q.exp().sum(dim=1, keepdim=True).clamp(max=1 - 1e-6))
            log_q = torch.cat([log_q, log_q_tail], dim=1)
            total = total + (log_p.exp() * (log_p - log_q)).sum(dim=1).mean()
        return total

    return _by_autograd(torch.compile(loss) if compiled else loss)


def liger(task: Problem) -> Step | None:
    """Liger-Kernel's KL where it is installed, after the log_softmax that it takes."""
    try:
        from liger_kernel.transformers import LigerKLDIVLoss  # pyright: ignore[reportMissingImports]
    except ImportError:
        return None
    kl = LigerKLDIVLoss(reduction="batchmean")

    def loss(logits: Tensor) -> Tensor:
        total = logits.new_zeros((), dtype=torch.float32)
        for head, ids, logp in zip(task.heads, task.wide_ids, task.logp, strict=True):
            z = logits[:, head.start : head.stop].float()
            p = logp[task.rows][:, : head.k].float().exp()
            target = torch.zeros_like(z).scatter_(1, ids[task.rows], p)
            total = total + kl(z.log_softmax(dim=1), target)
        return total

    return _by_autograd(loss)


def _by_autograd(loss: Callable[[Tensor], Tensor]) -> Step:
    def step(logits: Tensor) -> tuple[Tensor, Tensor]:
        value = loss(logits)
        return value.detach(), torch.autograd.grad(value, logits)[0]

    return step
