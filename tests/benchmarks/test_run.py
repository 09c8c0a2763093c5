"""`make bench`: one benchmark after the other, whatever becomes of each."""

import json
import sys
from pathlib import Path

import pytest

from benchmarks.harness import run
from repcon.runtime.console import console
from repcon.runtime.errors import UserError
from repcon.runtime.system import environment

SCRIPT = """
import json, os, sys
figures = {figures}
assert sys.argv[1:] == ["--json", sys.argv[2], "--record"], sys.argv
open(sys.argv[2], "w").write(json.dumps(figures))
"""


@pytest.fixture
def scripts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store benchmark that misses one target, and a loaders benchmark that fails."""
    here = tmp_path / "scripts"
    here.mkdir()
    facts = environment() | {"device": "cpu"}
    figures = {"bytes_per_crop_zstd": 118.0, "slab_over_memmap_zstd": 0.1, "environment": facts}
    (here / "store.py").write_text(SCRIPT.format(figures=figures))
    (here / "loaders.py").write_text("raise SystemExit('no [such] picture')")
    monkeypatch.setattr(run, "PACKAGE", "scripts")
    monkeypatch.setattr(run, "ROOT", tmp_path)
    monkeypatch.delenv("REPCON_DATA", raising=False)
    return tmp_path / "out"


def arguments(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["run.py", *words])


def test_a_failure_does_not_stop_the_rest_and_is_told_at_the_end(scripts, monkeypatch):
    arguments(monkeypatch, "--record", "--only", "loaders,topk_quality,store", "--out", str(scripts))
    with console.capture() as shown, pytest.raises(UserError, match="failed: loaders"):
        run.main()
    text = " ".join(shown.get().split())
    assert "no [such] picture" in text
    assert "topk_quality: left out: needs photographs" in text
    assert "bytes_per_crop_zstd 118 (<= 120)" in text
    assert "slab_over_memmap_zstd 0.1 (>= 0.15, missed)" in text
    assert json.loads((scripts / "store.json").read_text())["bytes_per_crop_zstd"] == 118.0
    assert (scripts / "report" / "report.html").is_file()


def test_an_unknown_name_is_told(monkeypatch, scripts):
    arguments(monkeypatch, "--only", "stores", "--out", str(scripts))
    with pytest.raises(UserError, match="stores unknown; there are cli, kernels, store"):
        run.main()
