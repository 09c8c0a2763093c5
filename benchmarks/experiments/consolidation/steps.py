"""Steps of a study: one command each, done once, several side by side where there are cores for it.

On CPUs small networks gain little from a second thread, so that two single-threaded commands at once take about half
the time of one after the other.
"""

import json
import os
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

from repcon import config
from repcon.commands import evaluate, pack, precompute, teach, train
from repcon.config import EvaluateConfig, PackConfig, PrecomputeConfig, TeachConfig, TrainConfig
from repcon.models.factory import create_model
from repcon.models.merge import average, split_classifier
from repcon.models.saved_model import save_model
from repcon.runtime.console import console
from repcon.runtime.errors import UserError
from repcon.runtime.memory import keep_freed_memory
from repcon.runtime.run_dir import write_json
from repcon.runtime.system import cores


@dataclass(frozen=True, slots=True, kw_only=True)
class AverageConfig:
    """A mean of weights as a model of its own: what a student starts from, without any training."""

    models: dict[str, str]
    """By the names of `shares`."""
    shares: dict[str, float]
    out: str
    size: int


def write_average(settings: AverageConfig) -> dict[str, Any]:
    """Writes the mean as a folder that timm opens."""
    created = {name: create_model(model, size=settings.size) for name, model in settings.models.items()}
    members = {name: split_classifier(model, settings.size) for name, model in created.items()}
    first = next(iter(members.values()))
    state = average(members, settings.shares)
    first.backbone.load_state_dict(state)
    save_model(first.backbone, settings.out, classes=(), preprocessing=first.preprocessing, extra={})
    return {"shares": settings.shares}


COMMANDS = {
    PackConfig: pack.run,
    TeachConfig: teach.run,
    PrecomputeConfig: precompute.run,
    TrainConfig: train.run,
    EvaluateConfig: evaluate.run,
    AverageConfig: write_average,
}
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """A command's settings, and the path beside which it is marked as done."""

    settings: Any
    out: Path

    @property
    def command(self) -> str:
        return type(self.settings).__name__.removesuffix("Config").lower()

    def held(self) -> dict[str, Any] | None:
        """What the step gave when it was done: {"settings", "results", "seconds"}; None where it was not.

        Raises UserError where it was done with other settings.
        """
        if not self._marker.is_file():
            return None
        held = json.loads(self._marker.read_text())
        if held["settings"] != config.dump(self.settings):
            raise UserError(f"{self.out} was made with other settings; name another --work folder, or delete it")
        return held

    def do(self) -> None:
        started = time.time()
        results = COMMANDS[type(self.settings)](self.settings)
        held = {"settings": config.dump(self.settings), "results": results, "seconds": time.time() - started}
        self._marker.parent.mkdir(parents=True, exist_ok=True)
        write_json(self._marker, held)

    @property
    def _marker(self) -> Path:
        return self.out.with_name(f"{self.out.name}.done.json")


def run(steps: Sequence[Step], jobs: int) -> list[dict[str, Any]]:
    """Does what is left of the steps, `jobs` at a time; gives what each holds, in order."""
    left = list({step.out: step for step in steps if step.held() is None}.values())
    if jobs == 1 or len(left) == 1:
        for step in left:
            console.rule(f"{step.command} {step.out.name}")
            step.do()
    elif left:
        _side_by_side(left, jobs)
    held = [step.held() for step in steps]
    return [one for one in held if one is not None]


def _side_by_side(steps: Sequence[Step], jobs: int) -> None:
    """Each in a process of its own share of the cores; the first error ends them all."""
    workers = ProcessPoolExecutor(jobs, get_context("spawn"), initializer=end_with_parent)
    with _threads(max(1, cores() // jobs)), workers as pool:
        waiting: dict[Future[None], Step] = {pool.submit(_quietly, step): step for step in steps}
        started = time.time()
        try:
            for count, future in enumerate(as_completed(waiting), 1):
                future.result()
                step = waiting[future]
                took = f"{count} of {len(steps)}, {time.time() - started:,.0f} s"
                console.print(f"{step.command} {step.out.name}  [dim]{took}[/]", highlight=False)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def end_with_parent() -> None:
    """Ends this process when the one that started it is killed; it would go on with what is queued, beside the next."""

    def watch() -> None:
        if parent := parent_process():
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _quietly(step: Step) -> None:
    console.quiet = True  # Several progress displays in one terminal would overwrite each other.
    keep_freed_memory()
    step.do()


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Processes that are started inside take this many threads."""
    before = {name: os.environ.get(name) for name in THREADS}
    os.environ.update(dict.fromkeys(THREADS, str(count)))
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value
