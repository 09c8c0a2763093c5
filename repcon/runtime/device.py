"""Which device a command computes on, and in which numbers."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

from repcon.runtime.errors import UserError

# Read by CUDA when it starts. A GPU's streams share 8 queues unless told otherwise, and there DALI's decoding waited
# behind all the launches of a training step.
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""What a recipe calls a precision."""


def indexed(device: torch.device | str) -> torch.device:
    """The device as its tensors name it: "cuda" is the current GPU, and not equal to its "cuda:0"."""
    place = torch.device(device)
    return torch.device("cuda", torch.cuda.current_device()) if str(place) == "cuda" else place


def choose(device: Literal["auto", "cpu", "cuda"]) -> torch.device:
    """The device that a recipe's `device` means here: `auto` is CUDA where there is any.

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
        except Exception:  # torch's kind of it differs from version to version
            found = ""
    if not found:
        raise UserError("compile: no C++ compiler here; install one (apt install g++), or set compile = false")


def out_of_memory(error: RuntimeError) -> bool:
    """Whether it is one of the ways in which torch, CUDA, cuBLAS and cuDNN say that memory is spent."""
    said = str(error)
    known = ("can't allocate memory", "out of memory", "_STATUS_ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError) or any(words in said for words in known)


@contextmanager
def stream_context(stream: torch.cuda.Stream | None) -> Iterator[None]:
    """On the stream, in a thread that is to stay on its GPU. Without one, torch.cuda is not asked: on Macs it fails."""
    if stream is None:
        yield
        return
    # A new thread stands on the first GPU, and would take memory there on leaving the stream.
    torch.cuda.set_device(stream.device)
    with torch.cuda.stream(stream):
        yield
