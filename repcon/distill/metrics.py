"""Training metrics: the progress display, lines of metrics.jsonl, trackers, final results."""

import contextlib
import math
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self, TypeVar

import torch

from repcon.distill.distributed import DistributedContext
from repcon.distill.epoch_table import EpochTable
from repcon.distill.trackers import Trackers
from repcon.runtime.console import console, progress
from repcon.runtime.run_dir import RunDir, write_text
from repcon.runtime.untrusted import UnreadableError, parse_json

Item = TypeVar("Item")

MAX_STEP_LINES = 2000
"""Lines about steps that a run may log; a longer run logs means over several steps."""


def trim_metrics(path: Path, **last: int) -> None:
    """Drop the lines after `step=` or `epoch=`, which a resumed run writes again."""
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


class StepTimer:
    """Time spent waiting for data and time spent on everything else, since the last `pop`."""

    def __init__(self) -> None:
        self._data = self._step = 0.0
        self._since = time.perf_counter()

    def measure(self, batches: Iterator[Item]) -> Iterator[Item]:
        """Pass the batches on; the time that the consumer spends on one counts as its step."""
        self._since = time.perf_counter()
        while True:
            item = next(batches, None)
            self._data += self._lap()
            if item is None:
                return
            yield item
            self._step += self._lap()

    def pop(self) -> tuple[float, float]:
        """(data_seconds, step_seconds) so far, in or between steps; both start again at zero."""
        self._step += self._lap()
        spent = (self._data, self._step)
        self._data = self._step = 0.0
        return spent

    def _lap(self) -> float:
        before, self._since = self._since, time.perf_counter()
        return self._since - before


class TrainingLog:
    """Logs a run. Losses stay on the device until a line is due, so that logging never stalls a step.

    run: the folder of metrics.jsonl; None logs nothing, on ranks that write no files.
    steps, images, heads: the length of the whole run, in batches and crops over all ranks, and its heads' names.
    """

    def __init__(
        self,
        run: RunDir | None,
        distributed: DistributedContext,
        trackers: Trackers | None = None,
        *,
        steps: int,
        images: int,
        heads: tuple[str, ...],
    ) -> None:
        self._run, self._distributed, self._trackers = run, distributed, trackers or Trackers()
        self._run_steps, self._run_images, self._heads = steps, images, heads
        # A line waits for the losses, which on a GPU should happen rarely.
        self._every = max(-(-steps // MAX_STEP_LINES), 10 if distributed.device.type == "cuda" else 1)
        self._bars = progress()
        self._task = self._bars.add_task("train", total=images, unit="images", note="")
        # Since the last line:
        self._loss_sums: torch.Tensor | None = None
        self._steps = self._images = 0
        self._data_seconds = self._step_seconds = 0.0
        # Of all lines:
        self._total_seconds = [0.0, 0.0]
        self._total_images = 0
        self._started = time.monotonic()
        self._seconds_before = 0.0
        self._last: dict[str, Any] = {}
        self.validation: dict[str, Any] = {}
        """The latest validation figures."""
        self.validation_start: dict[str, Any] = {}
        """The validation figures before the first step."""
        self._table = EpochTable()

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bars.stop()

    def state_dict(self) -> dict[str, Any]:
        """What `resume` takes, so that lines and results are those of the whole run; all ranks must call it."""
        sums = None if self._loss_sums is None else self._distributed.all_sum(self._loss_sums.cpu()).tolist()
        return {
            "validation": self.validation,
            "validation_start": self.validation_start,
            "last": self._last,
            "total_seconds": self._total_seconds,
            "total_images": self._total_images,
            "seconds": self._seconds(),
            "since_last": {
                "loss_sums": sums,
                "steps": self._steps,
                "images": self._images,
                "data_seconds": self._data_seconds,
                "step_seconds": self._step_seconds,
            },
        }

    def resume(self, step: int, images: int, state: Mapping[str, Any]) -> None:
        """Continue from a `state_dict`, taken after `step` steps and `images` crops."""
        self.validation, self._last = dict(state["validation"]), dict(state["last"])
        self.validation_start = dict(state["validation_start"])
        self._total_seconds, self._total_images = list(state["total_seconds"]), state["total_images"]
        self._seconds_before = state["seconds"]
        since = state["since_last"]
        if since["loss_sums"] is not None and self._distributed.is_main:
            self._loss_sums = torch.tensor(since["loss_sums"], device=self._distributed.device)
        self._steps, self._images = since["steps"], since["images"]
        self._data_seconds, self._step_seconds = since["data_seconds"], since["step_seconds"]
        self._bars.update(self._task, completed=images)
        console.print(f"going on after step {step:,}")
        self._event("resume", step=step, images=images)

    def log_step(self, step: int, losses: torch.Tensor, images: int, lr: float, timer: StepTimer) -> None:
        """losses: (H,), this rank's part of the losses of a batch of `images` crops; the ranks' parts add up."""
        self._loss_sums = losses if self._loss_sums is None else self._loss_sums + losses
        data, compute = timer.pop()
        self._data_seconds, self._step_seconds = self._data_seconds + data, self._step_seconds + compute
        self._steps += 1
        self._images += images
        if step % self._every == 0 or step == self._run_steps:
            self._write_line(step, lr)
        self._bars.advance(self._task, images)

    def log_validation(self, step: int, epoch: int, figures: Mapping[str, Any]) -> None:
        """Validation after an epoch, 0 for the start: agreement and KL per head, kNN where asked for."""
        self.validation = dict(figures)
        self._event("validation", step=step, epoch=epoch, **figures)
        if epoch == 0:
            self.validation_start = dict(figures)
        scalars = {
            f"{name}/{head}": value
            for head, values in figures.get("heads", {}).items()
            for name, value in values.items()
        }
        if "knn" in figures:
            scalars["knn"] = figures["knn"]
        self._trackers.log(scalars, step)
        self._table.add_row(epoch, figures)

    def results(self) -> dict[str, Any]:
        """The final figures so far."""
        data, step = self._total_seconds
        seconds = data + step
        return {
            "loss": self._last.get("loss", {}),
            "validation": self.validation,
            "validation_start": self.validation_start,
            "steps": self._run_steps,
            "images": self._run_images,
            "images_per_second": self._total_images / seconds if seconds else 0.0,
            "data_share": data / seconds if seconds else 0.0,
            "seconds": self._seconds(),
            **peak_memory(self._distributed.device),
        }

    def _seconds(self) -> float:
        """Of the run so far, without the time between a stop and its resume."""
        return self._seconds_before + time.monotonic() - self._started

    def _write_line(self, step: int, lr: float) -> None:
        assert self._loss_sums is not None
        means = (self._distributed.all_sum(self._loss_sums.cpu()) / self._steps).tolist()
        data, compute = self._data_seconds, self._step_seconds
        seconds = max(data + compute, 1e-9)
        self._total_seconds = [self._total_seconds[0] + data, self._total_seconds[1] + compute]
        self._total_images += self._images
        loss = dict(zip(self._heads, means, strict=True))
        self._last = {"loss": loss}
        rate, waiting = self._images / seconds, data / seconds
        self._event(
            "step",
            step=step,
            images_per_second=rate,
            data_seconds=data / self._steps,
            step_seconds=compute / self._steps,
            loss=loss,
            lr=lr,
            **peak_memory(self._distributed.device),
        )
        losses = {f"loss/{name}": value for name, value in loss.items()}
        self._trackers.log({**losses, "lr": lr, "images_per_second": rate, "data_share": waiting}, step)
        waiting = self._total_seconds[0] / max(sum(self._total_seconds), 1e-9)
        self._bars.update(self._task, note=f"loss {sum(means):.3f}, {100 * waiting:.0f} % waiting for data")
        self._loss_sums, self._steps, self._images = None, 0, 0
        self._data_seconds = self._step_seconds = 0.0

    def _event(self, name: str, **figures: Any) -> None:
        if self._run is not None:
            self._run.log(name, **figures)


def peak_memory(device: torch.device) -> dict[str, float]:
    """The peak memory so far, in bytes: of this process, and of the GPU where one is used."""
    unit = 1 if sys.platform == "darwin" else 1024
    figures: dict[str, float] = {"memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    if device.type == "cuda":
        figures["gpu_memory_bytes"] = torch.cuda.max_memory_allocated(device)
    return figures
