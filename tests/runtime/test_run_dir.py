import io
import json
import os
import re
import subprocess
import sys
import uuid
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from rich.progress import Progress

from repcon.runtime.console import ProgressLines
from repcon.runtime.errors import UserError
from repcon.runtime.run_dir import RunDir, write_json, write_text
from repcon.runtime.system import environment


def test_a_run_leaves_configuration_environment_metrics_and_results(tmp_path):
    run = RunDir(tmp_path / "run", "train", "size = 96\n")
    run.log("step", step=1, loss=2.5)
    assert run.finish({"loss": 2.5}) == {"loss": 2.5}
    assert (run.path / "config.toml").read_text() == "size = 96\n"
    assert json.loads((run.path / "results.json").read_text()) == {"loss": 2.5}
    line = json.loads((run.path / "metrics.jsonl").read_text())
    assert line["event"] == "step" and line["loss"] == 2.5 and line["seconds"] >= 0


def test_a_second_run_of_the_same_command_appends(tmp_path):
    for step in (1, 2):
        run = RunDir(tmp_path, "train", "")
        run.log("step", step=step)
        run.finish({})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="holds other files"):
        RunDir(tmp_path, "train", "")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_another_commands_folder_is_refused(tmp_path):
    RunDir(tmp_path / "run", "teach", "").finish({})
    with pytest.raises(UserError, match="output of `repcon teach`"):
        RunDir(tmp_path / "run", "train", "")


def test_a_file_is_refused(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(UserError, match="is a file"):
        RunDir(tmp_path / "run", "train", "")


def test_the_environment_names_what_a_figure_depends_on():
    facts = environment()
    assert {"versions", "processor", "cores", "device", "command", "started"} <= facts.keys()
    assert {"python", "torch", "timm", "numpy", "zarr"} <= facts["versions"].keys()


def test_json_is_replaced_whole(tmp_path):
    path = tmp_path / "figures.json"
    for value in (1, 2):
        write_json(path, {"value": value})
    assert json.loads(path.read_text()) == {"value": 2}
    assert [entry.name for entry in tmp_path.iterdir()] == ["figures.json"]


@pytest.mark.parametrize("width", [40, 60, 80, 120, 200])
def test_no_line_of_progress_is_wider_than_the_terminal(width):
    bars = Progress()
    bars.add_task("backbones", total=4, completed=1, unit="backbones", note="student (consolidated)")
    bars.add_task("features of [bold]package:efficientnet_lite0", total=123_456, completed=23_456, unit="images")
    bars.add_task("train", total=10, completed=10, unit="images", note="loss 2.345, 12 % waiting for data, 12.5 MB")
    shown = Console(width=width, file=io.StringIO())
    with shown.capture() as captured:
        shown.print(ProgressLines(bars.tasks))
    lines = captured.get().splitlines()
    assert max(map(len, lines)) <= width
    assert len(lines) == (5 if width <= 80 else 3)
    assert any("12 % waiting for data" in line for line in lines)
    if width >= 120:
        assert "features of [bold]package:efficientnet_lite0" in captured.get()
        assert "loss 2.345, 12 % waiting for data, 12.5 MB" in captured.get()


def test_progress_tells_count_rate_and_time_left():
    clock = iter(range(0, 1000, 10))
    bars = Progress(get_time=lambda: next(clock))
    task = bars.add_task("pack", total=40, unit="images")
    for _ in range(3):
        bars.advance(task, 10)
    shown = Console(width=80, file=io.StringIO())
    with shown.capture() as captured:
        shown.print(ProgressLines(bars.tasks))
    assert re.search(r"pack ━+\S* +30/40 images  1/s  10 s left", captured.get()), captured.get()


def test_json_has_null_for_what_is_no_number(tmp_path):
    write_json(
        tmp_path / "x.json", {"kl": float("nan"), "all": (1.5, float("inf")), "n": np.float32(2), "at": tmp_path}
    )
    held = json.loads((tmp_path / "x.json").read_text(), parse_constant=pytest.fail)
    assert held == {"kl": None, "all": [1.5, None], "n": 2.0, "at": str(tmp_path)}


def test_a_run_that_must_be_alone_is_refused_while_another_is_at_work(tmp_path):
    code = "import sys, time; from repcon.runtime.run_dir import RunDir; "
    code += "run = RunDir(sys.argv[1], 'train', '', exclusive=True); "
    command = [sys.executable, "-c", code + "print('there', flush=True); time.sleep(60)", str(tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "there\n"
        with pytest.raises(UserError, match="another process is at work there"):
            RunDir(tmp_path / "run", "train", "", exclusive=True)
        other.kill()
    failed = RunDir(tmp_path / "run", "train", "", exclusive=True)
    RunDir(tmp_path / "run", "train", "", exclusive=True).finish(
        {}
    )  # in the same process, as in a notebook after an error
    failed.log("step", step=1)


def test_an_output_folder_is_no_url():
    with pytest.raises(UserError, match="s3://bucket/student: `repcon train` writes to a local folder"):
        RunDir("s3://bucket/student", "train", "")


def test_metrics_have_null_for_what_is_no_number(tmp_path):
    RunDir(tmp_path / "run", "teach", "").log("epoch", loss=float("nan"), shares=[0.5, float("inf")])
    line = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert '"loss": null, "shares": [0.5, null]' in line


@pytest.mark.parametrize("name", ["metrics.jsonl", ".lock"])
@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_what_a_stranger_put_in_a_file_s_place_is_not_written_through(name: str, kind: str, tmp_path: Path) -> None:
    """A run's folder that somebody else made: a link to a file of the user's, a pipe that nobody reads."""
    precious, out = tmp_path / "precious", tmp_path / "run"
    precious.write_text("mine")
    RunDir(out, "train", "").finish({})
    (out / name).unlink(missing_ok=True)
    if kind == "link":
        (out / name).symlink_to(precious)
    else:
        os.mkfifo(out / name)
    with pytest.raises(OSError, match="a link, a pipe or a socket, not a plain file"):
        RunDir(out, "train", "", exclusive=True)
    assert precious.read_text() == "mine"


def test_a_link_in_the_place_of_a_file_or_its_temporary_one_is_not_followed(tmp_path: Path, monkeypatch) -> None:
    precious, path = tmp_path / "precious", tmp_path / "results.json"
    precious.write_text("mine")
    path.symlink_to(precious)
    write_text(path, "ours")
    assert (path.read_text(), path.is_symlink(), precious.read_text()) == ("ours", False, "mine")
    monkeypatch.setattr("repcon.runtime.atomic_files.uuid.uuid4", lambda: uuid.UUID(int=1))
    (tmp_path / f".results.json.{1:032x}.repcon.tmp").symlink_to(precious)
    with pytest.raises(FileExistsError):
        write_text(path, "again")
    assert precious.read_text() == "mine"
