"""Representation consolidation: many expert classifiers distilled offline into one backbone.

The names that a training loop of your own needs, loaded when they are first asked for, so that the command line
starts at once:

    from repcon import Feed, HeadConfig, HeadsLoss, LabelStore, Pack, backbones, student
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from repcon import backbones as backbones
    from repcon import student as student
    from repcon.config import HeadConfig as HeadConfig
    from repcon.errors import UserError as UserError
    from repcon.images import Pack as Pack
    from repcon.loss import HeadsLoss as HeadsLoss
    from repcon.store import LabelStore as LabelStore
    from repcon.training.feed import Feed as Feed

_HOMES = {
    "Feed": "repcon.training.feed",
    "HeadConfig": "repcon.config",
    "HeadsLoss": "repcon.loss",
    "LabelStore": "repcon.store",
    "Pack": "repcon.images",
    "UserError": "repcon.errors",
}

__all__ = ["Feed", "HeadConfig", "HeadsLoss", "LabelStore", "Pack", "UserError", "backbones", "student"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    if name in __all__:
        return import_module(f"repcon.{name}")
    raise AttributeError(f"module 'repcon' has no attribute {name!r}")
