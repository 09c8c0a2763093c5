"""Representation consolidation: many expert classifiers distilled offline into one backbone.

The commands as functions (`consolidate`, `pack`, `teach`, `precompute`, `train`, `evaluate`, `report`, `export`,
`push`, `pull`), and the names that a training loop of your own needs; all are loaded when they are first asked for, so
that the command line starts at once:

    import repcon
    repcon.consolidate(proxy="photos", teachers={"birds": "runs/birds", "generalist": "resnet50"}, out="run")

    from repcon import Feed, HeadConfig, HeadsLoss, LabelStore, Pack, backbones, student
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
    from repcon.distill.loader import Feed as Feed
    from repcon.distill.loss import HeadsLoss as HeadsLoss
    from repcon.images.pack import Pack as Pack
    from repcon.labels.store import LabelStore as LabelStore
    from repcon.models import backbone as backbones
    from repcon.models import student as student
    from repcon.runtime.errors import UserError as UserError

__version__ = "0.1.0"

_HOMES = {
    "Feed": "repcon.distill.loader",
    "HeadConfig": "repcon.config",
    "HeadsLoss": "repcon.distill.loss",
    "LabelStore": "repcon.labels.store",
    "Pack": "repcon.images.pack",
    "UserError": "repcon.runtime.errors",
}

_MODULES = {
    "backbones": "repcon.models.backbone",
    "precompute": "repcon.precompute",
    "student": "repcon.models.student",
}
"""`precompute` is a package that can be called."""

_FUNCTIONS = ("consolidate", "evaluate", "export", "pack", "pull", "push", "report", "teach", "train")

__all__ = [
    "Feed", "HeadConfig", "HeadsLoss", "LabelStore", "Pack", "UserError", "__version__", "backbones", "consolidate",
    "evaluate", "export", "pack", "precompute", "pull", "push", "report", "student", "teach", "train",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    if name in _MODULES:
        return import_module(_MODULES[name])
    if name in _FUNCTIONS:
        return getattr(import_module("repcon.commands.functions"), name)
    raise AttributeError(f"module 'repcon' has no attribute {name!r}")
