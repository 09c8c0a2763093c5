"""The changes that the ablation tries, one at a time."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

Config = TypeVar("Config")


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """What differs from the usual settings; empty is the usual settings."""

    teach: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `repcon teach`."""
    label: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `repcon precompute`."""
    train: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `repcon train`."""
    heads: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Fields of single heads, by name; a head of weight 0 is left out."""
    domain_images: bool = False
    """Whether unlabelled images of the teacher's half of the classes join the proxy."""
    all_images: bool = False
    """Whether the proxy is all the unlabelled images that there are instead of the protocol's number."""
    generalist: str = ""
    """Another generalist as a teacher; the student's start stays."""


def both(**fields: Any) -> dict[str, dict[str, Any]]:
    return {"generalist": fields, "task": fields}


VARIANTS = {
    "usual": Variant(),
    "task_only": Variant(heads={"generalist": {"weight": 0.0}}),
    "generalist_weight_1": Variant(heads={"generalist": {"weight": 1.0}}),
    "generalist_weight_0.06": Variant(heads={"generalist": {"weight": 0.0625}}),
    "temperature_1": Variant(heads=both(temperature=1.0)),
    "temperature_4": Variant(heads=both(temperature=4.0), label={"temperatures": (1.0, 4.0)}),
    "k_4": Variant(label={"k": 4}),
    "k_64": Variant(label={"k": 64}),
    "tail_bucket": Variant(train={"tail": "bucket"}),
    "crops_1": Variant(label={"crops": 1}),
    "epochs_3": Variant(train={"epochs": 3}),
    "epochs_12": Variant(train={"epochs": 12}),
    "batch_32": Variant(train={"batch_size": 32}),
    "batch_16": Variant(train={"batch_size": 16}),
    "lr_1e-4": Variant(train={"optim": {"lr": 1e-4}}),
    "lr_1e-3": Variant(train={"optim": {"lr": 1e-3}}),
    "lr_3e-3": Variant(train={"optim": {"lr": 3e-3}}),
    "ema_0.99": Variant(train={"optim": {"ema": 0.99}}),
    "norm_follows_proxy": Variant(train={"freeze_norm": False}),
    "heads_from_random": Variant(train={"init_heads": False}),
    "whole_backbone": Variant(train={"freeze_blocks": 0}),
    "start_from_nothing": Variant(train={"pretrained": False, "freeze_blocks": 0, "freeze_norm": False}),
    "domain_images": Variant(domain_images=True),
    "all_images_epochs_2": Variant(all_images=True, train={"epochs": 2}),
    "all_images": Variant(all_images=True),
    "teacher_epochs_2": Variant(teach={"epochs": 2}),
    "teacher_epochs_12": Variant(teach={"epochs": 12}),
    "teacher_smoothing": Variant(teach={"label_smoothing": 0.1}),
    "larger_generalist": Variant(generalist="package:efficientnet_lite2"),
}
"""By name, in the order of the table."""


def changed(settings: Config, changes: Mapping[str, Any]) -> Config:
    """The settings with those fields; a mapping changes fields of the part that it names."""
    plain = {
        name: changed(getattr(settings, name), value) if isinstance(value, Mapping) else value
        for name, value in changes.items()
    }
    return replace(settings, **plain)  # pyright: ignore[reportArgumentType]
