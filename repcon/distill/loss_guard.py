"""Stop on a NaN or infinite loss, and save the batch that caused it."""

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
def explain_batch_norm_error() -> Iterator[None]:
    """Raises UserError where batch norm refuses a batch with one value per channel in a training forward pass."""
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
class _WatchedStep:
    step: int
    losses: torch.Tensor
    """(H,) on the CPU; on a GPU the copy is complete once `copied` is."""
    copied: torch.cuda.Event | None
    logits: torch.Tensor
    batch: Batch


class LossGuard:
    """Checks every step's losses: on a CPU at once, on a GPU in the middle of the next step, so that it never waits.

    All ranks stop together. folder: where the batch is saved.
    """

    def __init__(self, names: tuple[str, ...], distributed: DistributedContext, folder: Path) -> None:
        self._names, self._distributed, self._folder = names, distributed, folder
        self._watched: _WatchedStep | None = None

    def watch(self, step: int, losses: torch.Tensor, logits: torch.Tensor, batch: Batch) -> None:
        """Record a step's losses (H,); on a CPU check them."""
        copied = None
        on_cpu = losses.detach()
        if on_cpu.device.type == "cuda":
            on_cpu = on_cpu.to("cpu", non_blocking=True)
            copied = torch.cuda.Event()
            copied.record()
        self._watched = _WatchedStep(step=step, losses=on_cpu, copied=copied, logits=logits.detach(), batch=batch)
        if copied is None:
            self.check()

    def check(self) -> None:
        """Check the latest step, once. Raises UserError naming step, head and the file that holds the batch."""
        watched, self._watched = self._watched, None
        if watched is None:
            return
        if watched.copied is not None:
            watched.copied.synchronize()
        losses = zip(self._names, watched.losses.tolist(), strict=True)
        heads = [name for name, loss in losses if not abs(loss) < float("inf")]
        if not self._distributed.any_rank(bool(heads)):
            return
        where = self._save(watched) if heads else "another process's dump"
        named = ", ".join(repr(name) for name in heads) or "another process"
        raise UserError(
            f"step {watched.step}: the loss of head {named} is not finite; the batch is in {where}. {REMEDY}"
        )

    def check_logits(self, step: int, logits: torch.Tensor) -> None:
        """Raises UserError where logits after the update of `step` are not finite, before any loss shows it."""
        if self._distributed.any_rank(not torch.isfinite(logits).all()):
            what = "since its update the student's answers are not finite, so nothing was saved"
            raise UserError(f"step {step}: {what}. {REMEDY}")

    def _save(self, watched: _WatchedStep) -> Path:
        """Write the step's pixels, labels, logits and losses, for `torch.load`."""
        path = self._folder / f"not-finite-step-{watched.step}-rank-{self._distributed.rank}.pt"
        batch, rows = watched.batch, watched.batch.rows.cpu()
        state = {
            "step": watched.step,
            "losses": dict(zip(self._names, watched.losses.tolist(), strict=True)),
            "logits": watched.logits.cpu(),
            "images": batch.images,
            "crops": batch.crops,
            "pixels": batch.pixels.cpu(),
            "labels": {
                name: [table.cpu().index_select(0, rows) for table in pair] for name, pair in batch.labels.items()
            },
        }
        torch.save(state, path)
        return path
