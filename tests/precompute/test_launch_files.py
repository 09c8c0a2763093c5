"""The launch files in tools/: what they run, with which words, and what they do when the cluster ends them."""

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from precompute_case import contents, pack_path, recipe, teacher_folders

from repcon import config
from repcon.commands import precompute
from repcon.labels.store import LabelStore

__all__ = ["pack_path", "recipe", "teacher_folders"]
TOOLS = Path(__file__).parents[2] / "tools"
SLURM, SKY = TOOLS / "slurm-precompute", TOOLS / "skypilot-precompute.yaml"

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")


def script(path: Path, text: str) -> Path:
    path.write_text("#!/usr/bin/env bash\n" + text)
    path.chmod(0o755)
    return path


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder whose `bin` is searched first; `scontrol` there writes down what it was asked."""
    (tmp_path / "bin").mkdir()
    script(tmp_path / "bin" / "scontrol", f'echo "$@" >>{tmp_path}/asked\n')
    monkeypatch.setenv("PATH", os.pathsep.join([str(tmp_path / "bin"), os.environ["PATH"]]))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_slurm_reads_its_directives_and_the_task_passes_on_its_words(folder, monkeypatch):
    directives = [line.split()[1] for line in SLURM.read_text().splitlines() if line.startswith("#SBATCH ")]
    assert all(directive.startswith("--") for directive in directives) and "--requeue" in directives
    assert subprocess.run(["bash", "-n", SLURM], check=False).returncode == 0
    script(folder / "bin" / "repcon", 'echo "$@"\n')
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    done = subprocess.run([SLURM, "my recipe.toml", "--k", "8"], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert done.stdout.split("\n")[0] == "precompute --recipe my recipe.toml --records precompute-records/task-3 --k 8"
    assert subprocess.run([SLURM], capture_output=True, check=False).returncode == 1


@pytest.mark.parametrize("code, requeued", [(130, True), (0, False), (1, False)])
def test_slurm_s_warning_reaches_repcon_and_unfinished_work_is_queued_again(folder, monkeypatch, code, requeued):
    script(folder / "bin" / "repcon", f"trap 'sleep 0.3; exit {code}' TERM\ntouch started\nsleep 30 & wait $!\n")
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    with subprocess.Popen([SLURM, "recipe.toml"]) as task:
        limit = time.monotonic() + 60
        while not (folder / "started").exists() and time.monotonic() < limit:
            time.sleep(0.02)
        task.send_signal(signal.SIGTERM)
        assert task.wait(60) == code
    assert (folder / "asked").exists() == requeued
    if requeued:
        assert (folder / "asked").read_text() == "requeue 77\n"


def test_two_tasks_of_an_array_label_one_store(folder, recipe):
    """Started at the same moment, as Slurm does."""
    script(folder / "bin" / "repcon", f'exec {sys.executable} -m repcon.cli "$@"\n')
    (folder / "recipe.toml").write_text(config.dump(recipe))
    tasks = [
        subprocess.Popen([SLURM, "recipe.toml"], env={**os.environ, "SLURM_ARRAY_TASK_ID": str(number)})
        for number in range(2)
    ]
    assert [task.wait(200) for task in tasks] == [0, 0]
    assert sorted(path.name for path in (folder / "precompute-records").iterdir()) == ["task-0", "task-1"]
    assert LabelStore.open(recipe.out).completion.unfinished() == []
    plain = replace(recipe, out=recipe.out + "-plain")
    precompute.run(plain)
    assert contents(recipe.out) == contents(plain.out)


def test_skypilot_s_task_is_whole_and_its_command_is_ours(folder):
    task = yaml.safe_load(SKY.read_text())
    assert set(task) == {"name", "num_nodes", "resources", "workdir", "envs", "setup", "run"}
    home = folder / "home"
    (home / "repcon-env" / "bin").mkdir(parents=True)
    script(home / "repcon-env" / "bin" / "repcon", 'echo "$@"\n')
    facts = {**os.environ, **task["envs"], "HOME": str(home), "SKYPILOT_NODE_RANK": "1"}
    done = subprocess.run(["bash", "-c", task["run"]], env=facts, capture_output=True, text=True, check=False)
    assert done.stdout == "precompute --recipe recipe.toml --records precompute-records/node-1\n"
    extras = task["setup"].split("'.[")[1].split("]")[0].split(",")
    project = (TOOLS.parent / "pyproject.toml").read_text()
    assert all(f"\n{extra} = [" in project for extra in extras)
