"""What a training run tells: progress on screen, lines in metrics.jsonl, trackers if asked, results."""

import contextlib
import math
import resource
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from repcon.distill.distributed import DistributedContext
from repcon.distill.epoch_table import EpochTable, warn_where_worse
from repcon.distill.loader import Clock
from repcon.distill.trackers import Trackers
from repcon.runtime.console import console, progress
from repcon.runtime.run_dir import RunDir, write_text
from repcon.runtime.untrusted import UnreadableError, parse_json

MOST_LINES = 2000
"""Lines of steps that a run may log; a longer run logs means over several steps."""


def trim_metrics(path: Path, **last: int) -> None:
    """Drops lines about what comes after `step=` or `epoch=`: a resumed run takes that again."""
    if not path.is_file():
        return
    ((name, number),) = last.items()
    kept: list[str] = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(UnreadableError):  # a kill may leave the last line unfinished
            event = parse_json(line)
            at = event.get(name, 0) if isinstance(event, dict) else math.inf
            if isinstance(at, int | float) and at <= number:
                kept.append(line)
    write_text(path, "".join(line + "\n" for line in kept))


@dataclass(frozen=True, slots=True, kw_only=True)
class Totals:
    """How much a run does: for the progress display and the spacing of log lines."""

    steps: int
    images: int
    heads: tuple[str, ...]


class TrainingLog:
    """Losses arrive as device tensors and are only read when a line is due, so that logging never stalls a step."""

    def __init__(
        self, run: RunDir | None, totals: Totals, distributed: DistributedContext, trackers: Trackers | None = None
    ) -> None:
        self._run, self._totals, self._distributed = run, totals, distributed
        # A line waits for the losses; on a GPU that is worth it only now and then.
        self._every = max(-(-totals.steps // MOST_LINES), 10 if distributed.device.type == "cuda" else 1)
        self._trackers = trackers or Trackers()
        self._bars = progress()
        self._task = self._bars.add_task("train", total=totals.images, unit="images", note="")
        # Of the steps since the last line.
        self._sums: torch.Tensor | None = None
        self._count = self._images = 0
        self._data = self._compute = 0.0
        self._spent = [0.0, 0.0]
        self._shown = 0
        self._started = time.monotonic()
        self._before = 0.0
        self._last: dict[str, Any] = {}
        self.validation: dict[str, Any] = {}
        self.begun: dict[str, Any] = {}
        """The figures of the start."""
        self._table = EpochTable()

    def __enter__(self) -> "TrainingLog":
        self._bars.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bars.stop()

    def state(self) -> dict[str, Any]:
        """What `resumed` takes, so that lines and results are those of the whole run; all of the team must ask."""
        spent = {"spent": self._spent, "shown": self._shown, "seconds": self._seconds()}
        sums = None if self._sums is None else self._distributed.total(self._sums.cpu()).tolist()
        unsaid = {"sums": sums, "count": self._count, "images": self._images, "spent": [self._data, self._compute]}
        return {"validation": self.validation, "begun": self.begun, "last": self._last, **spent, "unsaid": unsaid}

    def resumed(self, step: int, images: int, state: Mapping[str, Any]) -> None:
        """Says where the run goes on, and takes what `state` gave there."""
        self.validation, self._last = dict(state["validation"]), dict(state["last"])
        self.begun = dict(state["begun"])
        self._spent, self._shown, self._before = list(state["spent"]), state["shown"], state["seconds"]
        unsaid = state["unsaid"]
        if unsaid["sums"] is not None and self._distributed.is_main:
            self._sums = torch.tensor(unsaid["sums"], device=self._distributed.device)
        self._count, self._images = unsaid["count"], unsaid["images"]
        self._data, self._compute = unsaid["spent"]
        self._bars.update(self._task, completed=images)
        console.print(f"going on after step {step:,}")
        self._event("resume", step=step, images=images)

    def step(self, step: int, losses: torch.Tensor, images: int, lr: float, clock: Clock) -> None:
        """losses: (H,), this process's part of the losses of a batch of `images` crops; the team's parts add up."""
        self._sums = losses if self._sums is None else self._sums + losses
        data, compute = clock.take()
        self._data, self._compute = self._data + data, self._compute + compute
        self._count += 1
        self._images += images
        if step % self._every == 0 or step == self._totals.steps:
            self._line(step, lr)
        self._bars.advance(self._task, images)

    def validated(self, step: int, epoch: int, figures: Mapping[str, Any]) -> None:
        """Validation after an epoch, 0 for the start: agreement and KL per head, kNN where asked."""
        self.validation = dict(figures)
        self._event("validation", step=step, epoch=epoch, **figures)
        if epoch == 0:
            self.begun = dict(figures)
        shown = {
            f"{name}/{head}": value
            for head, values in figures.get("heads", {}).items()
            for name, value in values.items()
        }
        if "knn" in figures:
            shown["knn"] = figures["knn"]
        self._trackers.log(shown, step)
        self._table.row(epoch, figures)

    def compared(self) -> list[str]:
        """Warns of heads that are worse than at the start; gives their names."""
        return warn_where_worse(self.begun, self.validation)

    def results(self) -> dict[str, Any]:
        """The final figures so far."""
        data, step = self._spent
        seconds = data + step
        return {
            "loss": self._last.get("loss", {}),
            "validation": self.validation,
            "validation_start": self.begun,
            "steps": self._totals.steps,
            "images": self._totals.images,
            "images_per_second": self._shown / seconds if seconds else 0.0,
            "data_share": data / seconds if seconds else 0.0,
            "seconds": self._seconds(),
            **memory(self._distributed.device),
        }

    def finish(self, results: Mapping[str, Any]) -> dict[str, Any]:
        """Writes results.json."""
        return self._run.finish(results) if self._run is not None else dict(results)

    def _seconds(self) -> float:
        """Of the run so far, its parts added up."""
        return self._before + time.monotonic() - self._started

    def _line(self, step: int, lr: float) -> None:
        assert self._sums is not None
        means = (self._distributed.total(self._sums.cpu()) / self._count).tolist()
        data, compute = self._data, self._compute
        seconds = max(data + compute, 1e-9)
        self._spent = [self._spent[0] + data, self._spent[1] + compute]
        self._shown += self._images
        loss = dict(zip(self._totals.heads, means, strict=True))
        self._last = {"loss": loss}
        rate, share = self._images / seconds, data / seconds
        self._event(
            "step",
            step=step,
            images_per_second=rate,
            data_seconds=data / self._count,
            step_seconds=compute / self._count,
            loss=loss,
            lr=lr,
            **memory(self._distributed.device),
        )
        losses = {f"loss/{name}": value for name, value in loss.items()}
        self._trackers.log({**losses, "lr": lr, "images_per_second": rate, "data_share": share}, step)
        waiting = self._spent[0] / max(sum(self._spent), 1e-9)
        self._bars.update(self._task, note=f"loss {sum(means):.3f}, {100 * waiting:.0f} % waiting for data")
        self._sums, self._count, self._images = None, 0, 0
        self._data = self._compute = 0.0

    def _event(self, name: str, **figures: Any) -> None:
        if self._run is not None:
            self._run.log(name, **figures)


def memory(device: torch.device) -> dict[str, float]:
    """The largest use so far, in bytes: of this process, and of the GPU where one is used."""
    unit = 1 if sys.platform == "darwin" else 1024
    figures: dict[str, float] = {"memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    if device.type == "cuda":
        figures["gpu_memory_bytes"] = torch.cuda.max_memory_allocated(device)
    return figures
