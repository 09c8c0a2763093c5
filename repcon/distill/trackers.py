"""Experiment trackers: log a run to TensorBoard, Weights & Biases, MLflow or trackio, in addition to metrics.jsonl."""

import contextlib
import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from repcon.config import TrackerKind
from repcon.distill.background_tracker import BackgroundTracker, Tracker, join_all
from repcon.distill.checkpoint import flatten
from repcon.runtime.console import print_plain, warn
from repcon.runtime.errors import UserError, first_line
from repcon.runtime.extras import require_extra
from repcon.runtime.run_dir import read_object, write_json

DEFAULT_PROJECT = "repcon"
"""The project if the tracker's environment variable names none."""
IDS_FILE = "trackers.json"
"""In the output folder: the run's name and its id in each tracker, with which a resumed run continues them."""

_START_LIMITS = {
    "WANDB_INIT_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",  # twice, with one retry
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
}
"""The libraries' own limits of a start, unless they are set: 10 s, where they would wait for 90 s (wandb) and for more
than four minutes (MLflow) for a server that cannot be reached. trackio has no such setting."""


@contextlib.contextmanager
def _start_limits() -> Iterator[None]:
    """Set `_START_LIMITS` in the environment for the block; what is logged later has the libraries' usual limits."""
    added = {name: value for name, value in _START_LIMITS.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrackedRun:
    """A tracker's arguments."""

    folder: Path
    name: str
    settings: Mapping[str, Any]
    step: int
    """The step that the run resumes after; 0 for a new run."""
    id: str
    """The tracker's id of the resumed run; empty for a new one."""


class TensorBoard:
    """Event files in the run's folder; events of steps that are repeated after a resume are purged."""

    def __init__(self, run: TrackedRun) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.id, self.place = run.name, str(run.folder / "tensorboard")
        self._writer = SummaryWriter(self.place, purge_step=run.step + 1 if run.step else None)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def finish(self, completed: bool) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run of wandb; WANDB_MODE, WANDB_PROJECT and its other environment variables apply."""

    def __init__(self, run: TrackedRun) -> None:
        import wandb

        self.id = run.id or run.name
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", DEFAULT_PROJECT), id=self.id, name=run.name, resume="allow",
            dir=str(run.folder), config=dict(run.settings), settings=wandb.Settings(silent=True, console="off"),
        )  # fmt: skip
        self.place = self._run.url or str(run.folder / "wandb")

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._run.log(dict(metrics), step=step)

    def finish(self, completed: bool) -> None:
        self._run.finish(exit_code=0 if completed else 1)


class MLflow:
    """A run of MLflow; MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME apply."""

    def __init__(self, run: TrackedRun) -> None:
        import mlflow
        from mlflow.entities import Param

        self._client, self.place = mlflow.MlflowClient(), mlflow.get_tracking_uri()
        self.id = run.id
        if self.id:
            self._client.update_run(self.id, status="RUNNING")
            return
        project = os.environ.get("MLFLOW_EXPERIMENT_NAME", DEFAULT_PROJECT)
        experiment = self._client.get_experiment_by_name(project)
        where = experiment.experiment_id if experiment else self._client.create_experiment(project)
        self.id = self._client.create_run(where, run_name=run.name).info.run_id
        params = [Param(name, str(value)[:500]) for name, value in flatten(run.settings).items()]
        self._client.log_batch(self.id, params=params)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        self._client.log_batch(self.id, [Metric(name, float(value), now, step) for name, value in metrics.items()])

    def finish(self, completed: bool) -> None:
        self._client.set_terminated(self.id, "FINISHED" if completed else "KILLED")


class Trackio:
    """A local run of trackio; TRACKIO_PROJECT, TRACKIO_DIR and TRACKIO_SPACE_ID apply."""

    def __init__(self, run: TrackedRun) -> None:
        project = os.environ.get("TRACKIO_PROJECT", DEFAULT_PROJECT)
        self.id, self.place = run.id or run.name, f"trackio show --project {project}"
        self._run: Any = import_module("trackio").init(
            project=project, name=self.id, config=dict(run.settings), resume="allow", embed=False,
            auto_log_cpu=False, auto_log_gpu=False,
        )  # fmt: skip

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._run.log(dict(metrics), step=step)

    def finish(self, completed: bool) -> None:
        self._run.finish()


TRACKERS: dict[TrackerKind, Callable[[TrackedRun], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "mlflow": MLflow,
    "trackio": Trackio,
}


def require_trackers(kinds: Sequence[TrackerKind]) -> None:
    """Raises UserError with the pip command where a tracker is not installed."""
    for kind in kinds:  # also the name of its module and of the extra
        require_extra(kind, (kind,), f"trackers: {kind}")


class Trackers:
    """The trackers of one run, each called from a thread of its own. One that fails is reported once and dropped."""

    def __init__(
        self, kinds: Sequence[TrackerKind] = (), folder: str | Path = "", settings: Mapping[str, Any] | None = None,
        step: int = 0,
    ) -> None:  # fmt: skip
        """step: the step that the run resumes after; 0 for a new run, where a tracker that cannot be started raises
        UserError. folder: holds the trackers' ids.
        """
        self._trackers: dict[TrackerKind, BackgroundTracker] = {}
        if not kinds:
            return
        folder = Path(folder)
        ids = read_object(folder / IDS_FILE) if step else {}
        ids.setdefault("name", f"{folder.resolve().name}-{uuid.uuid4().hex[:8]}")
        for kind in dict.fromkeys(kinds):
            run = TrackedRun(
                folder=folder, name=ids["name"], settings=settings or {}, step=step, id=ids.get(kind, "")
            )  # fmt: skip
            if tracker := self._start(kind, run):
                ids[kind] = tracker.id
                self._trackers[kind] = BackgroundTracker(kind, tracker)
                print_plain(f"tracked by {kind}: {tracker.place}")
        write_json(folder / IDS_FILE, ids)

    def __enter__(self) -> "Trackers":
        return self

    def __exit__(self, kind: object, *exception: object) -> None:
        self.finish(completed=kind is None)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Log figures by name to all trackers, without waiting for them."""
        for tracker in self._trackers.values():
            tracker.log(metrics, step)

    def finish(self, completed: bool) -> None:
        """End all runs, and wait for that a while."""
        for tracker in self._trackers.values():
            tracker.finish(completed)
        join_all(self._trackers.values())
        self._trackers.clear()

    def _start(self, kind: TrackerKind, run: TrackedRun) -> Tracker | None:
        try:
            with _start_limits():
                return TRACKERS[kind](run)
        except Exception as error:  # of the tracker's own libraries
            if run.step:
                warn(f"{kind} could not go on ({first_line(error)[:200]}); training goes on without it")
                return None
            self.finish(completed=False)
            hint = "see that it works alone (its login, its server), or leave it out of trackers"
            raise UserError(f"trackers: {kind} could not be started ({first_line(error)[:200]}); {hint}") from error
