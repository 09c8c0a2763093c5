"""`compile` of teachers: where it pays, what it changes, and what happens where torch cannot."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from precompute_case import teacher_folders
from torch import nn

from repcon.config import PrecomputeConfig, TeacherConfig
from repcon.models.teacher import Teacher, load_teacher
from repcon.precompute import compilation
from repcon.precompute.compilation import compile_teachers, flops_per_crop, pays
from repcon.runtime.errors import UserError
from repcon.runtime.system import cores

__all__ = ["teacher_folders"]

CPU = torch.device("cpu")
needs_compiler = pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("c++")), reason="torch.compile on a CPU needs a C++ compiler"
)


@pytest.fixture
def teacher(teacher_folders: dict[str, Path]) -> Teacher:
    return load_teacher(TeacherConfig(name="five", model=str(teacher_folders["five"])), CPU)


def compile_it(teacher: Teacher, setting: bool | str, crops: int = 0) -> list[str]:
    """The notes of compiling one teacher for batches of 4 crops."""
    config = PrecomputeConfig(
        pack="", out="", batch_size=4,
        teachers=(TeacherConfig(name=teacher.name, model="", compile=setting),),  # pyright: ignore[reportArgumentType]
    )  # fmt: skip
    notes: list[str] = []
    compile_teachers([teacher], config, CPU, crops=crops, on_note=notes.append)
    return notes


def is_compiled(teacher: Teacher) -> bool:
    return teacher.module._compiled_call_impl is not None


def pixels(teacher: Teacher, count: int) -> torch.Tensor:
    side = teacher.preprocessing.size
    return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@needs_compiler
def test_a_compiled_teacher_answers_as_before(teacher):
    torch.compiler.reset()
    images = pixels(teacher, 4)
    before = teacher(images)
    (note,) = compile_it(teacher, True)
    assert "teacher five: compiling it" in note and is_compiled(teacher)
    assert torch.allclose(teacher(images), before, atol=1e-4)


def test_auto_compiles_from_so_many_crops_on(teacher):
    enough = compilation.MIN_SECONDS * compilation.FLOPS_PER_CORE * cores() / flops_per_crop(teacher)
    assert pays(teacher, int(enough) + 1, CPU) and not pays(teacher, int(enough) - 1, CPU)
    assert compile_it(teacher, "auto", int(enough) - 1) == [] and not is_compiled(teacher)


def test_auto_leaves_a_gpu_and_a_user_s_own_module_uncompiled(teacher):
    own = load_teacher(TeacherConfig(name="own", model="precompute_case:plain"), CPU)
    assert not pays(own, 10**12, CPU) and not pays(teacher, 10**12, torch.device("cuda"))


def test_the_operations_of_a_crop_are_those_of_its_layers():
    layers = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Flatten(), nn.Linear(8 * 16 * 16, 5))
    own = load_teacher(TeacherConfig(name="own", model="precompute_case:plain"), CPU)
    assert own.preprocessing.size == 16
    assert flops_per_crop(replace(own, module=layers)) == 2 * (16 * 16 * 8 * 3 * 9 + 8 * 16 * 16 * 5)


def test_where_torch_cannot_compile_auto_goes_on_and_true_says_what_to_set(teacher, monkeypatch):
    def compile_badly(self: Teacher, device: torch.device) -> None:
        def fail(*_: object) -> None:
            raise ValueError("no such header")

        self.module._compiled_call_impl = fail

    monkeypatch.setattr(Teacher, "compile", compile_badly)
    with pytest.raises(UserError, match=r"teacher five.*no such header; set compile = false"):
        compile_it(teacher, True)
    teacher.uncompile()
    _, warning = compile_it(teacher, "auto", 10**12)
    assert "no such header" in warning and "uncompiled" in warning
    assert not is_compiled(teacher) and teacher(pixels(teacher, 2)).shape == (2, 5)
