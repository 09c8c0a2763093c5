"""Representation consolidation: many expert classifiers distilled offline into one backbone.

The commands as functions (`consolidate`, `pack`, `teach`, `precompute`, `train`, `evaluate`, `report`, `export`,
`push`, `pull`), and the names that a training loop of your own needs; all are loaded when they are first asked for, so
that the command line starts at once:

    import repcon
    repcon.consolidate(proxy="photos", teachers={"birds": "runs/birds", "generalist": "resnet50"}, out="run")

    from repcon import DistillLoader, HeadConfig, ImagePack, LabelStore, MultiHeadKLLoss, build_student
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from repcon.commands.functions import consolidate as consolidate
    from repcon.commands.functions import evaluate as evaluate
    from repcon.commands.functions import export as export
    from repcon.commands.functions import pack as pack
    from repcon.commands.functions import precompute as precompute
    from repcon.commands.functions import pull as pull
    from repcon.commands.functions import push as push
    from repcon.commands.functions import report as report
    from repcon.commands.functions import teach as teach
    from repcon.commands.functions import train as train
    from repcon.config import HeadConfig as HeadConfig
    from repcon.distill.loader import DistillLoader as DistillLoader
    from repcon.distill.loss import MultiHeadKLLoss as MultiHeadKLLoss
    from repcon.images.pack import ImagePack as ImagePack
    from repcon.labels.store import LabelStore as LabelStore
    from repcon.models.preprocessing import normalise as normalise
    from repcon.models.preprocessing import preprocessing_of as preprocessing_of
    from repcon.models.student import Student as Student
    from repcon.models.student import build_student as build_student
    from repcon.models.student import load_student as load_student
    from repcon.models.student import save_student as save_student
    from repcon.runtime.errors import UserError as UserError

__version__ = "0.1.0"

_HOMES = {
    "DistillLoader": "repcon.distill.loader",
    "HeadConfig": "repcon.config",
    "ImagePack": "repcon.images.pack",
    "LabelStore": "repcon.labels.store",
    "MultiHeadKLLoss": "repcon.distill.loss",
    "Student": "repcon.models.student",
    "UserError": "repcon.runtime.errors",
    "build_student": "repcon.models.student",
    "load_student": "repcon.models.student",
    "normalise": "repcon.models.preprocessing",
    "preprocessing_of": "repcon.models.preprocessing",
    "save_student": "repcon.models.student",
    **dict.fromkeys(
        ("consolidate", "evaluate", "export", "pack", "pull", "push", "report", "teach", "train"),
        "repcon.commands.functions",
    ),
}


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES, "precompute"})


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    if name == "precompute":  # a package that can be called
        return import_module("repcon.precompute")
    raise AttributeError(f"module 'repcon' has no attribute {name!r}")
