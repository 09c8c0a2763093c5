import subprocess

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
