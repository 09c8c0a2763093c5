"""Model folders in timm's format, with repcon's additions to config.json."""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save as to_bytes
from torch import nn

from repcon.models.identity import parse_class_names
from repcon.models.preprocessing import Preprocessing
from repcon.models.timm_import import timm
from repcon.runtime.atomic_files import write_atomic
from repcon.runtime.errors import UserError
from repcon.runtime.untrusted import UnreadableError, read_json

CONFIG, WEIGHTS = "config.json", "model.safetensors"


def local_folder(model: str) -> Path:
    """The path of a model that is named as a folder."""
    return Path(model.removeprefix("local-dir:")).expanduser()


def model_folder(folder: Path) -> Path:
    """The student's folder inside the output folder of `repcon train`; any other folder itself."""
    inner = folder / "student"
    return inner if (inner / CONFIG).is_file() and not (folder / CONFIG).is_file() else folder


def save_model(
    model: nn.Module,
    folder: str | Path,
    *,
    classes: Sequence[str],
    preprocessing: Preprocessing,
    extra: Mapping[str, Any],
) -> None:
    """Write model.safetensors and config.json, which `timm.create_model("local-dir:FOLDER", pretrained=True)` opens.

    extra: JSON-able, stored under `repcon` in config.json. Both files are replaced atomically.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    size = (3, preprocessing.size, preprocessing.size)
    data = {"input_size": size, "mean": preprocessing.mean, "std": preprocessing.std}
    model_config: dict[str, Any] = {"repcon": dict(extra)}
    if classes:
        model_config["label_names"] = list(classes)
    # clone: safetensors refuses tensors that share memory.
    state = {k: v.detach().cpu().contiguous().clone() for k, v in model.state_dict().items()}
    # safetensors' own `save_file` makes files that only their owner may read.
    write_atomic(folder / WEIGHTS, to_bytes(state, metadata={"format": "pt"}))
    with tempfile.TemporaryDirectory() as temporary:
        config = Path(temporary, CONFIG)
        timm.models._hub.save_config_for_hf(model, str(config), model_config=model_config, data_config=data)
        write_atomic(folder / CONFIG, config.read_bytes())


def saved_extra(folder: str | Path) -> dict[str, Any]:
    """The `extra` of `save_model`; empty for a folder that repcon did not write."""
    extra = saved_config(folder).get("repcon")
    return extra if isinstance(extra, dict) else {}


def saved_class_names(folder: str | Path) -> tuple[str, ...]:
    """The `classes` of `save_model`."""
    names = saved_config(folder).get("label_names") or ()
    return parse_class_names(names, len(names), f"{folder}/{CONFIG}: label_names")


def saved_config(folder: str | Path) -> dict[str, Any]:
    """config.json as a dict. Raises UserError where it cannot be read."""
    try:
        saved = read_json(Path(folder, CONFIG))
    except UnreadableError as error:
        raise UserError(f"{folder}/{CONFIG}: cannot be read ({error})") from error
    if not isinstance(saved, dict):
        raise UserError(f"{folder}/{CONFIG}: holds no JSON object; name a folder that timm or repcon wrote")
    return saved
