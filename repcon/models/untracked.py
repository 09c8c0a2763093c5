"""Find the parts of a module that torch does not know of: eval(), to() and state_dict() pass them by."""

import hashlib
from collections.abc import Iterator, Mapping
from functools import partial
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn

from repcon.runtime.errors import UserError

_MOST = 100_000
"""Objects that are looked at in one module."""
_OWN_DICTS = frozenset(vars(nn.Module()))
"""What every module holds: its registered parts, and its hooks."""


def require_registered(module: nn.Module, who: str) -> None:
    """Raises UserError where the module uses another one that is not registered in it, as those in a plain list."""
    registered = {id(part) for part in module.modules()}
    for path, part in _parts(module):
        if isinstance(part, nn.Module) and id(part) not in registered:
            what = (
                f"{path} ({type(part).__name__}) is not registered: eval(), to() and the weights' hash do not reach it"
            )
            raise UserError(
                f"{who}: {what}; put such parts into nn.ModuleList or nn.ModuleDict, or make them attributes"
            )


def untracked_hash(module: nn.Module) -> str:
    """sha256 (hex) over tensors and arrays that the module holds outside its state; empty where it holds none."""
    state = {id(tensor) for tensor in (*module.parameters(), *module.buffers())}
    digest, found = hashlib.sha256(), False
    for path, part in _parts(module):
        if isinstance(part, torch.Tensor) and id(part) not in state:
            values = part.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        elif isinstance(part, np.ndarray) and part.dtype != object:
            values = part.tobytes()
        else:
            continue
        digest.update(f"{path}\0{part.dtype}\0{tuple(part.shape)}\0".encode() + values)
        found = True
    return digest.hexdigest() if found else ""


def _parts(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Modules, tensors and arrays that the module's attributes and its methods refer to, each with its path."""
    seen: set[int] = set()
    waiting: list[tuple[str, Any]] = [("module", module)]
    while waiting and len(seen) < _MOST:
        path, held = waiting.pop()
        if id(held) in seen:
            continue
        seen.add(id(held))
        if isinstance(held, nn.Module | torch.Tensor | np.ndarray):
            yield path, held
        waiting += [(f"{path}{name}", inner) for name, inner in _inside(held)][::-1]


def _inside(held: Any) -> list[tuple[str, Any]]:
    """What an object refers to, with the text that follows its path."""
    if isinstance(
        held, torch.Tensor | np.ndarray | str | bytes | int | float | type | ModuleType | BuiltinFunctionType
    ):
        return []
    if isinstance(held, Mapping):
        return [(f"[{key!r}]", value) for key, value in held.items()]
    if isinstance(held, list | tuple | set | frozenset):
        return [(f"[{place}]", value) for place, value in enumerate(held)]
    if isinstance(held, MethodType):
        return [(".__self__", held.__self__)]
    if isinstance(held, partial):
        return [(".func", held.func), (".args", held.args), (".keywords", held.keywords)]
    if isinstance(held, FunctionType):
        return _of_function(held)
    if isinstance(held, nn.Module):
        own = [(f".{name}", value) for name, value in vars(held).items() if name not in _OWN_DICTS]
        children = [(f".{name}", child) for name, child in held.named_children()]
        methods = [value for value in vars(type(held)).values() if isinstance(value, FunctionType)]
        return children + (own + [found for method in methods for found in _of_function(method)])
    if type(held).__module__.partition(".")[0] in ("torch", "builtins", "numpy"):
        return []
    return [(f".{name}", value) for name, value in getattr(held, "__dict__", {}).items()]


def _of_function(function: FunctionType) -> list[tuple[str, Any]]:
    """Modules and tensors that a function names in its module, and all that it closes over."""
    named = [(f" > {name}", function.__globals__.get(name)) for name in function.__code__.co_names]
    found = [(path, value) for path, value in named if isinstance(value, nn.Module | torch.Tensor | np.ndarray)]
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            found.append((f" > {name}", cell.cell_contents))
        except ValueError:  # not bound yet
            continue
    return found
