"""The loss kernel's machine code for a GPU of compute capability 9.0 (`sm_90`) that need not be there."""

import re
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import triton
from repcon_kernels import HeadSpec
from repcon_kernels.kl_div import triton_kernel
from repcon_kernels.kl_div.tiling import Plan, plan
from triton.backends.compiler import GPUTarget

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


class _Absent:
    """As much of a driver as the compiler asks for."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def pretend() -> None:
    """Make Triton compile for such a GPU from now on."""
    triton.runtime.driver.set_active(_Absent())  # pyright: ignore[reportArgumentType]


def loss(
    shapes: Sequence[tuple[int, int]],
    dtype: torch.dtype,
    tail: int,
    *,
    gradient: bool = True,
    in_place: bool = False,
    gathered: bool = True,
    ids: torch.dtype = torch.uint16,
    logp: torch.dtype = torch.float16,
    unaligned: int = 0,
    wide_rows: str = "streamed",
    vector: int = 1,
) -> Any:
    """The compiled loss of heads of (classes, k). tail: its place in TAILS.

    unaligned: elements by which the logits' memory begins too late for wide loads. wide_rows, vector: as in `plan`.
    """
    layout = layout_of(shapes, wide_rows, vector)
    heads = heads_of(shapes)
    column = heads[-1].stop
    logits = torch.zeros(2 * column + unaligned, dtype=dtype)[unaligned:].view(2, column)
    floats, numbers = torch.zeros(64), torch.zeros(64, dtype=torch.int32)
    rows = torch.zeros(2, dtype=torch.int64) if gathered else floats
    return triton_kernel.multi_head_kl.run(  # pyright: ignore[reportAttributeAccessIssue]
        logits, logits, floats, floats, numbers, rows, floats,
        tuple(torch.zeros(2, head.k, dtype=ids) for head in heads),
        tuple(torch.zeros(2, head.k + 1, dtype=logp) for head in heads),
        tuple(1.5 for _ in heads), 2, 2, 0.5, 0.5,
        HEADS=layout.heads, GROUPS=layout.groups, COLUMNS=column, HAS_ROWS=gathered, TAIL=tail, GRADIENT=gradient,
        IN_PLACE=in_place, PERSISTENT=layout.programs_per_processor > 0, PREFETCH=layout.prefetch,
        num_warps=layout.warps, maxnreg=layout.registers, grid=(1,), warmup=True,
    )  # fmt: skip


def layout_of(shapes: Sequence[tuple[int, int]], wide_rows: str, vector: int) -> Plan:
    """The kernel's compile-time arguments, as `loss` takes them."""
    heads = heads_of(shapes)
    return plan(heads, heads[-1].stop, tuple(head.k + 1 for head in heads), (0,) * len(heads), wide_rows, vector)


def heads_of(shapes: Sequence[tuple[int, int]]) -> tuple[HeadSpec, ...]:
    """One head after the other."""
    heads, column = [], 0
    for classes, k in shapes:
        heads.append(HeadSpec(start=column, classes=classes, k=k))
        column += classes
    return tuple(heads)


def registers(kernel: Any) -> tuple[int, int]:
    """(registers per thread, bytes of spilled ones) of a compiled kernel."""
    found = re.search(r"REG:(\d+) STACK:(\d+)", _dumped(kernel, "-res-usage"))
    assert found is not None
    return int(found[1]), int(found[2])


def instructions(kernel: Any) -> list[tuple[int, str]]:
    """(address, text) of a compiled kernel's machine code."""
    lines = re.findall(r"^\s*/\*([0-9a-f]{4,5})\*/\s+(.*?)\s*;", _dumped(kernel, "-sass"), re.MULTILINE)
    return [(int(address, 16), text) for address, text in lines]


def _dumped(kernel: Any, option: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        return subprocess.run([CUOBJDUMP, option, file.name], capture_output=True, text=True, check=True).stdout
