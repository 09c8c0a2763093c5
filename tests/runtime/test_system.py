import os
import subprocess
import sys

from repcon.runtime import system as module
from repcon.runtime.system import environment


def test_it_names_what_a_figure_depends_on():
    facts = environment()
    assert {"versions", "processor", "cores", "device", "command", "started"} <= facts.keys()
    assert {"python", "torch", "timm", "numpy", "zarr"} <= facts["versions"].keys()


def test_processes_of_torchrun_share_the_cores(monkeypatch):
    monkeypatch.setattr(module, "cores", lambda: 8)
    for beside, own in (("", 8), ("1", 8), ("3", 2), ("16", 1)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", beside)
        assert module.own_cores() == own
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert module.own_cores() == 8


def test_a_container_s_limit_counts_as_its_cores(tmp_path, monkeypatch):
    assert module._container_limit(tmp_path) == sys.maxsize
    (tmp_path / "cpu").mkdir()
    for quota, limit in (("-1", sys.maxsize), ("250000", 2.5)):  # cgroups 1
        (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text(f"{quota}\n")
        (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
        assert module._container_limit(tmp_path) == limit
    (tmp_path / "cpu.max").write_text("max 100000\n")
    (tmp_path / "cpu" / "cpu.cfs_quota_us").unlink()
    assert module._container_limit(tmp_path) == sys.maxsize
    (tmp_path / "cpu.max").write_text("400000 100000\n")
    assert module._container_limit(tmp_path) == 4
    monkeypatch.setattr(module.os, "sched_getaffinity", lambda process: set(range(64)))
    for limit, cores in ((sys.maxsize, 64), (100, 64), (4.0, 4), (2.5, 2), (0.1, 1)):
        monkeypatch.setattr(module, "_container_limit", lambda root, limit=limit: limit)
        assert module.cores() == cores


def test_idle_threads_sleep_unless_the_user_says_otherwise(monkeypatch):
    for variable, value, spins in (
        ("OMP_WAIT_POLICY", "active", None),
        ("GOMP_SPINCOUNT", "7", "7"),
        ("", "", "10000"),
    ):
        monkeypatch.setattr(module.os, "environ", {variable: value})
        module.sleep_when_idle()
        assert module.os.environ.get("GOMP_SPINCOUNT") == spins


def test_torch_is_imported_after_its_threads_are_told_to_sleep():
    probe = (
        "import os, sys, repcon.cli as cli\n"
        "cli.outcome.run_command = lambda *_: print(os.environ['GOMP_SPINCOUNT'], 'torch' in sys.modules) or {}\n"
        "cli.main(['inspect', 'labels.zarr'])"
    )
    environment = {
        name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    }
    shown = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True, env=environment)
    assert shown.stdout.split() == ["10000", "False"], shown.stderr


def test_the_commit_is_known_in_a_checkout_only(tmp_path, monkeypatch):
    package = tmp_path / "repcon" / "runtime" / "system.py"
    monkeypatch.setattr(module, "__file__", str(package))
    assert module.commit.__wrapped__() is None
    git = ("git", "-C", str(tmp_path), "-c", "user.name=nobody", "-c", "user.email=nobody@example.org")
    subprocess.run([*git, "init", "--quiet"], check=True)
    assert module.commit.__wrapped__() is None  # nothing committed yet
    package.parent.mkdir(parents=True)
    package.write_text("one\n")
    subprocess.run([*git, "add", "--all"], check=True)
    subprocess.run([*git, "commit", "--quiet", "--message", "one"], check=True)
    clean = module.commit.__wrapped__()
    assert clean is not None and len(clean) == 40
    package.write_text("two\n")
    assert module.commit.__wrapped__() == clean + "-dirty"


def test_a_power_limit_that_no_one_tells_is_left_out(monkeypatch):
    monkeypatch.setattr(module, "_run_command", lambda *command: "[N/A]")
    assert module._power_limit_watts("1234") is None
    monkeypatch.setattr(module, "_run_command", lambda *command: "700.00")
    assert module._power_limit_watts("1234") == 700.0
