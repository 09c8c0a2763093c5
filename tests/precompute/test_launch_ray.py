"""Units on a real local Ray cluster of two nodes, whose workers, nodes and driver are killed."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from precompute_case import contents, pack_path, recipe, teacher_folders

from repcon import config
from repcon.commands import precompute
from repcon.config import PrecomputeConfig, TeacherConfig
from repcon.labels.store import LabelStore
from repcon.precompute import launch_ray as cluster_driver
from repcon.precompute.output_store import lease_folder
from repcon.runtime.errors import UserError

pytest.importorskip("ray")
__all__ = ["pack_path", "recipe", "teacher_folders"]
ROOT = Path(__file__).parents[2]
NODE = {"num_cpus": 1, "object_store_memory": 80_000_000}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two nodes of one core each; they outlive their drivers."""
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        path = [str(ROOT / "tests" / "fixtures"), str(ROOT), os.environ.get("PYTHONPATH", "")]
        patch.setenv("PYTHONPATH", os.pathsep.join(path))
        patch.setenv("OMP_NUM_THREADS", "1")
        made = Cluster(initialize_head=True, head_node_args={**NODE, "include_dashboard": False})
        made.add_node(**NODE)
        yield made
        made.shutdown()


@pytest.fixture
def slow(recipe: PrecomputeConfig, cluster: Any) -> PrecomputeConfig:
    """Eight units of about a second each, on the cluster."""
    teacher = TeacherConfig(name="own", model="precompute_case:slow")
    return replace(recipe, teachers=(teacher,), ray=cluster.address, rows_per_shard=4, batch_size=8)


def wait_for(condition: Callable[[], Any], seconds: float = 120) -> Any:
    limit = time.monotonic() + seconds
    while time.monotonic() < limit:
        if found := condition():
            return found
        time.sleep(0.05)
    raise TimeoutError


def finished(out: str) -> int:
    return len(list(Path(out, "done").glob("*.json")))


def owners(out: str) -> set[int]:
    """The processes that have claims."""
    pids = set()
    for lease in Path(lease_folder(out)).glob("part-*"):
        with suppress(OSError, ValueError):
            pids.add(json.loads(lease.read_bytes())["pid"])
    return pids


def start(settings: PrecomputeConfig, folder: Path) -> subprocess.Popen:
    """The command line in a process of its own."""
    (folder / "recipe.toml").write_text(config.dump(settings))
    command = [sys.executable, "-m", "repcon.cli", "precompute", "--recipe", str(folder / "recipe.toml")]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_killed_workers_and_a_killed_driver_leave_the_bytes_of_an_undisturbed_run(slow, tmp_path):
    with start(slow, tmp_path) as driver:
        wait_for(lambda: finished(slow.out) >= 1)
        os.kill(min(wait_for(lambda: owners(slow.out))), signal.SIGKILL)
        wait_for(lambda: finished(slow.out) >= 3)
        driver.kill()
    left = LabelStore.open(slow.out).completion.unfinished()
    assert 1 <= len(left) <= 5
    with start(slow, tmp_path) as driver:
        said = driver.communicate(timeout=200)[0]
    assert driver.returncode == 0, said
    plain = replace(slow, ray="", out=slow.out + "-plain")
    precompute.run(plain)
    assert contents(slow.out) == contents(plain.out)


def test_a_lost_node_costs_time_only(slow, cluster):
    node = cluster.add_node(**NODE)
    from ray.cluster_utils import Cluster

    assert isinstance(cluster, Cluster)
    with start(slow, Path(slow.out).parent) as driver:
        wait_for(lambda: finished(slow.out) >= 1)
        cluster.remove_node(node, allow_graceful=False)
        said = driver.communicate(timeout=250)[0]
    assert driver.returncode == 0, said
    assert LabelStore.open(slow.out).completion.unfinished() == []


def test_a_worker_s_complaint_reaches_the_user(slow):
    broken = replace(slow, teachers=(TeacherConfig(name="own", model="precompute_case:nan"),))
    with pytest.raises(UserError, match="teacher own: its answer is not a number"):
        precompute.run(broken)


def test_workers_that_die_one_after_the_other_end_the_run(slow, monkeypatch):
    monkeypatch.setattr(cluster_driver, "REPLACEMENTS", 0)
    deadly = replace(slow, teachers=(TeacherConfig(name="own", model="precompute_case:deadly"),))
    with pytest.raises(UserError, match="ray: 1 workers died one after the other, the last: "):
        precompute.run(deadly)
    assert len(LabelStore.open(slow.out).completion.unfinished()) == 8


def test_no_cluster_is_one_clear_line(recipe):
    with pytest.raises(UserError, match=r"ray 127\.0\.0\.1:1: no cluster answers"):
        precompute.run(replace(recipe, ray="127.0.0.1:1"))
