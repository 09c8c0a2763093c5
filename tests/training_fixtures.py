"""Fixtures of the tests of training, a plugin to the modules that name it."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from training_case import make_case


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Models this small lose by threads, and on a busy machine every parallel region waits for its slowest one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def case(tmp_path_factory: pytest.TempPathFactory, picture_folder: Path) -> Path:
    return make_case(tmp_path_factory.mktemp("case"), picture_folder)
