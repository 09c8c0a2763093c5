"""Teachers: classifiers in evaluation mode whose answers are stored, with what is needed to know them again."""

from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import nn

from repcon.config import TeacherConfig
from repcon.labels.store import TeacherMetadata
from repcon.models import custom
from repcon.models.answers import asked, require_logits_of
from repcon.models.factory import PACKAGE, create_model, licence_of
from repcon.models.identity import architecture_of, class_names_of, parse_class_names
from repcon.models.preprocessing import LARGEST_SIDE, Preprocessing, normalise, preprocessing_of
from repcon.models.untracked import require_registered
from repcon.runtime.device import DTYPES, require_compiler
from repcon.runtime.errors import UserError

TRUSTED_SIDE = 1024
"""Pixels of an input's side up to which a store's word is enough for `verify`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Teacher:
    """A classifier on its device, in evaluation mode and in its precision."""

    name: str
    module: nn.Module
    preprocessing: Preprocessing
    metadata: TeacherMetadata

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of its weights and inputs."""
        return DTYPES[self.metadata.precision]

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, S, S) uint8 pixels to (B, C) float32 logits."""
        return self.answer(normalise(images, self.preprocessing, self.dtype))

    @torch.inference_mode()
    def answer(self, inputs: torch.Tensor) -> torch.Tensor:
        """(B, 3, S, S) normalised inputs of `dtype` to (B, C) float32 logits.

        Raises UserError naming the teacher where its module fails, or gives anything else.
        """
        who = f"teacher {self.name}"
        shape = (len(inputs), self.metadata.num_classes)
        return require_logits_of(asked(self.module, inputs, who), shape, who).float()


def load(config: TeacherConfig, device: str | torch.device) -> Teacher:
    """The teacher of a recipe. Raises UserError for weights that are missing or a model that is no classifier."""
    if custom.is_factory(config.model):
        module, preprocessing = custom.make(config.model, f"teacher {config.name}")
        if config.size not in (0, preprocessing.size):
            what = f"size {config.size}, but {config.model} says {preprocessing.size}"
            raise UserError(f"teacher {config.name}: {what}")
        require_registered(module, f"teacher {config.name}: {config.model}")
        classes, licence = (), ""
    else:
        module = create_model(config.model, size=config.size)
        preprocessing = preprocessing_of(module, config.size)
        classes = class_names_of(module)
        licence = licence_of(module, config.model)
    count = _count_classes(config, module, preprocessing)
    own = getattr(module, "class_names", None) if custom.is_factory(config.model) else None
    if own is not None and (not hasattr(own, "__len__") or len(own)):
        classes = parse_class_names(own, count, f"teacher {config.name}: {config.model}: class_names")
    metadata = TeacherMetadata(
        name=config.name,
        model=config.model,
        architecture=architecture_of(module),
        weight_hash=custom.identity(module),
        preprocessing=asdict(preprocessing) | {"mean": list(preprocessing.mean), "std": list(preprocessing.std)},
        num_classes=count,
        classes=classes,
        precision=config.precision,
        versions=_versions(),
        licence=config.licence or licence,
    )
    dtype = DTYPES[config.precision]
    module = module.to(device, dtype, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue, reportArgumentType]
    if config.compile:
        require_compiler(device)
        # On a CPU weights become constants: batch norms go into convolutions, which compiling alone leaves apart.
        module.compile(options={"freezing": torch.device(device).type == "cpu"})
    return Teacher(name=config.name, module=module, preprocessing=preprocessing, metadata=metadata)


def load_from_metadata(metadata: TeacherMetadata, device: str | torch.device, *, model: str = "") -> Teacher:
    """Loads the teacher that a store names; refuses other weights, preprocessing or classes than it was made with.

    model: where the teacher lies now, in place of the metadata's word for it, see `require_named`.
    """
    config = TeacherConfig(
        name=metadata.name,
        model=model or metadata.model,
        size=require_named(metadata, model),
        precision=metadata.precision,  # pyright: ignore[reportArgumentType]
        licence=metadata.licence,
    )
    try:
        teacher = load(config, device)
    except UserError as error:
        if model:
            raise
        hint = f"if it lies elsewhere here, name that: --models {metadata.name}=MODEL"
        raise UserError(f"{error}; {hint}") from error
    require_same(metadata, teacher.metadata, config.model)
    return teacher


def require_same(metadata: TeacherMetadata, found: TeacherMetadata, model: str) -> None:
    """Raises UserError naming the first field in which `model` is not the teacher that made the labels."""
    for field in ("architecture", "weight_hash", "num_classes", "classes", "preprocessing"):
        held, given = getattr(metadata, field), getattr(found, field)
        if held != given:
            what = f"{field} is {str(given)[:80]} now and {str(held)[:80]} in the store"
            raise UserError(f"teacher {metadata.name}: {model} is not the model that made the labels: {what}")


def require_named(metadata: TeacherMetadata, model: str = "") -> int:
    """The input side of a store's teacher. Raises UserError for what a store's own word is not enough for.

    That is to run code, to download a model, and to take inputs of a side that nobody labels with; `model` is what
    the user says instead, and may be all of it.
    """
    who = f"teacher {metadata.name}"
    if custom.is_factory(metadata.model) and not model:
        hint = f"a store's own word is not enough to run code; verify runs it with --models {metadata.name}=…"
        raise UserError(f"{who}: its model {metadata.model} is a function; {hint}")
    place = metadata.model.removeprefix("local-dir:")
    here = place.startswith((PACKAGE, ".", "/", "~")) or ("/" in place and ":" not in place)
    if not (model or here or Path(place).is_dir()):
        hint = f"a store's own word is not enough to download it; --models {metadata.name}={metadata.model} does"
        raise UserError(f"{who}: its model {metadata.model} is neither a folder here nor an installed package; {hint}")
    if metadata.precision not in DTYPES:
        raise UserError(
            f"{who}: the store gives its precision as {metadata.precision!r}; there are {', '.join(DTYPES)}"
        )
    if "size" not in metadata.preprocessing:
        hint = "so its crops cannot be made again; verify without --pack"
        raise UserError(f"{who}: its preprocessing names no input size, {hint}")
    side, most = metadata.preprocessing["size"], LARGEST_SIDE if model else TRUSTED_SIDE
    if type(side) is not int or not 1 <= side <= most:
        hint = f"verify takes up to {LARGEST_SIDE:,} with --models {metadata.name}=…"
        raise UserError(f"{who}: the store gives its input as {str(side)[:20]} pixels, not 1 to {most:,}; {hint}")
    return side


@torch.inference_mode()
def _count_classes(config: TeacherConfig, module: nn.Module, preprocessing: Preprocessing) -> int:
    """Asks the module itself, in evaluation mode, with one gray crop."""
    module.eval()
    side = preprocessing.size
    gray = torch.full((1, 3, side, side), 128, dtype=torch.uint8)
    try:
        logits = module(normalise(gray, preprocessing, torch.float32))
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # the user's module may raise anything, and may call exit()
        what = f"{type(error).__name__}: {str(error).strip()}".splitlines()[0][:300]
        raise UserError(f"teacher {config.name}: {config.model} does not take {side} pixels: {what}") from error
    if getattr(module, "num_classes", None) == 0:
        raise UserError(f"teacher {config.name}: {config.model} is a backbone without a classifier; name a teacher")
    if not isinstance(logits, torch.Tensor) or logits.ndim != 2 or logits.shape[1] < 2:
        raise UserError(f"teacher {config.name}: {config.model} must answer (B, C) logits of two or more classes")
    return int(logits.shape[1])


def _versions() -> dict[str, str]:
    found = {}
    for package in ("repcon", "torch", "timm"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
