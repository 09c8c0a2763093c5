"""The commands as functions of `repcon`."""

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from precompute_case import pack_path, teacher_folders  # noqa: F401  (fixtures)

import repcon
from repcon.commands import results
from repcon.config import OptimConfig
from repcon.runtime.errors import UserError


def assert_keys(found: Mapping[str, Any], kind: Any) -> None:
    """The result has the keys of its type, those that may be missing aside."""
    assert kind.__required_keys__ <= set(found) <= kind.__required_keys__ | kind.__optional_keys__


def test_each_command_is_a_function(
    pack_path: Path,  # noqa: F811
    teacher_folders: dict[str, Path],  # noqa: F811
    picture_folder: Path,
    tmp_path: Path,
) -> None:
    how = {"num_workers": 1, "device": "cpu", "loader": "torch"}
    packed = repcon.pack(picture_folder, tmp_path / "pack", limit=8, num_workers=1)
    assert packed["images"] == 8
    figures = repcon.precompute(
        pack=pack_path, out=tmp_path / "labels.zarr", teachers={"five": teacher_folders["five"]}, crops=1, k=2, **how
    )
    assert figures["crops"] == 32
    trained = repcon.train(
        pack=pack_path, store=tmp_path / "labels.zarr", out=tmp_path / "student", backbone="test_resnet",
        pretrained=False, epochs=1, optim=OptimConfig(lr=1e-3), **how,
    )  # fmt: skip
    assert Path(trained["student"]).is_dir()
    measured = repcon.evaluate(
        data=pack_path, backbones={"student": tmp_path / "student"}, out=tmp_path / "transfer", metrics=["knn"], **how
    )
    assert "student" in measured["backbones"]
    reported = repcon.report(tmp_path / "student", out=tmp_path / "report")
    assert Path(reported["html"]).is_file()
    for found, kind in (
        (packed, results.PackResult), (figures, results.PrecomputeResult), (trained, results.TrainResult),
        (measured, results.EvaluateResult), (reported, results.ReportResult),
    ):  # fmt: skip
        assert_keys(found, kind)
    with pytest.raises(UserError, match=r"repcon.teach\(\): .*epocs"):
        repcon.teach(data=pack_path, out=tmp_path / "teacher", epocs=3)


def test_the_package_of_the_same_name_is_still_one() -> None:
    probe = (
        "import sys, repcon; assert callable(repcon.precompute); import repcon.precompute.engine as engine; "
        "assert engine.work; heavy = 'matplotlib' in sys.modules; print(callable(repcon.precompute), heavy)"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False"]
