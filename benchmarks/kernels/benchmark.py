"""The multi-head KL against what it replaces: time of loss and gradient, and how near it comes to the memory's speed.

    python -m benchmarks.kernels [--long] [--sweep] [--json FILE] [--record]

Needs torch, triton and numpy, and no installation: PYTHONPATH=.:kernels will do. On a GPU the Triton kernel is built,
checked against the specification and timed; on a CPU the torch implementation takes its place.

floor_over_time    logits read once, gradient written once, labels read once, at the speed of a copy on the same device,
                   over our time
X_over_ours        time of X over our time; X is eager (log_softmax + kl_div on a scattered target), eager_sparse
                   (logsumexp + gather), compile and compile_sparse (torch.compile of both), liger
launches           kernels that our operator starts; launches_worth: its time over that of an empty kernel
linear_peak_over_plain   peak memory of linear_kl over that of layer and loss apart, both with backward
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from repcon_kernels import TAILS, linear_kl, multi_head_kl

from benchmarks.harness.records import cells, put, write_record
from benchmarks.harness.targets import targets
from benchmarks.kernels import contenders, timing
from benchmarks.kernels.contenders import Problem, Step
from benchmarks.kernels.timing import Timing
from repcon.runtime.system import environment

HEADS = {"1000-196-45": (1000, 196, 45), "1000-9x200": (1000, *[200] * 9), "21841-1000": (21841, 1000)}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def main() -> None:
    parser = argparse.ArgumentParser(description="The multi-head KL against what it replaces.")
    parser.add_argument("--long", action="store_true", help="every batch size and precision")
    parser.add_argument("--sweep", action="store_true", help="only try tile sizes, warps and registers (on a GPU)")
    parser.add_argument("--json", help="write the figures here")
    parser.add_argument("--record", action="store_true", help="add a folder to benchmarks/records")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if arguments.sweep:
        from benchmarks.kernels import sweep

        sweep.run(HEADS)
        return
    figures: dict[str, Any] = {"worst_error": check(device)}
    print(f"checked: off from the specification by at most {figures['worst_error']:.2g} of what float32 allows")
    rows = []
    for batch, heads, dtype, compiled in shapes(device, arguments.long):
        rows.append(measure(batch, heads, dtype, device, figures, compiled=compiled))
        print(rows[-1], flush=True)
    memory(device, figures)
    table = "\n".join([CAPTIONS[device], "", header(), *rows])
    print(table)
    facts: dict[str, Any] = {**environment(), "threads": torch.get_num_threads()}
    figures |= {"environment": facts, "targets": targets("kernels", facts["device"])}
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(figures, indent=2) + "\n")
    if arguments.record:
        print(f"recorded in {write_record('kernels', figures, table)}")


def shapes(device: str, long: bool) -> list[tuple[int, str, str, bool]]:
    """(batch, heads, dtype, whether torch.compile takes part)."""
    if device == "cuda":
        batches, dtypes = ((256, 512, 1024, 2048, 4096), tuple(DTYPES)) if long else ((256, 1024, 4096), ("bf16",))
        # Compiling takes most of the time: a minute for ten heads.
        return [
            (batch, heads, dtype, long or (batch == 4096 and heads != "1000-9x200"))
            for heads in HEADS
            for dtype in dtypes
            for batch in batches
        ]
    batches, dtypes = ((256, 1024), ("fp32", "bf16")) if long else ((256,), ("fp32",))
    return [
        (batch, heads, dtype, long or heads == "1000-196-45")
        for heads in HEADS
        for dtype in dtypes
        for batch in batches
    ]


def check(device: str) -> float:
    """The worst error over heads, precisions and tails, in units of the tolerance: rounding of the result's precision
    and 2^-18 of what is of order one. Ends the benchmark where it exceeds 1."""
    implementation = implementation_on(device)
    worst = 0.0
    for name, classes in HEADS.items():
        task = contenders.problem(9, classes, device, slab_rows=32)
        for dtype in DTYPES.values():
            logits = (3 * torch.randn(9, task.columns, device=device)).to(dtype)
            for tail in TAILS:
                results = []
                for chosen, inputs in ((implementation, logits), ("reference", logits.double())):
                    leaf = inputs.clone().requires_grad_()
                    losses = multi_head_kl(
                        leaf, task.heads, task.ids, task.logp,
                        rows=task.rows, weights=task.weights, tail=tail, implementation=chosen,
                    )  # fmt: skip
                    losses.sum().backward()
                    assert leaf.grad is not None
                    results.append((losses.detach().double(), leaf.grad.double()))
                (losses, gradient), (exact, exact_gradient) = results
                room = torch.finfo(dtype).eps * exact_gradient.abs() + 2**-18 / 9
                error = max(
                    float(((losses - exact).abs() / (2**-18 * (1 + exact.abs()))).max()),
                    float(((gradient - exact_gradient).abs() / room).max()),
                )
                if not error <= 1:
                    raise SystemExit(f"wrong result: heads {name}, {dtype}, tail {tail}: {error:.3g} x the tolerance")
                worst = max(worst, error)
    return worst


def implementation_on(device: str) -> str:
    return "triton" if device == "cuda" else "torch"


def measure(batch: int, name: str, dtype: str, device: str, figures: dict[str, Any], *, compiled: bool) -> str:
    """Times all contenders on one shape, adds their ratios to the figures, gives the table's row."""
    torch.compiler.reset()
    task = contenders.problem(batch, HEADS[name], device)
    logits = (3 * torch.randn(batch, task.columns, device=device)).to(DTYPES[dtype]).requires_grad_()
    steps = _steps(task, device, compiled)
    if device == "cuda":
        times = {label: timing.on_gpu(step, logits) for label, step in steps.items()}
    else:
        times = timing.on_cpu(steps, logits, 3.0)
    moved = 2 * logits.nbytes + task.label_bytes()
    floor = moved / timing.copy_bandwidth(device, max(logits.nbytes, 2**28 if device == "cuda" else 0))
    key = f"b{batch}_{name}_{dtype}"
    ours = np.array(times["ours"].samples)
    put(figures, f"{key}_ours_us", 1e6 * ours)
    put(figures, f"{key}_floor_over_time", floor / np.array(times["operator"].samples))
    for label, taken in times.items():
        if label not in ("ours", "operator"):
            put(figures, f"{key}_{label}_over_ours", np.array(taken.samples) / ours)
    if device == "cuda":
        figures[f"{key}_launches"] = timing.launches(steps["operator"], logits)
        figures[f"{key}_launches_worth"] = round(times["operator"].seconds / timing.launch_seconds(), 2)
    return _row(batch, name, dtype, logits.nbytes, times, figures, key)


def _steps(task: Problem, device: str, compiled: bool) -> dict[str, Step]:
    implementation = implementation_on(device)
    steps: dict[str, Step | None] = {
        "operator": contenders.operator(task, implementation),
        "ours": contenders.ours(task, implementation),
        "eager": contenders.dense(task),
        "eager_sparse": contenders.sparse(task),
        "compile": contenders.dense(task, compiled=True) if compiled else None,
        "compile_sparse": contenders.sparse(task, compiled=True) if compiled else None,
        "liger": contenders.liger(task) if device == "cuda" else None,
    }
    return {label: step for label, step in steps.items() if step is not None}


CAPTIONS = {
    "cuda": "The Triton kernel, device time of loss and gradient; floor, launches and worth are the operator's alone.",
    "cpu": "Processor time of one thread of the torch implementation: the Triton kernel needs a GPU and was not timed.",
}
COLUMNS = ("eager", "eager_sparse", "compile", "compile_sparse", "liger")


def header() -> str:
    measured = ["ours us", "20 to 80 %", "rounds", "floor/time"]
    titles = ["B", "heads", "type", "MB", *measured, *COLUMNS, "launches", "worth"]
    return f"| {' | '.join(titles)} |\n|{'---|' * len(titles)}"


def _row(
    batch: int, name: str, dtype: str, size: int, times: dict[str, Timing], figures: dict[str, Any], key: str
) -> str:
    line = [str(batch), name, dtype, f"{size / 1e6:.1f}", *cells(figures, f"{key}_ours_us")]
    line.append(f"{figures[f'{key}_floor_over_time']:.2f}")
    for column in COLUMNS:
        ratio = figures.get(f"{key}_{column}_over_ours")
        waits = column in times and times[column].how == "events"
        line.append("-" if ratio is None else f"{ratio:.2f}{' (with its waits)' if waits else ''}")
    line += [str(figures.get(f"{key}_launches", "-")), str(figures.get(f"{key}_launches_worth", "-"))]
    return f"| {' | '.join(line)} |"


def memory(device: str, figures: dict[str, Any]) -> None:
    """Peak memory of loss and gradients from 512 features through heads of 21,841 and 1,000 classes."""
    batch = 4096 if device == "cuda" else 1024
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    task = contenders.problem(batch, HEADS["21841-1000"], device)
    features = torch.randn(batch, 512, device=device, dtype=dtype, requires_grad=True)
    weight = torch.randn(task.columns, 512, device=device, dtype=dtype, requires_grad=True)
    labels = task.heads, task.ids, task.logp
    options: dict[str, Any] = {
        "rows": task.rows, "weights": task.weights, "implementation": implementation_on(device),
    }  # fmt: skip

    def fused() -> None:
        loss, _ = linear_kl(features, weight, None, *labels, **options)
        torch.autograd.grad(loss, (features, weight))

    def plain() -> None:
        losses = multi_head_kl(features @ weight.T, *labels, **options)
        torch.autograd.grad(losses.sum(), (features, weight))

    figures["linear_peak_mb"] = round(timing.peak_bytes(fused, device) / 1e6, 1)
    figures["plain_peak_mb"] = round(timing.peak_bytes(plain, device) / 1e6, 1)
    figures["linear_peak_over_plain"] = round(figures["linear_peak_mb"] / figures["plain_peak_mb"], 3)
    print(
        f"B {batch}, 512 features, heads 21841-1000, {dtype}: peak memory {figures['linear_peak_mb']} MB in chunks, "
        f"{figures['plain_peak_mb']} MB apart"
    )
