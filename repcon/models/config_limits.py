"""Limits on what an untrusted config.json may have timm build, checked before anything is allocated."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from repcon.models.saved_model import CONFIG
from repcon.models.timm_import import timm
from repcon.models.weights import Tensors
from repcon.runtime.errors import UserError

PLAIN = 4096
"""Up to which a number needs no tensor of that length: sides of inputs, widths that are reduced."""
MOST_WITHOUT_WEIGHTS = 2**16
MOST_DEPTH, MOST_ENTRIES = 8, 1000
SLACK = 1.25
"""How much larger than its weights a model may be, for what is not saved with them."""
SLACK_ELEMENTS = 2**22


def require_possible(config: Mapping[str, Any], tensors: Tensors | None, model: str) -> None:
    """Raises UserError where numbers that decide about the model's size are beyond those of its weights.

    A width, a depth or a number of classes is the length of a tensor, or no more than there are tensors. `tensors`
    None: without weights. Also where the names of its classes stand there twice, and differ.
    """
    most = MOST_WITHOUT_WEIGHTS
    if tensors is not None:
        most = max(PLAIN, len(tensors), *(max(tensor.shape, default=0) for tensor in tensors.values()))
    inner = config.get("pretrained_cfg")
    names = [part["label_names"] for part in (config, inner) if isinstance(part, Mapping) and part.get("label_names")]
    if len(names) > 1 and names[0] != names[1]:
        what = "label_names and pretrained_cfg.label_names are not the same"
        raise UserError(f"model {model}: its {CONFIG}: {what}; remove the one that is wrong")
    deciding = {"num_classes": config.get("num_classes"), "model_args": config.get("model_args")}
    deciding |= {"pretrained_cfg": {"num_classes": inner.get("num_classes")}} if isinstance(inner, Mapping) else {}
    left = MOST_ENTRIES
    for place, value in _numbers(deciding, "", 0):
        left -= 1
        if left < 0 or value is None:
            raise UserError(f"model {model}: its {CONFIG}: {place}: nested too deeply, or too many values; correct it")
        if abs(value) > most:
            hint = f"no part of its weights is longer than {most:,}; take the config that belongs to them"
            shown = f"{value:,}" if abs(value) < 10**30 else "so large a number"
            raise UserError(f"model {model}: its {CONFIG}: {place} = {shown} makes no sense: {hint}")


def _numbers(value: Any, place: str, depth: int) -> Iterator[tuple[str, float | None]]:
    """Every number and where it stands; None where the nesting is too deep."""
    if depth > MOST_DEPTH:
        yield place, None
    elif isinstance(value, Mapping):
        for key, held in value.items():
            yield from _numbers(held, f"{place}.{key}".lstrip("."), depth + 1)
    elif isinstance(value, list):
        for held in value:
            yield from _numbers(held, place, depth + 1)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield place, value


def require_fitting(name: str, tensors: Tensors, model: str) -> None:
    """Raises UserError where timm's model `name` would be much larger than its weights; it is built without memory.

    A model that cannot be built in that way is not judged.
    """
    try:
        with torch.device("meta"):
            built = timm.create_model(name, pretrained=False)
    except Exception:  # the real creation names the problem
        return
    asked = sum(tensor.numel() for tensor in built.state_dict().values())
    held = sum(tensor.numel() for tensor in tensors.values())
    if asked > SLACK * held + SLACK_ELEMENTS:
        hint = "take the config that belongs to the weights"
        raise UserError(f"model {model}: its {CONFIG} is of {asked:,} numbers and its weights hold {held:,}; {hint}")
