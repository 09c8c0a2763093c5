"""torchvision beside a torch that it was not built for."""

import subprocess
import sys
from pathlib import Path

import pytest

FAKE_TORCH = """
from types import SimpleNamespace

ops = SimpleNamespace(torchvision=SimpleNamespace())
defined = []


def load_library(path):
    if open(path).read() != "nms":
        raise OSError(path)
    ops.torchvision.nms = None


class Library:
    def __init__(self, name, kind):
        self.space = getattr(ops, name)

    def define(self, schema):
        setattr(self.space, schema.split("(")[0], None)
        defined.append(schema)


ops.load_library = load_library
library = SimpleNamespace(Library=Library)
"""
"""A torch with as much of its registry of operators as completing torchvision takes."""

FAKE_TORCHVISION = """
import os, torch

try:
    torch.ops.load_library(os.path.join(os.path.dirname(__file__), "_C.so"))
except OSError:
    pass
torch.ops.torchvision.nms
"""


def test_timm_imports_where_torchvision_s_operators_are_missing():
    """A fresh process: the package's import order must not matter, and nothing is defined twice. `-S` leaves out what
    `make` adds to its environment."""
    code = (
        f"import sys; sys.path[:0] = {sys.path!r}; "
        "import repcon.models.timm_import, torchvision, torch; print(hasattr(torch.ops.torchvision, 'nms'))"
    )
    done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"


def test_a_script_may_import_timm_alone(tmp_path: Path) -> None:
    """In the environment that `make` sets up, without repcon imported first."""
    code = "import timm; timm.create_model('resnet18'); import torchvision, torch; torch.ops.torchvision.nms"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


@pytest.mark.parametrize("loads", [True, False])
def test_only_a_torchvision_that_does_not_load_is_completed(tmp_path: Path, loads: bool) -> None:
    """tools/complete-torchvision, on a torchvision and a torch of its own."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    [packages] = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    for name, code in (("torch", FAKE_TORCH), ("torchvision", FAKE_TORCHVISION)):
        (packages / name).mkdir()
        (packages / name / "__init__.py").write_text(code)
    (packages / "torchvision" / "_C.so").write_text("nms" if loads else "built for another torch")
    tool = Path(__file__).parents[2] / "tools" / "complete-torchvision"
    for _ in range(2):  # given again, it leaves the same
        subprocess.run([tool, python], check=True)
        left = sorted(file.name for file in packages.glob("torchvision_operators.*"))
        assert left == ([] if loads else ["torchvision_operators.pth", "torchvision_operators.py"])
    code = "import sys; print('torch' in sys.modules); import torchvision, torch; print(len(torch.defined))"
    shown = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.split() == ["False", "0" if loads else "2"]
