"""The kernels go through Triton's compiler to machine code for a GPU that need not be there: its interpreter accepts
more than its compiler does."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import repcon_kernels

SCRIPT = """
import sys, torch, triton
from triton.backends.compiler import GPUTarget
from repcon_kernels import HeadSpec, kernel, scale
from repcon_kernels.plan import REGISTERS, plan

class Absent:
    "As much of a driver as the compiler asks for."
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 0
    def get_current_target(self): return GPUTarget("cuda", 90, 32)

triton.runtime.driver.set_active(Absent())

def build(shapes, dtype, mode, gradient=True, in_place=False):
    heads, column = [], 0
    for classes, k in shapes:
        heads.append(HeadSpec(start=column, classes=classes, k=k))
        column += classes
    layout = plan(tuple(heads), column, tuple(head.k + 1 for head in heads))
    logits, floats, numbers = torch.zeros(2, column, dtype=dtype), torch.zeros(64), torch.zeros(64, dtype=torch.int32)
    built = kernel.multi_head_kl.run(
        logits, logits, floats, floats, numbers, torch.zeros(2, dtype=torch.int64), floats,
        tuple(torch.zeros(2, head.k, dtype=torch.uint16) for head in heads),
        tuple(torch.zeros(2, head.k + 1, dtype=torch.float16) for head in heads),
        tuple(1.5 for head in heads), 2, 2, 0.5, 0.5,
        HEADS=layout.heads, GROUPS=layout.groups, COLUMNS=column, HAS_ROWS=True, TAIL=mode, GRADIENT=gradient,
        IN_PLACE=in_place, num_warps=layout.warps, maxnreg=REGISTERS, grid=(1,), warmup=True)
    assert len(built.asm["cubin"]) > 0
    spans = tuple((head.start, head.classes) for head in heads)
    built = scale.scale_heads.run(logits, floats, 2, 1, 1.0, SPANS=spans, COLUMNS=column, BLOCK=1024,
                                  grid=(1,), warmup=True)
    assert len(built.asm["cubin"]) > 0

build(((1000, 16), (196, 16), (200, 16), (45, 45)), torch.bfloat16, 0)
build(((21841, 16), (1000, 7)), torch.float16, 2, in_place=True)
build(((9000, 4500),), torch.float32, 1)
build(((1000, 16),), torch.float32, 0, gradient=False)
"""


def test_for_a_gpu_of_compute_capability_9(tmp_path: Path) -> None:
    pytest.importorskip("triton.backends.nvidia.compiler")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(Path(repcon_kernels.__file__).parents[1])
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
