"""Representation consolidation: many expert classifiers distilled offline into one backbone.

The names that a training loop of your own needs, loaded when they are first asked for, so that the command line
starts at once:

    from repcon import Feed, HeadConfig, HeadsLoss, LabelStore, Pack, backbones, student
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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

_MODULES = {"backbones": "repcon.models.backbone", "student": "repcon.models.student"}

__all__ = ["Feed", "HeadConfig", "HeadsLoss", "LabelStore", "Pack", "UserError", "__version__", "backbones", "student"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    if name in _MODULES:
        return import_module(_MODULES[name])
    raise AttributeError(f"module 'repcon' has no attribute {name!r}")
