"""A run's figures in its trackers, offline: Weights & Biases, MLflow in SQLite, trackio's local files, TensorBoard."""

import json
import os
import sqlite3
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from training_case import losses, settings, stop_after

from repcon.commands import train
from repcon.distill import background_tracker, trackers
from repcon.distill.trackers import TrackedRun, Trackers
from repcon.runtime import extras
from repcon.runtime.errors import UserError

pytest_plugins = ("training_fixtures",)


class Recorded:
    """A tracker that keeps what it is told, and fails at `fails_at`."""

    place = "here"

    def __init__(self, run: TrackedRun, fails_at: int = -1) -> None:
        self.run, self.id, self.fails_at = run, run.id or f"id of {run.name}", fails_at
        self.steps: list[int] = []
        self.metrics: dict[str, float] = {}
        self.completed: bool | None = None

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self.steps.append(step)
        self.metrics |= metrics
        if step == self.fails_at:
            raise ConnectionError("the server is gone\nand more")

    def finish(self, completed: bool) -> None:
        self.completed = completed


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[Recorded]:
    """What takes wandb's place: every run that is started."""
    started: list[Recorded] = []

    def start(run: TrackedRun) -> Recorded:
        started.append(Recorded(run))
        return started[-1]

    monkeypatch.setitem(trackers.TRACKERS, "wandb", start)
    monkeypatch.setattr(trackers, "require_extra", lambda *arguments: None)
    return started


def interrupted(monkeypatch: pytest.MonkeyPatch, run: Any) -> None:
    """The run, stopped after 6 of its 16 steps."""
    with monkeypatch.context() as patched:
        stop_after(6, patched)
        with pytest.raises(KeyboardInterrupt):
            train.run(run)


def test_a_run_and_its_resume_are_one_run_of_the_tracker(
    case: Path, tmp_path: Path, recorded: list[Recorded], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = settings(case, tmp_path / "run", trackers=("wandb",))
    interrupted(monkeypatch, run)
    train.run(run)
    first, second = recorded
    assert (first.completed, second.completed) == (False, True)
    assert second.id == first.id and second.run.name == first.run.name and first.run.name.startswith("run-")
    assert (first.run.id, first.run.step, second.run.id, second.run.step) == ("", 0, first.id, 6)
    steps = [step for step in first.steps if step] + second.steps
    assert set(steps) == {step for step, _ in losses(tmp_path / "run")} == set(range(1, 17))
    assert second.metrics["loss/colours"] == losses(tmp_path / "run")[-1][1]["colours"]
    assert {"lr", "images_per_second", "data_share", "kl/tones", "agreement/tones"} <= second.metrics.keys()
    assert first.run.settings["optim"]["lr"] == run.optim.lr
    assert json.loads((tmp_path / "run" / trackers.IDS_FILE).read_text()) == {"name": first.run.name, "wandb": first.id}


def test_a_tracker_that_fails_is_left_out_with_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    held = {
        "wandb": Recorded(TrackedRun(folder=tmp_path, name="a", settings={}, step=0, id=""), fails_at=3),
        "mlflow": Recorded(TrackedRun(folder=tmp_path, name="a", settings={}, step=0, id="")),
    }
    for kind, tracker in held.items():
        monkeypatch.setitem(trackers.TRACKERS, kind, lambda run, tracker=tracker: tracker)
    with Trackers(("wandb", "mlflow"), tmp_path) as both:
        for step in range(1, 6):
            both.log({"loss": 1.0}, step)
    assert held["wandb"].steps == [1, 2, 3] and held["mlflow"].steps == [1, 2, 3, 4, 5]
    assert (held["wandb"].completed, held["mlflow"].completed) == (None, True)
    out = capsys.readouterr().out
    assert out.count("warning") == 1
    assert "wandb failed (the server is gone); training goes on without it" in out


class Slow(Recorded):
    """A tracker whose server answers from `answers` on."""

    def __init__(self) -> None:
        super().__init__(TrackedRun(folder=Path(), name="a", settings={}, step=0, id=""))
        self.asked, self.answers = threading.Event(), threading.Event()

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self.asked.set()
        self.answers.wait(60)
        super().log(metrics, step)


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Iterator[Slow]:
    """What takes MLflow's place."""
    tracker = Slow()
    monkeypatch.setitem(trackers.TRACKERS, "mlflow", lambda run: tracker)
    yield tracker
    tracker.answers.set()


def test_a_slow_tracker_does_not_hold_up_training(slow: Slow, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with Trackers(("mlflow",), tmp_path) as one:
        for step in range(1, 6):
            one.log({"loss": 1.0}, step)
        assert slow.steps == []  # and `log` has returned
        slow.answers.set()
    assert slow.steps == [1, 2, 3, 4, 5] and slow.completed
    assert "warning" not in capsys.readouterr().out


def test_figures_that_a_slow_tracker_has_no_time_for_are_counted(
    slow: Slow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(background_tracker, "MAX_PENDING", 3)
    with Trackers(("mlflow",), tmp_path) as one:
        one.log({"loss": 1.0}, 1)
        assert slow.asked.wait(60)  # the first line is on its way
        for step in range(2, 11):
            one.log({"loss": 1.0}, step)
        assert capsys.readouterr().out.count("mlflow is slower than training") == 1
        slow.answers.set()
    assert slow.steps == [1, 8, 9, 10] and slow.completed
    assert "mlflow was too slow; 6 of the run's lines are not there" in capsys.readouterr().out


def test_a_server_that_does_not_answer_delays_the_end_by_a_limit(
    slow: Slow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(background_tracker, "FINISH_SECONDS", 0.2)
    with Trackers(("mlflow",), tmp_path) as one:
        for step in range(1, 6):
            one.log({"loss": 1.0}, step)
    out = capsys.readouterr().out
    assert "mlflow did not answer in time; 5 of the run's lines are not there" in out and out.count("warning") == 1
    assert "mlflow has figures left to send; waiting up to 0 s" in out
    slow.answers.set()
    for thread in threading.enumerate():
        if thread.name == "tracker mlflow":
            thread.join(60)
    assert slow.steps == [1] and slow.completed is None  # the call that was running, and nothing after it


def test_a_tracker_that_ends_the_interpreter_is_left_out_too(
    slow: Slow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(slow, "log", lambda metrics, step: sys.exit("no licence"))
    with Trackers(("mlflow",), tmp_path) as one:
        one.log({"loss": 1.0}, 1)
    assert "mlflow failed (no licence); training goes on without it" in capsys.readouterr().out


def test_a_tracker_that_cannot_be_started_is_refused_and_a_resumed_run_goes_on_without_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def failing(run: TrackedRun) -> Recorded:
        raise RuntimeError("not logged in")

    monkeypatch.setitem(trackers.TRACKERS, "wandb", failing)
    with pytest.raises(UserError, match=r"trackers: wandb could not be started \(not logged in\)"):
        Trackers(("wandb",), tmp_path)
    Trackers(("wandb",), tmp_path, step=5)
    assert "wandb could not go on (not logged in); training goes on without it" in capsys.readouterr().out


def test_a_start_has_limits_that_the_user_may_set(
    tmp_path: Path, recorded: list[Recorded], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, str | None]] = []
    start = trackers.TRACKERS["wandb"]

    def look(run: TrackedRun) -> Any:
        seen.append({name: os.environ.get(name) for name in trackers._START_LIMITS})
        return start(run)

    monkeypatch.setitem(trackers.TRACKERS, "wandb", look)
    for name in trackers._START_LIMITS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "300")
    with Trackers(("wandb",), tmp_path):
        assert seen == [trackers._START_LIMITS | {"WANDB_INIT_TIMEOUT": "300"}]
        assert os.environ["WANDB_INIT_TIMEOUT"] == "300"
        assert "MLFLOW_HTTP_REQUEST_TIMEOUT" not in os.environ


@pytest.mark.timeout(60)
def test_a_server_that_cannot_be_reached_is_soon_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    for name in trackers._START_LIMITS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"trackers: mlflow could not be started \(API request to http://127.0.0.1:9"):
        Trackers(("mlflow",), tmp_path)


def test_a_tracker_that_is_not_installed_is_refused_before_anything_is_written(
    case: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"trackers: mlflow needs mlflow: pip install 'repcon\[mlflow\]'"):
        train.run(settings(case, tmp_path / "run", trackers=("mlflow",)))
    assert not (tmp_path / "run").exists()


def test_a_folder_of_a_tracker_s_name_is_no_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extras, "find_spec", lambda name: SimpleNamespace(origin=None))
    with pytest.raises(UserError, match="wandb needs wandb"):
        trackers.require_trackers(("wandb",))


def test_weights_and_biases_offline(case: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = settings(case, tmp_path / "run", trackers=("wandb",))
    interrupted(monkeypatch, run)
    train.run(run)
    name = json.loads((tmp_path / "run" / trackers.IDS_FILE).read_text())["wandb"]
    parts = sorted((tmp_path / "run" / "wandb").glob(f"offline-run-*-{name}"))
    assert len(parts) == 2
    for part in parts:
        (file,) = part.glob("*.wandb")
        limit = time.monotonic() + 20  # wandb's own process writes it, at times after `finish` has returned
        while b"loss/colours" not in file.read_bytes():
            assert time.monotonic() < limit
            time.sleep(0.1)


def test_mlflow_in_sqlite(case: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "students")
    run = settings(case, tmp_path / "run", trackers=("mlflow",))
    interrupted(monkeypatch, run)
    client = mlflow.MlflowClient()
    (experiment,) = (each for each in client.search_experiments() if each.name == "students")
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.status == "KILLED" and found.data.params["optim.lr"] == str(run.optim.lr)
    train.run(run)
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.status == "FINISHED" and found.info.run_name.startswith("run-")
    history = client.get_metric_history(found.info.run_id, "loss/tones")
    wanted = {step: loss["tones"] for step, loss in losses(tmp_path / "run")}
    assert {point.step: point.value for point in history} == pytest.approx(wanted)


def test_trackio_locally(case: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio")
    run = settings(case, tmp_path / "run", trackers=("trackio",))
    interrupted(monkeypatch, run)
    train.run(run)
    with sqlite3.connect(tmp_path / "trackio" / "repcon.db") as held:
        rows = held.execute("select run_name, step, metrics from metrics").fetchall()
    name = json.loads((tmp_path / "run" / trackers.IDS_FILE).read_text())["trackio"]
    assert {row[0] for row in rows} == {name}
    found = [(step, json.loads(metrics)) for _, step, metrics in rows]
    assert {step: figures["loss/tones"] for step, figures in found if "loss/tones" in figures} == pytest.approx(
        {step: loss["tones"] for step, loss in losses(tmp_path / "run")}
    )


def test_trackio_is_asked_for_one_run_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without trackio itself, whose pins exclude those of the tests."""
    asked: list[Any] = []
    run = SimpleNamespace(
        log=lambda metrics, step: asked.append((metrics, step)), finish=lambda: asked.append("finished")
    )

    def init(**options: Any) -> Any:
        asked.append(options)
        return run

    monkeypatch.setitem(sys.modules, "trackio", SimpleNamespace(init=init))
    monkeypatch.setenv("TRACKIO_PROJECT", "students")
    with Trackers(("trackio",), tmp_path, {"epochs": 2}) as one:
        one.log({"loss": 1.0}, 3)
    name = asked[0]["name"]
    assert asked[0]["project"] == "students" and asked[0]["config"] == {"epochs": 2} and asked[0]["resume"] == "allow"
    assert asked[1:] == [({"loss": 1.0}, 3), "finished"]
    Trackers(("trackio",), tmp_path, step=3)
    assert asked[-1]["name"] == name
