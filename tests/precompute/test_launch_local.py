"""Several processes on one machine: same bytes, one display, and none is missed when it dies."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
from precompute_case import contents, pack_path, recipe, teacher_folders
from worker_jobs import (
    count,
    die,
    die_in_a_report_once,
    die_once,
    finish_when_asked,
    refuse,
    two_threads,
    wait_for_ever,
)

from repcon.commands import precompute
from repcon.config import TeacherConfig
from repcon.precompute import launch_local
from repcon.precompute.output_store import lease_folder
from repcon.runtime.errors import UserError
from repcon.runtime.system import cores

FIXTURES = Path(__file__).parents[1] / "fixtures"
__all__ = ["pack_path", "recipe", "teacher_folders"]
POST = launch_local.WorkerSlot(gpu=None, threads=1)


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    """Worker processes find this folder's modules."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(FIXTURES), os.environ.get("PYTHONPATH", "")]))


def test_reports_of_all_arrive():
    seen = []
    launch_local.run(count, (3,), [POST, POST], seen.append)
    assert sorted(number for _, _, number in seen) == [0, 0, 1, 1, 2, 2]
    assert len({pid for pid, _, _ in seen}) == 2 and {threads for _, threads, _ in seen} == {1}


def test_large_reports_of_two_threads_do_not_mix():
    seen = []
    launch_local.run(two_threads, (200, 100_000), [POST], seen.append)
    assert seen == [bytes(100_000)] * 400


def test_what_ends_after_it_was_asked_to_can_still_report(tmp_path):
    def stop(report):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        launch_local.run(finish_when_asked, (str(tmp_path),), [POST, POST], stop)
    assert (tmp_path / "kept").exists()


def test_a_user_error_ends_all_and_is_told():
    with pytest.raises(UserError, match="field x: wrong; correct it"):
        launch_local.run(refuse, (), [POST, POST], print)


@pytest.mark.parametrize("job", [die_once, die_in_a_report_once])
def test_one_that_dies_is_replaced(job, tmp_path, capsys):
    seen = []
    launch_local.run(job, (str(tmp_path),), [POST], seen.append)
    assert seen == ["alive"] and "killed by signal 9" in capsys.readouterr().out


def test_worker_processes_that_keep_dying_end_the_run(monkeypatch):
    monkeypatch.setattr(launch_local, "REPLACEMENTS", 1)
    with pytest.raises(UserError, match="too many died, the last ended with code 3"):
        launch_local.run(die, (), [POST], print)


def test_ctrl_c_asks_each_of_them_to_end(tmp_path):
    def stop(report):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        launch_local.run(wait_for_ever, (str(tmp_path),), [POST], stop)
    assert (tmp_path / "asked").exists()


def test_posts_share_the_cores_and_the_gpus(monkeypatch):
    assert [(slot.device, slot.threads) for slot in launch_local.worker_slots(2, 0)] == [
        ("cpu", max(1, cores() // 2))
    ] * 2
    assert set(POST.environment()) == {"OMP_NUM_THREADS"}
    for seen, given in (("", ["0", "1", "0"]), ("3,GPU-5", ["3", "GPU-5", "3"])):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", seen)
        slots = launch_local.worker_slots(3, 2)
        assert [slot.environment()["CUDA_VISIBLE_DEVICES"] for slot in slots] == given
        assert {slot.device for slot in slots} == {"cuda"}


def test_two_processes_write_the_bytes_of_one(recipe):
    precompute.run(recipe)
    two = replace(recipe, out=recipe.out + "-two", processes=2)
    figures = precompute.run(two)
    assert contents(two.out) == contents(recipe.out)
    assert figures["crops"] == 8 * 32 and figures["units"] == 4
    assert not Path(lease_folder(two.out)).exists()


def test_a_killed_process_costs_no_label(recipe):
    """A teacher that kills its process at the first batch, the first time."""
    once = Path(recipe.out).parent / "killed"
    deadly = replace(recipe, teachers=(TeacherConfig(name="own", model="deadly:make"),), processes=2)
    (once.parent / "deadly.py").write_text(
        "import os, pathlib, precompute_case\n"
        "class Deadly(precompute_case.Colours):\n"
        "    def forward(self, images):\n"
        f"        mark = pathlib.Path({str(once)!r})\n"
        f"        if len(images) > 1 and os.getpid() != {os.getpid()} and not mark.exists():\n"
        "            mark.touch()\n"
        "            os.kill(os.getpid(), 9)\n"
        "        return super().forward(images)\n"
        "def make():\n"
        "    return Deadly(), precompute_case.PLAIN\n"
    )
    path = os.pathsep.join([str(once.parent), os.environ["PYTHONPATH"]])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", path)
        patch.syspath_prepend(str(once.parent))
        precompute.run(deadly)
        plain = replace(deadly, out=recipe.out + "-plain", processes=1)
        precompute.run(plain)
    assert once.exists()
    assert contents(deadly.out) == contents(plain.out)
