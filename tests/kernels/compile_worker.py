"""Compiles the kernels for a GPU of compute capability 9.0 that need not be there; started by test_kernels_compile.py.

Prints one JSON line per variant: its name, bytes of machine code, registers, bytes of spilled registers, and how many
wide stores to shared memory its code has.
"""

import json
from typing import Any

import torch
from repcon_kernels import crop_resize_kernel
from repcon_kernels.kl_div import triton_scale
from repcon_kernels.kl_div.launch import CROP_BLOCK

from benchmarks.kernels import compiled

DEMO, MANY = ((1000, 16), (196, 16), (45, 45)), ((1000, 16), *[(200, 16)] * 9)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
BUCKET, RENORMALISE, UNIFORM = range(3)


def build(name: str, shapes: tuple[tuple[int, int], ...], dtype: torch.dtype, tail: int, **options: Any) -> None:
    """One variant of the loss."""
    tell(name, compiled.loss(shapes, dtype, tail, **options))


def build_scale(name: str, dtype: torch.dtype, factor_stride: int) -> None:
    built = triton_scale.scale_heads.run(  # pyright: ignore[reportAttributeAccessIssue]
        torch.zeros(2, 1241, dtype=dtype), torch.zeros(64), 2, factor_stride, 1.0,
        SPANS=((0, 1000), (1000, 241)), COLUMNS=1241, BLOCK=1024, grid=(1,), warmup=True,
    )  # fmt: skip
    tell(name, built)


def build_crops(name: str, side: int) -> None:
    numbers = torch.zeros(64, dtype=torch.int32)
    built = crop_resize_kernel.cut_crops.run(  # pyright: ignore[reportAttributeAccessIssue]
        numbers.long(), numbers, numbers, torch.zeros(64, dtype=torch.uint8), 4, SIDE=side, BLOCK=CROP_BLOCK,
        grid=(1,), warmup=True,
    )  # fmt: skip
    tell(name, built)


def tell(name: str, built: Any) -> None:
    registers, stack = compiled.registers(built)
    facts = {
        "name": name,
        "bytes": len(built.asm["cubin"]),
        "registers": registers,
        "spilled_bytes": stack,
        "wide_shared_stores": built.asm["ptx"].count("st.shared.v4"),
    }
    print(json.dumps(facts), flush=True)


compiled.pretend()
build("heads of three shapes", DEMO, BF16, BUCKET)
build("ten heads, one shape, over the logits", MANY, BF16, BUCKET, in_place=True)
build("loss alone, rows in order", DEMO, FP32, BUCKET, gradient=False, gathered=False)
build("streamed", ((21841, 16), (1000, 7)), BF16, BUCKET)
build("held", ((21841, 16), (1000, 7)), BF16, UNIFORM, wide_rows="held_prefetch", vector=8)
build("streamed, over the logits", ((21841, 16), (1000, 7)), FP16, UNIFORM, in_place=True)
build("uniform", DEMO, BF16, UNIFORM)
build("renormalise", DEMO, FP16, RENORMALISE, in_place=True)
build("more labels than a tile holds", ((9000, 4500),), FP32, BUCKET)
build("the widest head", ((65536, 16),), BF16, BUCKET, ids=torch.uint32)
build("other labels", ((1000, 16),), FP32, UNIFORM, ids=torch.int64, logp=torch.float32)
build("logits at an odd address", ((1000, 16),), BF16, BUCKET, unaligned=1)
for dtype in (BF16, FP32):
    build_scale("scale, one factor a head", dtype, 1)
build_scale("scale, one factor for all", FP16, 0)
build_crops("crops of 224", 224)
build_crops("crops of 33", 33)
