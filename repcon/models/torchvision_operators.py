"""Import torchvision although its compiled operators do not load, as where it was built for another torch.

The wheel of PyPI, which is for CUDA, cannot load its library with a torch for the CPU, and `import torchvision` fails
at the first operator that it describes; `import timm` with it. Nothing that timm or repcon call is compiled there.

`tools/complete-torchvision` copies this file into an environment, for scripts that import timm before repcon; so it
imports nothing of repcon, and torch when torchvision is imported.
"""

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import ModuleType

_defined = []  # the definitions live as long as these objects


def complete_on_import() -> None:
    """Have `import torchvision` define the operators that it needs and cannot load."""
    if "torchvision" not in sys.modules:
        sys.meta_path.insert(0, _Finder())


class _Finder:
    """Finds torchvision as Python does, and gives it another loader."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "torchvision":
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


class _Loader(SourceFileLoader):
    """Defines the operators before torchvision's own code runs."""

    def exec_module(self, module: ModuleType) -> None:
        _define_missing_operators(self.path)
        super().exec_module(module)


def _define_missing_operators(init_file: str) -> None:
    from pathlib import Path

    import torch

    for library in Path(init_file).parent.glob("_C*.*"):
        try:
            torch.ops.load_library(str(library))
        except OSError:
            continue
    if not hasattr(torch.ops.torchvision, "nms"):
        operators = torch.library.Library("torchvision", "FRAGMENT")
        operators.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        operators.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _defined.append(operators)
