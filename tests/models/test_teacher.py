"""Teachers: what they answer, what is recorded of them, and what is refused."""

import dataclasses
import shutil
import sys
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from repcon.config import TeacherConfig
from repcon.models import teacher as teachers
from repcon.models.custom import is_module_function
from repcon.models.factory import create_model
from repcon.models.identity import weight_hash
from repcon.models.preprocessing import Preprocessing
from repcon.models.saved_model import save_model
from repcon.runtime.errors import UserError

SIZE = 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random classifier of five classes, saved as `repcon teach` saves one."""
    torch.manual_seed(1)
    model = create_model("test_resnet", num_classes=5, pretrained=False)
    place = tmp_path_factory.mktemp("teacher")
    data = Preprocessing(size=SIZE, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    # `licence` is how folders of older versions spell it.
    save_model(model, place, classes=tuple("abcde"), preprocessing=data, extra={"licence": "CC0-1.0"})
    return place


@pytest.fixture
def factories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's module with factories, importable."""
    (tmp_path / "own_models.py").write_text(
        "import torch\n"
        "from torch import nn\n"
        "def good():\n"
        "    torch.manual_seed(3)\n"
        "    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 4))\n"
        "    return net, {'size': 16, 'mean': [0, 0, 0], 'std': [1, 1, 1]}\n"
        "def lone():\n"
        "    return nn.Identity()\n"
        "def vague():\n"
        "    return nn.Identity(), {'size': 16}\n"
        "def shapeless():\n"
        "    return nn.Identity(), {'size': 16, 'mean': [0, 0, 0], 'std': [1, 1, 1]}\n"
        "def broken():\n"
        "    return torch.load('birds.pt')\n"
        "def bytewise():\n"
        "    return nn.Identity(), {'size': 16, 'mean': [123.7, 116.3, 103.5], 'std': [58.4, 57.1, 57.4]}\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    sys.modules.pop("own_models", None)


def pixels(count: int = 3, size: int = SIZE) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_a_compiled_teacher_answers_as_the_model_does(folder):
    torch.compiler.reset()  # of what other tests compiled
    eager, compiled = (teachers.load_teacher(TeacherConfig(name="task", model=str(folder)), "cpu") for _ in range(2))
    compiled.compile(torch.device("cpu"))
    counters.clear()
    for count in (3, 2):  # a last batch is shorter
        assert torch.allclose(compiled(pixels(count)), eager(pixels(count)), atol=1e-4)
    assert counters["stats"]["unique_graphs"] > 0 and not counters["graph_break"]
    assert compiled.metadata == eager.metadata


def test_a_folder_s_teacher_answers_as_the_model_does(folder):
    teacher = teachers.load_teacher(TeacherConfig(name="task", model=str(folder)), "cpu")
    model = create_model(str(folder)).eval()
    wanted = model((pixels().float() / 255 - 0.5) / 0.25)
    assert torch.allclose(teacher(pixels()), wanted, atol=1e-5)
    metadata = teacher.metadata
    assert metadata.weight_hash == weight_hash(model)
    assert metadata.classes == tuple("abcde") and metadata.num_classes == 5
    assert metadata.preprocessing == {"size": SIZE, "mean": [0.5] * 3, "std": [0.25] * 3}
    assert metadata.licence == "CC0-1.0" and "torch" in metadata.versions and metadata.architecture == "test_resnet"


def test_the_answers_do_not_depend_on_the_batch(folder):
    teacher = teachers.load_teacher(TeacherConfig(name="task", model=str(folder)), "cpu")
    together = teacher(pixels(4))
    assert torch.allclose(together, torch.cat([teacher(one[None]) for one in pixels(4)]), atol=1e-5)


def test_bf16_answers_in_float32(folder):
    teacher = teachers.load_teacher(TeacherConfig(name="task", model=str(folder), precision="bf16"), "cpu")
    exact = teachers.load_teacher(TeacherConfig(name="task", model=str(folder)), "cpu")
    assert next(teacher.module.parameters()).dtype == torch.bfloat16
    assert teacher(pixels()).dtype == torch.float32
    assert (teacher(pixels()) - exact(pixels())).abs().max() < 0.1 * exact(pixels()).abs().max() + 0.05
    assert teacher.metadata.weight_hash == exact.metadata.weight_hash


def test_the_generalist_from_its_package_knows_its_classes():
    config = TeacherConfig(name="generalist", model="package:efficientnet_lite0", size=64)
    metadata = teachers.load_teacher(config, "cpu").metadata
    assert metadata.num_classes == len(metadata.classes) == 1000
    assert metadata.preprocessing["size"] == 64


def test_a_backbone_is_no_teacher(tmp_path):
    backbone = create_model("test_resnet", num_classes=0, pretrained=False)
    data = Preprocessing(size=SIZE, mean=(0.5,) * 3, std=(0.5,) * 3)
    save_model(backbone, tmp_path, classes=(), preprocessing=data, extra={})
    with pytest.raises(UserError, match=r"teacher t: .*backbone without a classifier"):
        teachers.load_teacher(TeacherConfig(name="t", model=str(tmp_path)), "cpu")


def test_factories_give_modules_with_preprocessing(factories):
    teacher = teachers.load_teacher(TeacherConfig(name="own", model="own_models:good"), "cpu")
    assert teacher(pixels(size=16)).shape == (3, 4)
    assert teacher.metadata.architecture.endswith("Sequential") and teacher.metadata.preprocessing["size"] == 16


@pytest.mark.parametrize(
    "model, says",
    [
        ("own_models:lone", "must return"),
        ("own_models:vague", "preprocessing must be"),
        ("own_models:shapeless", r"\(B, C\) logits"),
        ("own_models:absent", "no attribute"),
        ("no_models_here:good", "PYTHONPATH"),
        ("own_models:broken", r"failed in line 14 of .*own_models.py: FileNotFoundError: .*birds.pt"),
        ("own_models:bytewise", "divide those of pixels from 0 to 255 by 255"),
    ],
)
def test_factories_that_give_something_else_are_refused(factories, model, says):
    with pytest.raises(UserError, match=f"teacher own: .*{says}"):
        teachers.load_teacher(TeacherConfig(name="own", model=model), "cpu")


def test_a_section_loads_its_teacher_again_and_refuses_other_weights(folder, tmp_path):
    metadata = teachers.load_teacher(TeacherConfig(name="task", model=str(folder)), "cpu").metadata
    assert teachers.load_stored_teacher(metadata, "cpu").metadata.weight_hash == metadata.weight_hash
    other = dataclasses.replace(metadata, weight_hash="0" * 64)
    with pytest.raises(UserError, match=r"teacher task: .*weight_hash"):
        teachers.load_stored_teacher(other, "cpu")


def test_a_store_s_section_does_not_run_code_unasked(factories):
    metadata = teachers.load_teacher(TeacherConfig(name="own", model="own_models:good"), "cpu").metadata
    with pytest.raises(UserError, match="is a function"):
        teachers.load_stored_teacher(metadata, "cpu")
    assert teachers.load_stored_teacher(metadata, "cpu", model="own_models:good").metadata == metadata


@pytest.mark.parametrize(
    "model, factory",
    [("pkg.mod:make", True), ("package:efficientnet_lite0", False), ("hf-hub:timm/x", False), ("resnet18.a1", False)],
)
def test_what_counts_as_a_factory(model, factory):
    assert is_module_function(model) is factory


@pytest.mark.parametrize(
    "code, says",
    [
        ("import argparse\nargparse.ArgumentParser().parse_args()\ndef make(): pass\n", "ends the program"),
        ("def make():\n    raise SystemExit('no')\n", "failed in line 2 of .*ends the program"),
        ("class Odd(BaseException): pass\ndef make():\n    raise Odd('x')\n", "failed in line 3 of .*Odd: x"),
        ("import nothing_of_this_name\n", "No module named 'nothing_of_this_name'"),
        ("def make(: pass\n", "SyntaxError"),
    ],
)
def test_a_function_that_ends_the_program_is_one_line(factories, monkeypatch, code, says):
    (factories / "script.py").write_text(code)
    sys.modules.pop("script", None)
    monkeypatch.setattr(sys, "argv", ["repcon", "precompute", "--recipe", "x"])
    with pytest.raises(UserError, match=f"teacher own: script:make.*{says}"):
        teachers.load_teacher(TeacherConfig(name="own", model="script:make"), "cpu")
    sys.modules.pop("script", None)


def test_ctrl_c_while_a_function_works_is_no_fault_of_it(factories):
    (factories / "script.py").write_text("def make():\n    raise KeyboardInterrupt\n")
    sys.modules.pop("script", None)
    with pytest.raises(KeyboardInterrupt):
        teachers.load_teacher(TeacherConfig(name="own", model="script:make"), "cpu")
