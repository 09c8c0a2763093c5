"""What bfloat16 costs a teacher's answers on a CPU, and which layers lose it. Two minutes on two cores.

    python -m benchmarks.precompute.bf16 --data FOLDER [--images 512] [--json FILE] [--record]

EfficientNet-Lite0 over central crops of photographs from all tars in FOLDER (tools/photos.py). bfloat16 is emulated in
float32: inputs, weights and outputs of a layer are rounded to it, sums are kept in float32, as a CPU with bfloat16
instructions computes. So the figures hold for such CPUs, and say nothing of the speed.

all               every layer in bfloat16, as `precision = "bf16"`
without_NAME      the same, with some layers in float32: stem (the first convolution), depthwise, pointwise, norm
                  (batch norms with their activation), classifier
products          convolutions and the classifier take bfloat16 and give float32; all else is float32
product_NAME      as `products`, those layers only
only_pointwise    pointwise convolutions in bfloat16, also what they give; all else is float32
weights           the weights are rounded, and nothing else

NAME_agreement    share of crops whose most probable class is that of float32
NAME_kl           mean KL from float32's answers in nat; NAME_kl_worst: the largest
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.harness import script
from benchmarks.harness.records import number
from benchmarks.harness.tables import Grid
from benchmarks.loaders.sample_images import photographs
from repcon.config import TeacherConfig
from repcon.decode.reference import crop, decode
from repcon.evaluation.features import centre_boxes
from repcon.models.preprocessing import normalise
from repcon.models.teacher import load_teacher
from repcon.runtime.console import progress
from repcon.runtime.system import environment

MODEL, BATCH = "package:efficientnet_lite0", 32
KINDS = ("stem", "depthwise", "pointwise", "norm", "classifier")
PRODUCTS = ("stem", "depthwise", "pointwise", "classifier")


def main() -> None:
    parser = script.parser("What bfloat16 costs a teacher's answers on a CPU.", data="folder of tars of photographs")
    parser.add_argument("--images", type=int, default=512, help="photographs")
    arguments = parser.parse_args()
    pictures = photographs(script.photographs(arguments), arguments.images)
    teacher = load_teacher(TeacherConfig(name="teacher", model=MODEL), "cpu")
    inputs = normalise(_crops(pictures, teacher.preprocessing.size), teacher.preprocessing, torch.float32)
    figures: dict[str, Any] = {"images": len(inputs), "side": teacher.preprocessing.size}
    exact = _answers(teacher.module, inputs)
    ways = {"all": (KINDS, True, True)}
    ways |= {f"without_{kind}": ([other for other in KINDS if other != kind], True, True) for kind in KINDS}
    ways |= {"without_stem_depthwise_classifier": (("pointwise", "norm"), True, True)}
    ways |= {"products": (PRODUCTS, True, False)}
    ways |= {f"product_{kind}": ((kind,), True, False) for kind in PRODUCTS}
    ways |= {"only_pointwise": (("pointwise",), True, True), "weights": (PRODUCTS, False, False)}
    with progress() as bar:
        task = bar.add_task("bfloat16", total=len(ways), unit="ways", note="")
        for name, (kinds, round_inputs, round_outputs) in ways.items():
            bar.update(task, note=name)
            with rounded(teacher.module, kinds, inputs=round_inputs, outputs=round_outputs):
                figures |= {f"{name}_{what}": value for what, value in compared(exact, teacher.module, inputs).items()}
            bar.advance(task)
    figures["environment"] = environment() | {"device": "cpu"}
    script.finish("precompute-bf16", figures, [grid(ways, figures)], arguments)


def grid(ways: Iterable[str], figures: Mapping[str, Any]) -> Grid:
    """A row per way."""
    titles = ("in bfloat16", "agreement", "KL in nat", "largest KL")
    rows = [(name, *(number(figures[f"{name}_{what}"]) for what in ("agreement", "kl", "kl_worst"))) for name in ways]
    return Grid(title="bfloat16 on a CPU, emulated, against float32", titles=titles, rows=rows)


def _crops(pictures: list[bytes], side: int) -> torch.Tensor:
    """(n, 3, side, side) uint8 central squares."""
    crops = []
    for picture in pictures:
        image = decode(picture)
        (box,) = centre_boxes(np.array([image.shape[1::-1]]))
        crops.append(crop(image, box, side, False))
    return torch.stack(crops).contiguous(memory_format=torch.channels_last)


@torch.inference_mode()
def _answers(module: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    """(n, C) log-probabilities in float64."""
    return torch.cat([module(part).double().log_softmax(1) for part in inputs.split(BATCH)])


def compared(exact: torch.Tensor, module: nn.Module, inputs: torch.Tensor) -> dict[str, float]:
    """Agreement, mean KL and largest KL in nat of the module's answers with the `exact` log-probabilities."""
    found = _answers(module, inputs)
    kl = (exact.exp() * (exact - found)).sum(1)
    agreement = (exact.argmax(1) == found.argmax(1)).double().mean()
    return {"agreement": float(agreement), "kl": float(kl.mean()), "kl_worst": float(kl.max())}


@contextmanager
def rounded(module: nn.Module, kinds: Collection[str], *, inputs: bool, outputs: bool) -> Iterator[None]:
    """Within the block, layers of these kinds have weights, and if asked inputs and outputs, of bfloat16's values."""
    layers = [layer for layer in module.modules() if kind_of(layer) in kinds]
    weights = [tensor for layer in layers for tensor in (*layer.parameters(False), *layer.buffers(False))]
    weights = [tensor for tensor in weights if tensor.is_floating_point()]
    exact = [tensor.detach().clone() for tensor in weights]
    hooks = []
    for layer in layers:
        if inputs:
            hooks.append(layer.register_forward_pre_hook(lambda _, given: tuple(map(_rounded, given))))
        if outputs:
            hooks.append(layer.register_forward_hook(_round_answer))
    try:
        for tensor in weights:
            tensor.data = _rounded(tensor.data)
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for tensor, value in zip(weights, exact, strict=True):
            tensor.data = value


def kind_of(layer: nn.Module) -> str:
    """One of `KINDS`; empty for other modules."""
    if isinstance(layer, nn.Linear):
        return "classifier"
    if isinstance(layer, nn.Conv2d):
        return "stem" if layer.in_channels == 3 else "depthwise" if layer.groups > 1 else "pointwise"
    return "norm" if isinstance(layer, nn.modules.batchnorm._BatchNorm) else ""


def _round_answer(layer: nn.Module, given: object, answer: torch.Tensor) -> torch.Tensor:
    return _rounded(answer)


def _rounded(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.bfloat16).to(torch.float32)


if __name__ == "__main__":
    script.run(main)
