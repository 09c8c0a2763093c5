"""Where the Triton kernels run in these tests: on the GPU where there is one, else in Triton's interpreter on the CPU.

The interpreter has to be asked for before Triton's own library is imported. In a whole run pytest reads this file
before any test module; the variable is taken back at once, so that nothing else of the run sees it.
"""

import os
import sys

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

if DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
    if "triton" in sys.modules:
        raise pytest.UsageError("tests/kernels must be collected before what imports Triton: name it first, or alone")
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        import repcon_kernels.launch  # noqa: F401
        import triton.experimental.gluon  # noqa: F401  # else imported by a first launch, too late
    finally:
        del os.environ["TRITON_INTERPRET"]


@pytest.fixture(scope="session")
def device() -> str:
    """The device of tensors that Triton is to work on."""
    return DEVICE
