"""The kernels go through Triton's compiler to machine code for a GPU that need not be there: its interpreter accepts
more than its compiler does, and does not show what the compiler makes of it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import repcon_kernels

WORKER = Path(__file__).with_name("compile_worker.py")


def test_for_a_gpu_of_compute_capability_9(tmp_path: Path) -> None:
    """Every way through the kernels compiles; registers keep to the limit with few of them spilled; and nothing as wide
    as a tile is carried from one thread to another, which would take some hundred stores to shared memory."""
    pytest.importorskip("triton.backends.nvidia.compiler")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    folders = Path(repcon_kernels.__file__).parents[1], Path(__file__).parents[2]
    environment["PYTHONPATH"] = os.pathsep.join(map(str, folders))
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run([sys.executable, str(WORKER)], env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    variants = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(variants) == 17
    for variant in variants:
        assert variant["bytes"] > 0, variant
        most = 128 if variant["name"] == "held" else 64
        assert variant["registers"] <= most and variant["spilled_bytes"] <= 192, variant
        assert variant["wide_shared_stores"] <= 16, variant
