"""The loss kernel's ways through wide heads (`repcon_kernels.kl_div.tiling.VARIANTS`), and what small heads pay for.

    PYTHONPATH=.:kernels python -m benchmarks.kernels.variants [--batch 4096]

Each variant is compiled in a process of its own, all at once, checked against the specification in float64, and timed:
device time of loss and gradient at 4,096 rows of 21,841 and 1,000 classes in bf16, `floor/time` as in kernels.py. The
last table takes the launch of three small heads apart: an empty kernel, as many programs that do nothing, and programs
that do only what ends each of them (a store, a barrier, a ticket; the last one adds up). Needs a GPU.
"""
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportIndexIssue=false

import argparse
import subprocess
import sys

import torch
import triton
import triton.language as tl
from repcon_kernels import multi_head_kl
from repcon_kernels.kl_div import launch, tiling
from torch import Tensor

from benchmarks.kernels import contenders, timing
from benchmarks.kernels.contenders import Problem

CLASSES, SMALL = (21841, 1000), (1000, 196, 45)
CHECKED = 37
"""Rows of the check."""


def main() -> None:
    parser = argparse.ArgumentParser(description="Variants of the loss kernel for wide heads.")
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--warm", help="only compile this variant and check it")
    arguments = parser.parse_args()
    if arguments.warm:
        choose(arguments.warm)
        print(f"{arguments.warm}: off by {check():.2g} of the tolerance", flush=True)
        return
    names = ["streamed", *tiling.VARIANTS]
    warming = [
        subprocess.Popen([sys.executable, "-m", "benchmarks.kernels.variants", "--warm", name]) for name in names
    ]
    good = [name for name, process in zip(names, warming, strict=True) if process.wait() == 0]
    task = contenders.problem(arguments.batch, CLASSES, "cuda")
    logits = (3 * torch.randn(arguments.batch, task.columns, device="cuda")).bfloat16().requires_grad_()
    bandwidth = timing.copy_bandwidth("cuda", 2**30)
    floor = (2 * logits.nbytes + task.label_bytes()) / bandwidth
    print(f"copy {bandwidth / 1e12:.2f} TB/s, so that {2 * logits.nbytes / 1e6:.0f} MB take {1e6 * floor:.1f} us")
    for name in (*good, *good):  # twice, so that noise shows
        choose(name)
        seconds = timing.on_gpu(contenders.operator(task, "triton"), logits).seconds
        print(f"{name}: {1e6 * seconds:.1f} us, floor/time {floor / seconds:.3f}", flush=True)
    choose("streamed")
    small_heads(arguments.batch)


def choose(name: str) -> None:
    """From now on launches use this variant."""
    tiling.WIDE_ROWS = name
    tiling.plan.cache_clear()


def check() -> float:
    """The worst error over tails and both places of the gradient in units of the tolerance of kernels.py, which it must
    keep."""
    task = contenders.problem(CHECKED, CLASSES, "cuda", slab_rows=64)
    logits = (3 * torch.randn(CHECKED, task.columns, device="cuda")).bfloat16()
    worst = 0.0
    for tail in ("uniform", "bucket"):
        exact, exact_gradient = _step(task, logits.double(), tail, "reference")
        losses, gradient = _step(task, logits, tail, "triton")
        room = torch.finfo(torch.bfloat16).eps * exact_gradient.abs() + 2**-18 / CHECKED
        worst = max(
            worst,
            float(((losses - exact).abs() / (2**-18 * (1 + exact.abs()))).max()),
            float(((gradient - exact_gradient).abs() / room).max()),
        )
    if not worst <= 1:
        raise SystemExit(f"{tiling.WIDE_ROWS}: wrong by {worst:.3g} x the tolerance")
    return worst


def _step(task: Problem, logits: Tensor, tail: str, implementation: str) -> tuple[Tensor, Tensor]:
    leaf = logits.clone().requires_grad_()
    losses = multi_head_kl(
        leaf, task.heads, task.ids, task.logp, rows=task.rows, weights=task.weights, tail=tail,
        implementation=implementation,
    )  # fmt: skip
    return losses.detach().double(), torch.autograd.grad(losses.sum(), leaf)[0].double()


@triton.jit
def _nothing(address):
    pass


@triton.jit
def _only_end(partials, ticket, loss, BLOCK: tl.constexpr):
    program, programs = tl.program_id(0), tl.num_programs(0)
    tl.store(partials + program, 1.0)
    tl.debug_barrier()
    if tl.atomic_add(ticket, 1, sem="acq_rel") == programs - 1:
        total = tl.zeros([BLOCK], tl.float32)
        for start in range(0, programs, BLOCK):
            index = start + tl.arange(0, BLOCK)
            total += tl.load(partials + index, mask=index < programs, other=0.0, cache_modifier=".cg")
        tl.store(loss, tl.sum(total, axis=0))
        tl.store(ticket, 0)


def small_heads(batch: int) -> None:
    """Prints what a launch of three small heads consists of."""
    task = contenders.problem(batch, SMALL, "cuda")
    logits = (3 * torch.randn(batch, task.columns, device="cuda")).bfloat16().requires_grad_()
    step = contenders.operator(task, "triton")
    layout = tiling.plan(task.heads, task.columns, tuple(part.shape[1] for part in task.logp), (0,) * len(SMALL))
    programs, warps = layout.items(batch), layout.warps
    partials, ticket = torch.zeros(programs, device="cuda"), torch.zeros(1, dtype=torch.int32, device="cuda")
    loss = torch.zeros(1, device="cuda")
    rows = {
        "an empty kernel of one program": lambda _: _nothing[(1,)](loss),
        f"{programs} programs of {warps} warps that do nothing": lambda _: _nothing[(programs,)](loss, num_warps=warps),  # pyright: ignore[reportCallIssue]
        "the same, each with its end and the last one's sum": lambda _: _only_end[(programs,)](
            partials,
            ticket,
            loss,
            BLOCK=1024,
            num_warps=warps,  # pyright: ignore[reportCallIssue]
        ),
        "the launch itself": step,
    }
    print(f"B {batch}, heads {'-'.join(map(str, SMALL))}, bf16")
    for name, run in rows.items():
        print(f"  {name}: {1e6 * timing.on_gpu(run, logits).seconds:.2f} us", flush=True)


if __name__ == "__main__":
    if launch.interpreted() or not torch.cuda.is_available():
        raise SystemExit("benchmarks.kernels.variants needs a GPU")
    main()
