"""Import timm next to any torchvision: `from repcon.models.timm_import import timm`."""

from importlib.util import find_spec
from pathlib import Path

import torch


def _complete_torchvision() -> "torch.library.Library | None":
    """Define the two torchvision operators that timm's import needs, where the installed torchvision lacks them.

    A torchvision that was built for another torch (PyPI's wheel next to a CPU build of torch) cannot load its library,
    and then `import torchvision` fails at the first of these operators.
    """
    spec = find_spec("torchvision")
    if spec is None or hasattr(torch.ops.torchvision, "nms"):
        return None
    for library in Path((spec.submodule_search_locations or [""])[0]).glob("_C*.*"):
        try:
            torch.ops.load_library(str(library))
        except OSError:
            continue
    if hasattr(torch.ops.torchvision, "nms"):
        return None
    operators = torch.library.Library("torchvision", "FRAGMENT")
    operators.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    operators.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return operators


_operators = _complete_torchvision()  # Kept: the definitions live as long as this object.

import timm  # noqa: E402
import timm.data.imagenet_info  # noqa: E402
import timm.models._builder  # noqa: E402
import timm.optim  # noqa: E402
import timm.scheduler  # noqa: E402
import timm.utils  # noqa: E402

__all__ = ["timm"]
