"""Custom models: `module:function`, a function of the user's that returns (torch module, preprocessing).

Such a module may hold other modules, tensors and arrays that are not registered in it, which eval(), to() and
state_dict() do not reach. They are found by following its attributes and methods: unregistered modules are refused,
unregistered tensors and arrays become part of the weight hash.
"""

import hashlib
import importlib
import os
import sys
import traceback
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn

from repcon.models.identity import weight_hash
from repcon.models.preprocessing import Preprocessing, three
from repcon.runtime.errors import UserError

_MAX_OBJECTS = 100_000
"""Objects that are looked at in one module."""
_MODULE_ATTRIBUTES = frozenset(vars(nn.Module()))
"""Attributes of every module: its registered parts and its hooks."""
_LEAF_TYPES = (torch.Tensor, np.ndarray, str, bytes, int, float, type, ModuleType, BuiltinFunctionType)


def is_module_function(model: str) -> bool:
    """Whether the string is a `module:function` and not a model's name, a folder or a package."""
    module, colon, function = model.partition(":")
    prefixes = ("package", "local-dir", "hf-hub", "hf_hub")
    named = function.isidentifier() and all(part.isidentifier() for part in module.split("."))
    return bool(colon) and module not in prefixes and named


def load_custom_model(model: str, who: str) -> tuple[nn.Module, Preprocessing]:
    """Call the function; it returns a module and a Preprocessing, or a mapping with size, mean and std.

    who: the model's name in errors, for example `teacher birds`. Raises UserError for a function that does not exist,
    fails, or returns something else.
    """
    module, _, function = model.partition(":")
    folder = os.getcwd()
    if folder not in sys.path:  # `python -m` puts it there, a console script does not.
        sys.path.insert(0, folder)
    try:
        returned = getattr(importlib.import_module(module), function)()
    except ModuleNotFoundError as error:
        raise UserError(f"{who}: {model}: {error}; is its folder on PYTHONPATH?") from error
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # the user's code may raise anything
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if Path(frame.filename).stem == module.rpartition(".")[2]]
        line = f" in line {own[-1].lineno} of {own[-1].filename}" if own else ""
        what = f"{type(error).__name__}: {str(error).strip()}"
        if isinstance(error, SystemExit):
            what = "it ends the program (sys.exit); keep what a script does under `if __name__ == '__main__':`"
        raise UserError(f"{who}: {model} failed{line}: {what}") from error
    if not (isinstance(returned, tuple) and len(returned) == 2 and isinstance(returned[0], nn.Module)):
        raise UserError(f"{who}: {model} must return (torch module, preprocessing)")
    return returned[0], _preprocessing(returned[1], f"{who}: {model}")


def _preprocessing(given: Any, where: str) -> Preprocessing:
    if isinstance(given, Preprocessing):
        return given
    try:
        size = given["size"]
        return Preprocessing(
            size=int(size) if size == int(size) else size, mean=three(given["mean"]), std=three(given["std"])
        )
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    except (KeyError, TypeError, ValueError) as error:
        expected = "a mapping with size, and mean and std of three numbers each"
        raise UserError(f"{where}: its preprocessing must be {expected}") from error


def full_weight_hash(module: nn.Module) -> str:
    """`weight_hash`, combined with the hash of unregistered tensors and arrays where there are any."""
    registered, unregistered = weight_hash(module), unregistered_hash(module)
    return hashlib.sha256(f"{registered} {unregistered}".encode()).hexdigest() if unregistered else registered


def check_registered(module: nn.Module, who: str) -> None:
    """Raises UserError where the module uses another one that is not registered in it, as those in a plain list."""
    registered = {id(part) for part in module.modules()}
    for path, part in _reachable_parts(module):
        if isinstance(part, nn.Module) and id(part) not in registered:
            what = "is not registered: eval(), to() and the weights' hash do not reach it"
            remedy = "put such parts into nn.ModuleList or nn.ModuleDict, or make them attributes"
            raise UserError(f"{who}: {path} ({type(part).__name__}) {what}; {remedy}")


def unregistered_hash(module: nn.Module) -> str:
    """sha256 (hex) over tensors and arrays that the module holds outside its state; empty if it holds none."""
    registered = {id(tensor) for tensor in (*module.parameters(), *module.buffers())}
    digest, found = hashlib.sha256(), False
    for path, part in _reachable_parts(module):
        if isinstance(part, torch.Tensor) and id(part) not in registered:
            values = part.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        elif isinstance(part, np.ndarray) and part.dtype != object:
            values = part.tobytes()
        else:
            continue
        digest.update(f"{path}\0{part.dtype}\0{tuple(part.shape)}\0".encode() + values)
        found = True
    return digest.hexdigest() if found else ""


def _reachable_parts(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """(path, part) for all modules, tensors and arrays that the module's attributes and methods refer to."""
    seen: set[int] = set()
    stack: list[tuple[str, Any]] = [("module", module)]
    while stack and len(seen) < _MAX_OBJECTS:
        path, value = stack.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, nn.Module | torch.Tensor | np.ndarray):
            yield path, value
        stack += [(f"{path}{suffix}", inner) for suffix, inner in _references(value)][::-1]


def _references(value: Any) -> list[tuple[str, Any]]:
    """(path suffix, object) for everything that an object refers to."""
    if isinstance(value, _LEAF_TYPES):
        return []
    if isinstance(value, Mapping):
        return [(f"[{key!r}]", inner) for key, inner in value.items()]
    if isinstance(value, list | tuple | set | frozenset):
        return [(f"[{index}]", inner) for index, inner in enumerate(value)]
    if isinstance(value, MethodType):
        return [(".__self__", value.__self__)]
    if isinstance(value, partial):
        return [(".func", value.func), (".args", value.args), (".keywords", value.keywords)]
    if isinstance(value, FunctionType):
        return _function_references(value)
    if isinstance(value, nn.Module):
        attributes = [(f".{name}", inner) for name, inner in vars(value).items() if name not in _MODULE_ATTRIBUTES]
        children = [(f".{name}", child) for name, child in value.named_children()]
        methods = [method for method in vars(type(value)).values() if isinstance(method, FunctionType)]
        return children + attributes + [found for method in methods for found in _function_references(method)]
    if type(value).__module__.partition(".")[0] in ("torch", "builtins", "numpy"):
        return []
    return [(f".{name}", inner) for name, inner in getattr(value, "__dict__", {}).items()]


def _function_references(function: FunctionType) -> list[tuple[str, Any]]:
    """Modules, tensors and arrays among the globals that a function names, and everything in its closure."""
    named = [(f" > {name}", function.__globals__.get(name)) for name in function.__code__.co_names]
    found = [(path, value) for path, value in named if isinstance(value, nn.Module | torch.Tensor | np.ndarray)]
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            found.append((f" > {name}", cell.cell_contents))
        except ValueError:  # not assigned yet
            continue
    return found
