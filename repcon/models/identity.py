"""Identify a model: architecture, weight hash, class names."""

import hashlib
import struct
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from repcon.models.timm_import import timm
from repcon.runtime.console import warn
from repcon.runtime.errors import UserError


def architecture_of(model: nn.Module) -> str:
    """timm's name of the architecture, or the class of a module that is not timm's."""
    config = getattr(model, "pretrained_cfg", None) or {}
    kind = type(model)
    return config.get("architecture") or f"{kind.__module__}.{kind.__qualname__}"


def weight_hash(model: nn.Module) -> str:
    """sha256 (hex) over the names, dtypes, shapes and bytes of the state's tensors, in order of their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        plain = tensor.detach().cpu().contiguous()
        head = f"{name}\0{str(plain.dtype).removeprefix('torch.')}\0".encode()
        digest.update(struct.pack(f"<I{plain.ndim + 1}q", len(head), plain.ndim, *plain.shape) + head)
        digest.update(plain.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def class_names_of(model: nn.Module) -> tuple[str, ...]:
    """The classifier's class names: those saved with it, ImageNet's for timm's 1,000 classes, else none.

    Raises UserError where names are saved that cannot be those of its classes.
    """
    config = getattr(model, "pretrained_cfg", None) or {}
    count = getattr(model, "num_classes", 0)
    names, source = config.get("label_names"), config.get("source")
    if names and count:
        return parse_class_names(names, count, f"model {config.get('file') or architecture_of(model)}: label_names")
    # Weights of a folder or of anyone's repository may have any other thousand classes.
    foreign = source == "local-dir" or (source == "hf-hub" and not str(config.get("hf_hub_id")).startswith("timm/"))
    if count == config.get("num_classes") == 1000 and not foreign:
        return tuple(timm.data.imagenet_info.ImageNetInfo().label_descriptions())
    return ()


def parse_class_names(names: Any, count: int, where: str) -> tuple[str, ...]:
    """The names of `count` classes in order of their ids, from a list, {id: name} or {name: id}.

    Ids that {id: name} lacks are named by their id. Raises UserError for another number of names or other ids; `where`
    begins the message.
    """
    given = names.values() if isinstance(names, Mapping) else names if isinstance(names, list | tuple) else ()
    if odd := [name for name in given if isinstance(name, list | tuple | dict)]:
        raise UserError(f"{where}: {str(odd[0])[:40]!r} is no name; give one text for each class")
    if isinstance(names, Mapping):
        inverse = {held: name for name, held in names.items()}
        # Names may be numbers themselves. In JSON all keys are text, so values that are not are the ids of {name: id}.
        values_are_ids = all(type(held) is int for held in names.values()) and all(
            isinstance(key, str) for key in names
        )
        by_id = _by_id(inverse) if values_are_ids else None
        by_id = by_id or _by_id(names) or _by_id(inverse)
        if by_id is None or len(by_id) != len(names) or not all(0 <= number < count for number in by_id):
            raise UserError(f"{where}: must map the ids 0 to {count - 1} to names, each id once; correct it")
        if missing := count - len(by_id):
            warn(f"{where}: {missing} of {count} classes have no name; they are called by their number")
        return _warn_of_duplicates(tuple(str(by_id.get(number, number)) for number in range(count)), where)
    if isinstance(names, str) or not isinstance(names, Iterable):
        raise UserError(f"{where}: must be a list of {count} names, not {str(names)[:40]!r}; correct it")
    listed = tuple(str(name) for name in names)
    if len(listed) != count:
        remedy = "name each class once, in order of the ids, or leave the names out"
        raise UserError(f"{where}: {len(listed)} names for the {count} classes of the classifier; {remedy}")
    return _warn_of_duplicates(listed, where)


def _warn_of_duplicates(names: tuple[str, ...], where: str) -> tuple[str, ...]:
    """The names, with a warning where several classes have one name: images cannot be matched to those by name."""
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        warn(f"{where}: {len(twice)} names stand for several classes each, {', '.join(map(repr, twice[:3]))} first")
    return names


def _by_id(names: Mapping[Any, Any]) -> dict[int, Any] | None:
    """The mapping with whole numbers as keys; None where they are not."""
    try:
        return {int(str(number)): name for number, name in names.items()}
    except ValueError:
        return None
