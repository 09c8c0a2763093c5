"""Stops a run whose loss is no number any more, and keeps what led there."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from repcon.distill.distributed import DistributedContext
from repcon.distill.loader import Batch
from repcon.runtime.errors import UserError

REMEDY = "Start again under another `out` with a lower optim.lr, with optim.clip_norm, or with precision = 'fp32'"


@contextmanager
def batch_norm_explained() -> Iterator[None]:
    """Explains, around a training forward pass, that batch norm refuses a batch of one value per channel."""
    try:
        yield
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise UserError(
            "batch_size: batch norm needs more than one value per channel, and this batch has one; enlarge batch_size "
            "or size, or set freeze_norm = true"
        ) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class _Seen:
    step: int
    losses: torch.Tensor
    """(H,) on the CPU; on a GPU the copy may still be under way until `ready`."""
    ready: torch.cuda.Event | None
    logits: torch.Tensor
    batch: Batch


class LossGuard:
    """Looks at every step's losses: on a CPU at once, on a GPU in the middle of the next step, so that it never waits.

    In a team all processes stop together.
    """

    def __init__(self, names: tuple[str, ...], distributed: DistributedContext, folder: Path) -> None:
        self._names, self._distributed, self._folder = names, distributed, folder
        self._seen: _Seen | None = None

    def watch(self, step: int, losses: torch.Tensor, logits: torch.Tensor, batch: Batch) -> None:
        """Notes a step's losses; on a CPU checks them."""
        ready = None
        copied = losses.detach()
        if copied.device.type == "cuda":
            copied = copied.to("cpu", non_blocking=True)
            ready = torch.cuda.Event()
            ready.record()
        self._seen = _Seen(step=step, losses=copied, ready=ready, logits=logits.detach(), batch=batch)
        if ready is None:
            self.check()

    def check(self) -> None:
        """Checks the newest step, once. Raises UserError naming step, head and the file that holds the batch."""
        seen, self._seen = self._seen, None
        if seen is not None:
            self._check(seen)

    def check_answers(self, step: int, logits: torch.Tensor) -> None:
        """Raises UserError where answers after the update of `step` are not finite: no loss has told of it yet."""
        if self._distributed.any(not torch.isfinite(logits).all()):
            what = "since its update the student's answers are not finite, so nothing was saved"
            raise UserError(f"step {step}: {what}. {REMEDY}")

    def _check(self, seen: _Seen) -> None:
        if seen.ready is not None:
            seen.ready.synchronize()
        bad = [
            name for name, loss in zip(self._names, seen.losses.tolist(), strict=True) if not abs(loss) < float("inf")
        ]
        if not self._distributed.any(bool(bad)):
            return
        where = self._dump(seen) if bad else "another process's dump"
        heads = ", ".join(repr(name) for name in bad) or "another process"
        raise UserError(f"step {seen.step}: the loss of head {heads} is not finite; the batch is in {where}. {REMEDY}")

    def _dump(self, seen: _Seen) -> Path:
        """The step's pixels, labels, logits and losses, for `torch.load`."""
        path = self._folder / f"not-finite-step-{seen.step}-rank-{self._distributed.rank}.pt"
        batch, rows = seen.batch, seen.batch.rows.cpu()
        state = {
            "step": seen.step,
            "losses": dict(zip(self._names, seen.losses.tolist(), strict=True)),
            "logits": seen.logits.cpu(),
            "images": batch.images,
            "crops": batch.crops,
            "pixels": batch.pixels.cpu(),
            "labels": {
                name: [table.cpu().index_select(0, rows) for table in pair] for name, pair in batch.labels.items()
            },
        }
        torch.save(state, path)
        return path
