"""What importing the package needs, and what its parts may know of one another."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import repcon_kernels

PACKAGE = Path(repcon_kernels.__file__).parent

COLD = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("triton", "repcon"):
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Blocked())
import torch
from repcon_kernels import HeadSpec, multi_head_kl
logits = torch.zeros(2, 4, requires_grad=True)
arguments = [HeadSpec(start=0, classes=4, k=1)], [torch.tensor([[2], [0]])], [torch.tensor([[-1.0, -0.5]] * 2)]
multi_head_kl(logits, *arguments, weights=torch.ones(1)).sum().backward()
assert logits.grad is not None
try:
    multi_head_kl(logits, *arguments, weights=torch.ones(1), implementation="triton")
except ValueError as error:
    assert "needs the package triton" in str(error), error
else:
    raise SystemExit("triton ran without triton")
"""

WITHOUT_GPU = """
import torch
from repcon_kernels import HeadSpec, multi_head_kl
if torch.cuda.is_available():
    raise SystemExit(0)
try:
    multi_head_kl(torch.zeros(1, 4), [HeadSpec(start=0, classes=4, k=1)], [torch.tensor([[2]])],
                  [torch.tensor([[-1.0, -0.5]])], weights=torch.ones(1), implementation="triton")
except ValueError as error:
    assert "needs a GPU" in str(error), error
else:
    raise SystemExit("triton ran without a GPU")
"""


def run(script: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(PACKAGE.parent)
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr


def test_neither_triton_nor_repcon_is_needed() -> None:
    run(COLD)


def test_triton_without_a_gpu_is_refused() -> None:
    run(WITHOUT_GPU)


def test_fast_code_does_not_import_the_specification() -> None:
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text())
        imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                imported |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
        assert not any(name.split(".")[0] == "repcon" for name in imported), path
        if path.name not in ("functional.py", "reference.py"):
            assert not any("reference" in name for name in imported), path
