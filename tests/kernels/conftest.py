"""The device of the kernels' tests; `tests/conftest.py` has Triton's interpreter started where there is no GPU."""

import pytest
from triton_interpreter import DEVICE


@pytest.fixture(scope="session")
def device() -> str:
    """The device of tensors that Triton is to work on."""
    return DEVICE
