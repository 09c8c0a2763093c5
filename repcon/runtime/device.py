"""Devices, precisions and CUDA streams."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

from repcon.runtime.errors import UserError

# Read by CUDA when it starts. By default a GPU's streams share 8 queues, in which DALI's decoding waited behind the
# launches of a training step.
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Names of precisions in recipes."""


def indexed(device: torch.device | str) -> torch.device:
    """The device with its index, as tensors have it: "cuda" becomes the current GPU, for example "cuda:0"."""
    device = torch.device(device)
    return torch.device("cuda", torch.cuda.current_device()) if str(device) == "cuda" else device


def choose(device: Literal["auto", "cpu", "cuda"]) -> torch.device:
    """The device of a recipe's `device` setting: `auto` is CUDA where available.

    Raises UserError for `cuda` where torch sees none.
    """
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError("device cuda: torch sees no CUDA device here; use device = 'cpu' or 'auto'")
    return torch.device("cuda")


def require_compiler(device: torch.device | str) -> None:
    """Raises UserError where `torch.compile` has no compiler for the device: a C++ one for a CPU, a C one for CUDA."""
    if torch.device(device).type == "cuda":
        found = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang") or shutil.which("cc")
    else:
        from torch._inductor.cpp_builder import get_cpp_compiler

        try:
            found = get_cpp_compiler()
        except Exception:  # its type differs between versions of torch
            found = ""
    if not found:
        raise UserError("compile: no C++ compiler here; install one (apt install g++), or set compile = false")


def out_of_memory(error: BaseException) -> bool:
    """Whether the error is one of Python, torch, CUDA, cuBLAS or cuDNN for exhausted memory."""
    message = str(error)
    known = ("can't allocate memory", "out of memory", "_STATUS_ALLOC_FAILED")
    by_message = isinstance(error, RuntimeError) and any(words in message for words in known)
    return by_message or isinstance(error, MemoryError | torch.OutOfMemoryError)


@contextmanager
def stream_context(stream: torch.cuda.Stream | None) -> Iterator[None]:
    """Run the block on a CUDA stream and make its GPU the thread's current one. Does nothing for None."""
    if stream is None:
        yield
        return
    # A new thread's current device is the first GPU, where leaving the stream would allocate memory.
    torch.cuda.set_device(stream.device)
    with torch.cuda.stream(stream):
        yield
