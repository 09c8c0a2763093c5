"""Teachers: classifiers in evaluation mode, with the metadata that a store keeps to identify them."""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from repcon.config import TeacherConfig
from repcon.labels.store import TeacherMetadata
from repcon.models import custom
from repcon.models.factory import PACKAGE, create_model, stated_license
from repcon.models.identity import architecture_of, class_names_of, parse_class_names
from repcon.models.output_checks import call_model, check_logits_shape
from repcon.models.preprocessing import LARGEST_SIDE, Preprocessing, normalise, preprocessing_of
from repcon.runtime.device import DTYPES, require_compiler
from repcon.runtime.errors import UserError
from repcon.runtime.system import versions

MAX_STORED_SIDE = 1024
"""The largest input side in pixels that is accepted from a store's metadata alone."""


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

    def compile(self, device: torch.device) -> None:
        """Compile the module, which is on `device`, in place at its next batch.

        Raises UserError where there is no compiler for the device.
        """
        require_compiler(device)
        # On a CPU weights become constants, so that batch norms are folded into convolutions.
        self.module.compile(options={"freezing": device.type == "cpu"})

    def uncompile(self) -> None:
        """Undo `compile`."""
        self.module._compiled_call_impl = None  # torch has no function for it

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, S, S) uint8 pixels to (B, C) float32 logits."""
        return self.forward(normalise(images, self.preprocessing, self.dtype))

    @torch.inference_mode()
    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """(B, 3, S, S) normalised inputs of `dtype` to (B, C) float32 logits.

        Raises UserError naming the teacher where its module fails or returns anything else.
        """
        who = f"teacher {self.name}"
        shape = (len(inputs), self.metadata.num_classes)
        return check_logits_shape(call_model(self.module, inputs, who), shape, who).float()


def load_teacher(config: TeacherConfig, device: str | torch.device) -> Teacher:
    """Load the teacher of a recipe, not compiled.

    Raises UserError for missing weights, or a model that is not a classifier.
    """
    if custom.is_module_function(config.model):
        module, preprocessing = custom.load_custom_model(config.model, f"teacher {config.name}")
        if config.size not in (0, preprocessing.size):
            what = f"size {config.size}, but {config.model} says {preprocessing.size}"
            raise UserError(f"teacher {config.name}: {what}")
        custom.check_registered(module, f"teacher {config.name}: {config.model}")
        classes, license = (), ""
    else:
        module = create_model(config.model, size=config.size)
        preprocessing = preprocessing_of(module, config.size)
        classes = class_names_of(module)
        license = stated_license(module, config.model)
    num_classes = _num_classes(config, module, preprocessing)
    names = getattr(module, "class_names", None) if custom.is_module_function(config.model) else None
    if names is not None and (not hasattr(names, "__len__") or len(names)):
        classes = parse_class_names(names, num_classes, f"teacher {config.name}: {config.model}: class_names")
    metadata = TeacherMetadata(
        name=config.name,
        model=config.model,
        architecture=architecture_of(module),
        weight_hash=custom.full_weight_hash(module),
        preprocessing=asdict(preprocessing) | {"mean": list(preprocessing.mean), "std": list(preprocessing.std)},
        num_classes=num_classes,
        classes=classes,
        precision=config.precision,
        versions=versions(("repcon", "torch", "timm")),
        licence=config.license or license,
    )
    dtype = DTYPES[config.precision]
    module = module.to(device, dtype, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue, reportArgumentType]
    return Teacher(name=config.name, module=module, preprocessing=preprocessing, metadata=metadata)


def load_stored_teacher(metadata: TeacherMetadata, device: str | torch.device, *, model: str = "") -> Teacher:
    """Load the teacher that made a store's labels. Raises UserError for other weights, preprocessing or classes.

    model: where the teacher is now, in place of the model that the metadata names, see `check_trusted`.
    """
    config = TeacherConfig(
        name=metadata.name,
        model=model or metadata.model,
        size=check_trusted(metadata, model),
        precision=metadata.precision,  # pyright: ignore[reportArgumentType]
        license=metadata.licence,
    )
    try:
        teacher = load_teacher(config, device)
    except UserError as error:
        if model:
            raise
        hint = f"if it lies elsewhere here, name that: --models {metadata.name}=MODEL"
        raise UserError(f"{error}; {hint}") from error
    check_same_teacher(metadata, teacher.metadata, config.model)
    return teacher


def check_same_teacher(metadata: TeacherMetadata, found: TeacherMetadata, model: str) -> None:
    """Raises UserError naming the first field in which `model` is not the teacher that made the labels."""
    for field in ("architecture", "weight_hash", "num_classes", "classes", "preprocessing"):
        stored, current = getattr(metadata, field), getattr(found, field)
        if stored != current:
            what = f"{field} is {str(current)[:80]} now and {str(stored)[:80]} in the store"
            raise UserError(f"teacher {metadata.name}: {model} is not the model that made the labels: {what}")


def check_trusted(metadata: TeacherMetadata, model: str = "") -> int:
    """The input side in pixels of a store's teacher.

    A store may come from anyone, so its metadata alone must not run code, download a model or allocate huge inputs.
    Raises UserError where it would; `model`, named by the user in place of the metadata's model, may do all of that.
    """
    who = f"teacher {metadata.name}"
    if custom.is_module_function(metadata.model) and not model:
        hint = f"a store's own word is not enough to run code; verify runs it with --models {metadata.name}=…"
        raise UserError(f"{who}: its model {metadata.model} is a function; {hint}")
    name = metadata.model.removeprefix("local-dir:")
    local = name.startswith((PACKAGE, ".", "/", "~")) or ("/" in name and ":" not in name)
    if not (model or local or Path(name).is_dir()):
        hint = f"a store's own word is not enough to download it; --models {metadata.name}={metadata.model} does"
        raise UserError(f"{who}: its model {metadata.model} is neither a folder here nor an installed package; {hint}")
    if metadata.precision not in DTYPES:
        raise UserError(
            f"{who}: the store gives its precision as {metadata.precision!r}; there are {', '.join(DTYPES)}"
        )
    if "size" not in metadata.preprocessing:
        hint = "so its crops cannot be made again; verify without --pack"
        raise UserError(f"{who}: its preprocessing names no input size, {hint}")
    side, largest = metadata.preprocessing["size"], LARGEST_SIDE if model else MAX_STORED_SIDE
    if type(side) is not int or not 1 <= side <= largest:
        hint = f"verify takes up to {LARGEST_SIDE:,} with --models {metadata.name}=…"
        raise UserError(f"{who}: the store gives its input as {str(side)[:20]} pixels, not 1 to {largest:,}; {hint}")
    return side


@torch.inference_mode()
def _num_classes(config: TeacherConfig, module: nn.Module, preprocessing: Preprocessing) -> int:
    """The number of logits for one gray image; puts the module into evaluation mode."""
    module.eval()
    side = preprocessing.size
    gray = torch.full((1, 3, side, side), 128, dtype=torch.uint8)
    inputs = normalise(gray, preprocessing, torch.float32)
    logits = call_model(module, inputs, f"teacher {config.name}", f"{config.model} does not take {side} pixels")
    if getattr(module, "num_classes", None) == 0:
        raise UserError(f"teacher {config.name}: {config.model} is a backbone without a classifier; name a teacher")
    if not isinstance(logits, torch.Tensor) or logits.ndim != 2 or logits.shape[1] < 2:
        raise UserError(f"teacher {config.name}: {config.model} must answer (B, C) logits of two or more classes")
    return int(logits.shape[1])
