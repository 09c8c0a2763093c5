"""A disk without room is refused before work."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from repcon.runtime.disk_space import require_disk_space
from repcon.runtime.errors import UserError


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: asked.append(path) or SimpleNamespace(free=2_000_000))
    out = tmp_path / "not" / "yet"
    require_disk_space(out, 2_000_000)
    with pytest.raises(UserError) as refused:
        require_disk_space(out, 3_500_000, hint=", or lower k")
    sizes = "needs at least 3.5 MB of disk, and 2 MB are free; make room"
    assert str(refused.value) == f"{out}: {sizes}, or lower k"
    with pytest.raises(UserError, match=f"^hf://me/one: {sizes}$"):
        require_disk_space(tmp_path, 3_500_000, name="hf://me/one")
    assert asked == [tmp_path] * 3
