"""Output folders after a power cut, in odd encodings, on full disks; progress where nothing moves."""

import errno
import io
import json
import os
import sys
from pathlib import Path

import pytest

from repcon import cli
from repcon.distill.checkpoint import CheckpointManager
from repcon.distill.metrics import trim_metrics
from repcon.runtime import console, run_dir
from repcon.runtime.console import Terminal
from repcon.runtime.errors import UserError
from repcon.runtime.untrusted import read_text


def test_results_are_on_disk_before_their_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: (done.append("sync"), sync(descriptor))[1])
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append("rename"), replace(a, b))[1])
    run_dir.write_json(tmp_path / "results.json", {"a": 1})
    assert done[:2] == ["sync", "rename"]
    assert done[2:] == ["sync"]  # the folder


@pytest.mark.parametrize("held", [b"", b"\0\0\0", b"[1]", b'{"a":', b"\xff", b'{"a":' * 100_000])
def test_results_that_did_not_outlive_a_power_cut_are_none(held: bytes, tmp_path: Path) -> None:
    (tmp_path / "results.json").write_bytes(held)
    assert run_dir.read_results(tmp_path) == {}


@pytest.mark.parametrize("held", [b"", b"\xff\xfe", b"train\x1b[2J"])
def test_a_damaged_marker_is_another_command_s(held: bytes, tmp_path: Path) -> None:
    (tmp_path / "command").write_bytes(held)
    with pytest.raises(UserError, match="name an empty or new folder"):
        run_dir.RunDir(tmp_path, "train", "")


def test_metrics_of_any_bytes_are_trimmed(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    whole = [b'{"step": 1}', b'{"event": "x"}', b'{"step": 2}']
    torn = [b"\xff", b"[1]", b"3", b'{"step": "x"}', b"[" * 100_000, b'{"step": ' + b"9" * 5000 + b"}", b'{"st']
    path.write_bytes(b"\n".join([*whole, *torn]))
    trim_metrics(path, step=1)
    assert path.read_bytes().splitlines() == whole[:2]


def test_a_checkpoint_of_something_else_is_named(tmp_path: Path) -> None:
    import torch

    for number, held in enumerate(({"a": 1}, [1], {"identity": 3})):
        torch.save(held, tmp_path / f"step-{number:09d}.pt")
        with pytest.raises(UserError, match=rf"step-{number:09d}\.pt: not a checkpoint"):
            CheckpointManager(tmp_path, {}, 2).load_latest()


def test_names_that_are_not_utf8_are_written_and_read_back(tmp_path: Path) -> None:
    run_dir.write_text(tmp_path / "config.toml", 'out = "caf\udce9"\n')
    assert (tmp_path / "config.toml").read_bytes() == b'out = "caf\xe9"\n'
    assert read_text(tmp_path / "config.toml") == 'out = "caf\udce9"\n'


def test_a_full_disk_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left.*results\.json"):
        run_dir.write_json(tmp_path / "results.json", {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_metrics_on_a_full_disk_name_the_file(tmp_path: Path) -> None:
    run = run_dir.RunDir(tmp_path / "run", "train", "")
    run._metrics = open("/dev/full", "w", buffering=1, encoding="utf-8")  # noqa: SIM115
    with pytest.raises(UserError, match="/dev/full: cannot write"):
        run.log("step", step=1)


def test_where_nothing_moves_a_line_comes_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    shown = Terminal(file=io.StringIO(), width=80)
    monkeypatch.setattr(console, "console", shown)
    bars = console.progress()
    monkeypatch.setattr(bars, "get_time", lambda: now[0])
    bars._last_line = 0.0
    task = bars.add_task("pack\x1b[2J", total=1000, unit="images", note="a [note]")
    with bars:
        for _ in range(200):
            now[0] += 1
            bars.advance(task)
    lines = [line for line in shown.file.getvalue().splitlines() if "images" in line]  # type: ignore[attr-defined]
    assert 4 <= len(lines) <= 10
    assert lines[0].startswith(r"pack\x1b[2J  5/1,000 images")
    assert "a [note]" in lines[0]


def run_cli(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> tuple[int, str]:
    told = io.StringIO()
    monkeypatch.setattr(cli, "errors", Terminal(stderr=True, file=told, width=200))

    def fails(*_: object) -> None:
        raise error

    monkeypatch.setattr(cli, "_command", fails)
    return cli.main(["inspect", "x"]), told.getvalue()


class OutOfMemoryError(RuntimeError):
    pass


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (MemoryError(), "out of memory"), (OutOfMemoryError("CUDA out of memory. Tried"), "out of memory (CUDA"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), "out of memory"),
        (RuntimeError("can't start new thread"), "make num_workers smaller"),
        (UserError("first\n[red]error second\x1b[2J"), r"error first [red]error second\x1b[2J"),
        (OSError(errno.ENOSPC, "No space left on device", "a/b"), "a/b: No space left on device"),
    ],
)  # fmt: skip
def test_what_a_user_can_mend_is_one_line(error: BaseException, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "")
    rc, text = run_cli(monkeypatch, error)
    assert rc == 1
    assert told in text
    assert text.count("\n") == 1


def test_a_fault_of_the_program_is_a_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ZeroDivisionError):
        run_cli(monkeypatch, ZeroDivisionError())


def test_a_lost_standard_output_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    told, shown = io.StringIO(), Terminal(file=io.StringIO())
    monkeypatch.setattr(cli, "errors", Terminal(file=told, width=200))
    monkeypatch.setattr(cli, "console", shown)
    monkeypatch.setattr(cli, "_command", lambda *_: {})
    for code, command, rc in (
        (errno.ENOSPC, "inspect", 1),
        (errno.ENOSPC, "precompute", 0),
        (errno.EPIPE, "inspect", 0),
    ):
        shown.lost = OSError(code, os.strerror(code))
        assert cli.main([command]) == rc
    assert told.getvalue().count("it is not whole") == 2


def test_json_of_odd_names_goes_to_any_encoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "_command", lambda *_: {"out": "caf\udce9 猫"})
    assert cli.main(["inspect", "--json", str(tmp_path / "f.json")]) == 0
    assert json.loads((tmp_path / "f.json").read_bytes()) == {"out": "caf\udce9 猫"}
    assert sys.stdout is not None
