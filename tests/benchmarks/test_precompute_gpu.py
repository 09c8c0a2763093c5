"""The benchmark for a GPU, as far as a CPU can check it."""

import torch

from benchmarks.precompute.gpu import CLASSES, DRY, load


def test_its_factories_are_found_and_have_the_setting_s_input_size():
    names = tuple(name for name in CLASSES if name != "resnet50")
    teachers = load(names, DRY, torch.device("cpu"))
    assert [teacher.metadata.num_classes for teacher in teachers] == [CLASSES[name] for name in names]
    assert {teacher.preprocessing.size for teacher in teachers} == {DRY.size}
    assert {teacher.metadata.model.partition(":")[0] for teacher in teachers} == {"benchmarks.precompute.gpu"}
