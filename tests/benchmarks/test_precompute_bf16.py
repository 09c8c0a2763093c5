"""bfloat16 emulated layer by layer: what is rounded, and that nothing stays so."""

import torch
from torch import nn

from benchmarks.precompute.bf16 import KINDS, compared, kind_of, rounded


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 4, 1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5),
    ).eval()  # fmt: skip


def test_each_layer_has_its_kind():
    assert [kind_of(layer) for layer in network()] == ["stem", "norm", "depthwise", "pointwise", "", "", "classifier"]


def test_rounded_layers_compute_with_bfloat16_s_values_and_are_restored():
    module, inputs = network(), torch.randn(6, 3, 9, 9)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with torch.no_grad():
        exact = module(inputs).double().log_softmax(1)
        with rounded(module, KINDS, inputs=True, outputs=True):
            answers = module(inputs)
            assert torch.equal(module[0].weight, module[0].weight.bfloat16().float())
        assert torch.equal(answers, answers.bfloat16().float())
        with rounded(module, ("classifier",), inputs=True, outputs=False):
            assert torch.equal(module[0].weight, before["0.weight"]) and not torch.equal(
                module[6].weight, before["6.weight"]
            )
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    assert compared(exact, module, inputs) == {"agreement": 1.0, "kl": 0.0, "kl_worst": 0.0}
