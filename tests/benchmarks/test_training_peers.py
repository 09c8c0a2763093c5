"""Peers of training: every library's student is trained by its own loss, measured, and named where it cannot run."""

import io
import sys
import tarfile
from pathlib import Path

import pytest
import simplejpeg
import torch
from pictures import photograph

from benchmarks.experiments.consolidation.protocol import Protocol
from benchmarks.experiments.consolidation.study import Study
from benchmarks.harness.records import markdown
from benchmarks.training.peers import benchmark, online
from repcon.config import HeadConfig
from repcon.models.preprocessing import Preprocessing, preprocessing_of
from repcon.models.saved_model import save_model
from repcon.models.student import Student
from repcon.models.timm_import import timm

HEADS = {"birds-0": 5, "generalist": 7}
CONFIGS = {"birds-0": HeadConfig(name="birds-0", temperature=2.0)}
CONFIGS["generalist"] = HeadConfig(name="generalist", weight=0.1, temperature=1.0)
DATA = Preprocessing(size=32, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


@pytest.mark.parametrize("library", online.LOSSES)
def test_a_librarys_loss_is_the_sum_over_the_heads(library: str):
    if library == "torchdistill":
        pytest.importorskip("torchdistill")
    torch.manual_seed(0)
    student = Student(timm.create_model("test_efficientnet", num_classes=0), HEADS).eval()
    teachers = {name: timm.create_model("test_efficientnet", num_classes=count).eval() for name, count in HEADS.items()}
    for teacher in teachers.values():
        teacher.pretrained_cfg = {**teacher.pretrained_cfg, "mean": DATA.mean, "std": DATA.std}
    loss = online.LOSSES[library](student, teachers, CONFIGS, DATA)
    images = torch.randn(4, 3, 32, 32)
    found = loss(images)

    expected = torch.zeros(())
    logits = student(images)
    for name, head in CONFIGS.items():
        ours = (logits[:, student.head_slices[name]] / head.temperature).log_softmax(1)
        theirs = (teachers[name](images) / head.temperature).log_softmax(1)
        kl = torch.nn.functional.kl_div(ours, theirs, reduction="batchmean", log_target=True)
        expected = expected + head.weight * head.temperature**2 * kl
    torch.testing.assert_close(found, expected)
    found.backward()
    assert next(student.backbone.parameters()).grad is not None
    assert all(parameter.grad is None for teacher in teachers.values() for parameter in teacher.parameters())


def write_tar(path: Path, files: dict[str, int]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, seed in files.items():
            content = simplejpeg.encode_jpeg(photograph(seed, 48, 44, hue=seed), quality=92)
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def test_every_student_is_measured_or_named_with_its_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for place, name in enumerate(("aerial", "birds", "grocery", "objects", "imagenet")):
        classes, images = (8, 6) if name == "aerial" else (1, 20)
        files = {f"{name}{c}/{n}.jpg": 1000 * place + 100 * c + n for c in range(classes) for n in range(images)}
        write_tar(tmp_path / f"{name}.tar", files)
    torch.manual_seed(0)
    model = timm.create_model("test_efficientnet", num_classes=12)
    names = [f"c{number}" for number in range(12)]
    data = preprocessing_of(model, 32)
    save_model(model, tmp_path / "generalist", classes=names, preprocessing=data, extra={})
    protocol = Protocol(
        name="tiny", model=str(tmp_path / "generalist"), domains=("aerial",), seeds=(4,), proxy_images=20, size=32,
        epochs=1, teacher_epochs=1, crops=1, freeze_blocks=1, batch_size=8, fewshot_trials=3, device="cpu",
        methods=("generalist", "teacher", "task_generalist"),
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "torchdistill.core.distillation", None)
    figures = benchmark.Race(Study(tmp_path, tmp_path / "work", protocol), str(tmp_path / "python")).run()
    measured, absent = (markdown(grid.titles, grid.rows) for grid in benchmark.grids(figures))
    for name in ("generalist", "teacher", "repcon", "repcon_start", "timm"):
        assert f"| {name} |" in measured
        assert 0 <= figures[f"{name}_probe"] <= 100
    assert figures["repcon_seconds"] > figures["repcon_label_seconds"] > 0 and figures["timm_seconds"] > 0
    assert "| torchdistill |" in absent and "| lightly |" in absent
    assert figures["lightly_error"].endswith("No such file or directory")
