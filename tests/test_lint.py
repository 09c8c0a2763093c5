"""The house keeps its order: layers, lint and format, as `make lint` asks; types are left to it."""

import ast
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


def test_every_text_file_is_opened_in_a_named_encoding() -> None:
    """Without one it is the locale's, in which a recipe written elsewhere cannot be read."""
    found = []
    for path in (*(ROOT / "repcon").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")):
        for call in (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)):
            method = isinstance(call.func, ast.Attribute)
            name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
            given = [part.value for part in call.args[:2] if isinstance(part, ast.Constant)]
            modes = [word for word in given if isinstance(word, str) and set(word) <= set("rwaxbt+")]
            opened = (
                name == "open" and (modes or isinstance(call.func, ast.Name)) and not any("b" in mode for mode in modes)
            )
            named = any(keyword.arg == "encoding" for keyword in call.keywords)
            if not named and (opened or (method and name in ("read_text", "write_text"))):
                found.append(f"{path.relative_to(ROOT)}:{call.lineno}")
    assert found == []
