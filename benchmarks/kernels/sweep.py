"""Which tile, warps and register limit suit a GPU: what `repcon_kernels.kl_div.tiling` then holds as constants."""

import itertools
from collections.abc import Mapping

import torch
from repcon_kernels.kl_div import tiling

from benchmarks.kernels import contenders, timing

BATCH = 4096
TILES = (1024, 2048, 4096, 8192)
WARPS = (2, 4, 8, 16)
REGISTERS = (48, 64, 96, 128)


def run(heads: Mapping[str, tuple[int, ...]]) -> None:
    """Prints the ten fastest for each set of heads, and where today's constants stand."""
    if not torch.cuda.is_available():
        raise SystemExit("--sweep needs a GPU")
    for name, classes in heads.items():
        task = contenders.problem(BATCH, classes, "cuda")
        logits = (3 * torch.randn(BATCH, task.columns, device="cuda")).bfloat16().requires_grad_()
        step = contenders.operator(task, "triton")
        floor = (2 * logits.nbytes + task.label_bytes()) / timing.copy_bandwidth("cuda", 2**28)
        results = [(timing.on_gpu(step, logits).seconds, "as it is")]
        kept = tiling.TILES, tiling.REGISTERS
        for tile, warps, registers in itertools.product(TILES, WARPS, REGISTERS):
            if not 4 <= tile / (32 * warps) <= 32 or warps * 32 * registers > 65536:
                continue
            tiling.TILES, tiling.REGISTERS = ((65536, tile, warps),), registers
            tiling.plan.cache_clear()
            seconds = timing.on_gpu(step, logits).seconds
            results.append((seconds, f"tile {tile}, {warps} warps, {registers} registers"))
        tiling.TILES, tiling.REGISTERS = kept
        tiling.plan.cache_clear()
        print(f"B {BATCH}, heads {name}, bf16")
        for place, (seconds, what) in enumerate(sorted(results)):
            if place < 10 or what == "as it is":
                print(f"  {seconds * 1e6:9.1f} us   floor/time {floor / seconds:.2f}   {what}")
