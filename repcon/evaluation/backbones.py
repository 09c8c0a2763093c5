"""The backbones of an evaluation: their names, the models behind them, and what those are known to have seen."""

from collections.abc import Mapping
from pathlib import Path

from repcon.config import EvaluateConfig, split_name
from repcon.evaluation.data_sets import Split
from repcon.images.pack import ImagePack
from repcon.models.custom import is_module_function
from repcon.models.saved_model import CONFIG, model_folder, saved_class_names, saved_extra
from repcon.runtime.console import warn
from repcon.runtime.errors import UserError
from repcon.runtime.text import abbreviate, printable

JOIN = " + "
"""Between backbones whose features are concatenated, as an upper bound for one backbone in their place."""


def parse_backbones(config: EvaluateConfig) -> dict[str, str]:
    """The `NAME=BACKBONE` entries as {name: backbone}; an entry without a name is named by the end of its path.

    A backbone is what `extract` takes, or several of them joined by ` + `. Raises UserError for a name that is there
    twice, a `baseline` or `student` that is no name, a folder without a model, and for what cannot be fine-tuned.
    """
    backbones: dict[str, str] = {}
    for entry in config.backbones:
        name, model = split_name(entry)
        name = printable(name)  # it goes into tables, plots and the names of arrays
        if name in backbones:
            raise UserError(f"backbones: two are called {name!r}; give each a name of its own, `name=backbone`")
        backbones[name] = JOIN.join(resolve_model(part) for part in model.split(JOIN))
    if not backbones:
        raise UserError("backbones: none given; name at least one, for example `generalist=package:efficientnet_lite0`")
    for field, name in (("baseline", config.baseline), ("student", config.student)):
        if name and name not in backbones:
            raise UserError(f"{field}: no backbone is called {name!r}; there are {', '.join(backbones)}")
    for name, model in backbones.items() if "finetune" in config.metrics else ():
        if JOIN in model:
            raise UserError(
                f"metrics: fine-tuning takes one backbone, and {name} is several; leave `finetune` or it out"
            )
        if is_module_function(model):
            raise UserError(f"metrics: fine-tuning takes models of timm, and {name} is not; leave `finetune` or it out")
    return backbones


def resolve_model(model: str) -> str:
    """The folder inside a run's output folder that holds the model; a model that is no such folder as it is."""
    folder = Path(model)
    if not folder.is_dir() or (folder / CONFIG).is_file():
        return model
    if (inner := model_folder(folder)) == folder:
        raise UserError(
            f"{model}: holds no model (no config.json); name the output folder of `repcon train` or `teach`"
        )
    return str(inner)


def warn_of_seen_images(backbones: Mapping[str, str], pack: ImagePack, split: Split) -> None:
    """Warn where a backbone was taught classes of this pack, or distilled on its images, as its folder says."""
    for name, model in backbones.items():
        taught: set[str] = set()
        for part in model.split(JOIN):
            saved = Path(part, CONFIG).is_file() and saved_extra(part)
            if saved and saved.get("data_fingerprint") == pack.fingerprint:
                taught |= set(saved_class_names(part)) & set(split.classes)
            if saved and saved.get("proxy_fingerprint") == pack.fingerprint:
                warn(f"{name} was distilled on the images of this very pack: what it reaches is no transfer")
        if taught:
            names = abbreviate(sorted(taught))
            what = f"{len(taught)} of the {len(split.classes)} classes ({names}) were taught to {name} on these images"
            warn(f"{what}; what it reaches there is no transfer")
