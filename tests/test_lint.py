"""The house keeps its order: layers, lint and format, as `make lint` asks; types are left to it."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("command", ["lint-imports", "ruff check .", "ruff format --check ."])
def test_the_house_is_in_order(command: str) -> None:
    program, *words = command.split()
    path = Path(sys.executable).with_name(program)
    if not path.is_file():
        pytest.skip(f'{program} is not installed: pip install "repcon[lint]"')
    done = subprocess.run([path, *words], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
