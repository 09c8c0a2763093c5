"""Read weight files, and load them strictly: all tensors of file and model must match."""

import argparse
import os
import pickle
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from repcon.models.timm_import import timm
from repcon.runtime.console import warn
from repcon.runtime.device import out_of_memory
from repcon.runtime.errors import UserError, first_line

Tensors = dict[str, torch.Tensor]
KNOWN_NAMES = (
    "model.safetensors", "pytorch_model.bin", "pytorch_model.pth", "model.pth", "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin", "open_clip_pytorch_model.pth",
)  # fmt: skip
"""Names of weight files that libraries write, in timm's order of preference."""
SUFFIXES = (".safetensors", ".pth", ".pth.tar", ".pt", ".bin")
WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")
"""Entries of a training checkpoint that hold the weights; averaged weights first, as in timm."""
PARALLEL_PREFIXES = ("_orig_mod.", "module.", "_orig_mod.")
NOT_THE_BACKBONES = ("heads.safetensors",)
"""Weight files in a student's folder that are not the backbone's."""
_MAX_NAMES = 4
_lock = threading.Lock()


def find_weights(folder: Path, model: str) -> Path:
    """The weight file in a model's folder. Raises UserError where there is none, or more than one."""
    known = [name for name in KNOWN_NAMES if os.path.lexists(folder / name)]
    if len(known) > 1:
        warn(f"model {model}: of its weight files {_join_names(known)} the first is taken, as timm does")
    if known:
        return folder / known[0]
    files = (path for path in folder.iterdir() if path.name not in NOT_THE_BACKBONES)
    found = sorted(path for path in files if path.name.endswith(SUFFIXES))
    if not found:
        raise UserError(f"model {model}: no weight file ({KNOWN_NAMES[0]}) beside its config.json; copy it there")
    if len(found) > 1:
        names = _join_names([path.name for path in found])
        hint = f"name the one that is meant {KNOWN_NAMES[0]} or {KNOWN_NAMES[3]}, or move the others away"
        raise UserError(f"model {model}: several weight files ({names}), and config.json does not say which; {hint}")
    return found[0]


def read_weights(path: Path, model: str) -> Tensors:
    """Read a weight file's tensors by name, without the prefixes of DistributedDataParallel and torch.compile.

    No code in the file is executed. Raises UserError for pointers, damaged files, objects other than tensors, and
    tensors with NaN or infinity.
    """
    _refuse_placeholder(path, model)
    content: Any = load_safetensors(path, model) if path.suffix == ".safetensors" else _load_pickle(path, model)
    wrapper = next((name for name in WRAPPERS if isinstance(content, dict) and isinstance(content.get(name), dict)), "")
    if wrapper in WRAPPERS[:2]:
        warn(f"model {model}: {path.name} is a training checkpoint; its averaged weights ({wrapper}) are taken")
    tensors = content[wrapper] if wrapper else content
    others = [] if isinstance(tensors, dict) else [type(tensors).__name__]
    others = others or [str(name) for name, value in tensors.items() if not isinstance(value, torch.Tensor)]
    if others or not tensors:
        what = f"holds {_join_names(others)} where tensors by name are expected" if others else "holds no tensors"
        raise UserError(f"model {model}: {path} {what}; save the model's state_dict() alone")
    require_finite(tensors, f"model {model}: {path}")
    stripped = {_strip_wrapper_prefixes(str(name)): value for name, value in tensors.items()}
    if len(stripped) < len(tensors):
        prefixed = [name for name in tensors if _strip_wrapper_prefixes(name) != name]
        twice = [name for name in prefixed if _strip_wrapper_prefixes(name) in tensors] or [*tensors]
        what = f"holds two tensors for one part of the model ({_join_names(twice)} and the same without prefix)"
        raise UserError(f"model {model}: {path} {what}; save the model's state_dict() alone")
    return stripped


def load_safetensors(path: Path, model: str) -> Tensors:
    """The tensors of a safetensors file. Raises UserError naming it where it is damaged."""
    _refuse_placeholder(path, model)
    try:
        return load_file(path)
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(f"model {model}: {path} {_damage(error)}") from error


def require_finite(tensors: Mapping[str, torch.Tensor], where: str) -> None:
    """Raises UserError naming the first tensor with NaN or infinite values; `where` begins the message."""
    for name, tensor in tensors.items():
        wide = tensor.float() if tensor.is_floating_point() and tensor.element_size() == 1 else tensor  # 8 bits
        if tensor.is_floating_point() and not bool(torch.isfinite(wide).all()):
            remedy = "take another checkpoint: its training diverged, or the file was converted to too small a type"
            raise UserError(f"{where}: {name} has values that are not finite (NaN or infinite); {remedy}")


def _refuse_placeholder(path: Path, model: str) -> None:
    """Raises UserError for files that stand for weights that were not downloaded: links, pointers, web pages."""
    if not path.is_file():
        what = "a link to a file that is not here" if path.is_symlink() else "no file"
        raise UserError(f"model {model}: {path} is {what}; copy the weights themselves (git annex get, or cp -L)")
    with path.open("rb") as file:
        head = file.read(200).lstrip()
    if not head:
        raise UserError(f"model {model}: {path} is empty; copy the weights again")
    if head.startswith(b"version https://git-lfs"):
        raise UserError(f"model {model}: {path} is a Git LFS pointer, not the weights; run `git lfs pull` there")
    if head.startswith((b"/annex/objects/", b"../.git/annex", b".git/annex", b"outs:")):
        raise UserError(f"model {model}: {path} is a pointer to the weights; fetch them (git annex get, dvc pull)")
    if head[:1] == b"<":
        raise UserError(f"model {model}: {path} is a web page, not weights; download the file itself again")


def _load_pickle(path: Path, model: str) -> Any:
    """The content of a torch.save file with tensors and plain values only."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # timm's training checkpoints hold their options
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "weights_only" not in str(error).lower():
            raise UserError(f"model {model}: {path} {_damage(error)}") from error
        remedy = "save model.state_dict() with safetensors.torch.save_file, or load it in a `module:function` of yours"
        what = "holds Python objects beside tensors, which are not loaded since that would run code"
        raise UserError(f"model {model}: {path} {what}; {remedy}") from error
    except Exception as error:  # a damaged archive surfaces as zip, pickle, key or runtime errors
        if out_of_memory(error):
            raise
        if "TorchScript" in str(error):
            remedy = "name a `module:function` that calls torch.jit.load"
            raise UserError(f"model {model}: {path} is a TorchScript program, not weights; {remedy}") from error
        raise UserError(f"model {model}: {path} {_damage(error)}") from error


def _damage(error: BaseException) -> str:
    return f"cannot be read as weights ({first_line(error)[:160]}); copy the file again"


def _strip_wrapper_prefixes(name: str) -> str:
    for prefix in PARALLEL_PREFIXES:
        name = name.removeprefix(prefix)
    return name


@contextmanager
def checked_loading(model: str, tensors: Tensors | None, *, registered: bool) -> Iterator[None]:
    """Within the block, timm models that are created with `pretrained=True` are loaded strictly.

    tensors: the weights in place of those that timm would read or download; None leaves that to timm. registered: the
    weights are timm's own, which may hold tensors that a variant of the model does not have.

    timm by itself drops a classifier whose number of classes differs from the config's, and leaves a random one. Raises
    UserError naming the tensors that are missing, unexpected or of another shape.
    """
    plain, owner = timm.models._builder.load_pretrained, threading.get_ident()
    filled = False

    def load_pretrained(network: nn.Module, pretrained_cfg: Any = None, **options: Any) -> None:
        nonlocal filled
        if threading.get_ident() != owner:  # another thread creates a model
            return plain(network, pretrained_cfg=pretrained_cfg, **options)
        filled = True
        config = dict(pretrained_cfg or {})
        if tensors is not None:
            config |= {"source": "", "state_dict": dict(tensors), "custom_load": False}
        network.load_state_dict = partial(_load_strictly, network, model, tensors or {}, registered)
        try:
            plain(network, pretrained_cfg=config, **options)
        finally:
            del network.load_state_dict

    with _lock:  # models may be created in several threads, and the function is replaced for all of them
        timm.models._builder.load_pretrained = load_pretrained
        try:
            yield
        finally:
            timm.models._builder.load_pretrained = plain
    if not filled:
        raise UserError(f"model {model}: its architecture loads no weights; name another, or set pretrained = false")


def _load_strictly(
    network: nn.Module, model: str, tensors: Tensors, registered: bool,
    state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False,
) -> Any:  # fmt: skip
    """The `load_state_dict` of a network that is created within `checked_loading`."""
    own = network.state_dict()
    integers = any(
        name in own and _is_integer(value) and not _is_integer(own[name]) for name, value in state_dict.items()
    )
    try:
        found = type(network).load_state_dict(network, state_dict, strict=False, assign=assign)
    except RuntimeError as error:  # of other shapes
        raise _mismatch_error(model, state_dict, own, tensors, [*state_dict], registered) from error
    missing = [name for name in found.missing_keys if not name.endswith("num_batches_tracked")]
    if missing or integers or (found.unexpected_keys and not registered):
        raise _mismatch_error(model, state_dict, own, tensors, found.unexpected_keys, registered)
    return found


def _mismatch_error(
    model: str, state: Mapping[str, Any], own: Tensors, tensors: Tensors, left: list[str], registered: bool
) -> UserError:
    """The error for a state that differs from the model's `own` in names or shapes. left: names the model lacks."""
    missing = [name for name in own if name not in state and not name.endswith("num_batches_tracked")]
    unexpected = [] if registered else [name for name in left if name not in own]
    wrong = [name for name in own if name in state and _shape(own[name]) != _shape(state[name])]
    given = {**tensors, **state}
    wrong += [name for name in missing if name in tensors]  # a classifier that timm has dropped
    absent = [name for name in missing if name not in given]
    parts = []
    if wrong and all(_shape(own[name]) == _shape(given[name]) for name in wrong):
        parts.append(f"config.json gives several numbers of classes, of which {_join_names(wrong)} can be only one's")
    elif wrong:
        pairs = [f"{name} is {_shape(given[name])} in the file, {_shape(own[name])} in the model" for name in wrong]
        parts.append(_join_names(pairs))
    if absent:
        parts.append(f"missing in the file: {_join_names(absent)}")
    if unexpected:
        parts.append(f"not in the model: {_join_names(unexpected)}")
    hint = "take the file that belongs to this config.json"
    prefix = _common_prefix(unexpected)
    classifier = wrong and all(own[name].ndim and own[name].shape[1:] == given[name].shape[1:] for name in wrong)
    if prefix and any(name.removeprefix(prefix) in own for name in unexpected):
        hint = f"strip the prefix {prefix} from the names in the file"
    elif classifier and not unexpected and not absent:
        classes = given[wrong[0]].shape[0]
        hint = f"set num_classes to {classes} wherever config.json has it (model_args too), or take the right file"
    elif absent and not unexpected and not wrong:
        hint = "take the file that has all; for a backbone without classifier set num_classes to 0 in config.json"
    return UserError(f"model {model}: its weights do not fit its architecture; {'; '.join(parts)}; {hint}")


def _common_prefix(names: list[str]) -> str:
    """The longest common prefix of all names that ends with a dot."""
    if not names:
        return ""
    first, last = min(names), max(names)
    same = next((place for place, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    return first[: first[:same].rfind(".") + 1]


def _is_integer(tensor: torch.Tensor) -> bool:
    """Whether the dtype is an integer, as of quantised weights."""
    return not (tensor.is_floating_point() or tensor.is_complex())


def _shape(tensor: torch.Tensor) -> str:
    size = " x ".join(map(str, tensor.shape)) or "a number"
    return f"{size} of integers" if _is_integer(tensor) else size


def _join_names(names: list[str]) -> str:
    rest = len(names) - _MAX_NAMES
    return ", ".join(names[:_MAX_NAMES]) + (f" and {rest} more" if rest > 0 else "")
