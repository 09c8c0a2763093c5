"""Models that are not timm's: `module:function`, a function of the user's that makes one and says what it takes."""

import hashlib
import importlib
import os
import sys
import traceback
from pathlib import Path
from typing import Any

from torch import nn

from repcon.models.identity import weight_hash
from repcon.models.preprocessing import Preprocessing, three
from repcon.models.untracked import untracked_hash
from repcon.runtime.errors import UserError


def is_factory(model: str) -> bool:
    """Whether the string names `module:function` rather than a model, a folder or a package."""
    module, colon, function = model.partition(":")
    prefixes = ("package", "local-dir", "hf-hub", "hf_hub")
    named = function.isidentifier() and all(part.isidentifier() for part in module.split("."))
    return bool(colon) and module not in prefixes and named


def make(model: str, who: str) -> tuple[nn.Module, Preprocessing]:
    """Calls the function; it gives a module and a Preprocessing, or a mapping with size, mean and std.

    who: what errors call the model, for example `teacher birds`. Raises UserError for a function that is not there,
    fails, or gives something else.
    """
    place, _, function = model.partition(":")
    here = os.getcwd()
    if here not in sys.path:  # `python -m` has it, a console script has not.
        sys.path.insert(0, here)
    try:
        made = getattr(importlib.import_module(place), function)()
    except ModuleNotFoundError as error:
        raise UserError(f"{who}: {model}: {error}; is its folder on PYTHONPATH?") from error
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # the user's code may raise anything
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if Path(frame.filename).stem == place.rpartition(".")[2]]
        line = f" in line {own[-1].lineno} of {own[-1].filename}" if own else ""
        what = f"{type(error).__name__}: {str(error).strip()}"
        if isinstance(error, SystemExit):
            what = "it ends the program (sys.exit); keep what a script does under `if __name__ == '__main__':`"
        raise UserError(f"{who}: {model} failed{line}: {what}") from error
    if not (isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], nn.Module)):
        raise UserError(f"{who}: {model} must return (torch module, preprocessing)")
    return made[0], _preprocessing(made[1], f"{who}: {model}")


def identity(module: nn.Module) -> str:
    """The hash of a module's weights, and of tensors that it holds outside its state where there are any."""
    weights, others = weight_hash(module), untracked_hash(module)
    return hashlib.sha256(f"{weights} {others}".encode()).hexdigest() if others else weights


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
        wanted = "a mapping with size, and mean and std of three numbers each"
        raise UserError(f"{where}: its preprocessing must be {wanted}") from error
