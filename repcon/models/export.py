"""Export a student as one file that needs neither repcon nor timm: a torch.export program or an ONNX model."""

import json
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from repcon.models.identity import architecture_of
from repcon.models.preprocessing import Preprocessing
from repcon.models.student import Student
from repcon.runtime.atomic_files import move_into_place
from repcon.runtime.errors import UserError, first_line
from repcon.runtime.extras import require_extra

Format = Literal["onnx", "torch"]
Outputs = dict[str, np.ndarray]
SUFFIXES: dict[str, str] = {"onnx": ".onnx", "torch": ".pt2"}
METADATA = "repcon.json"
"""Description of inputs and outputs: a metadata property in ONNX, an extra file in a torch program."""
INPUT, FEATURES, LOGITS = "images", "features", "logits/"
"""Names of the input and the outputs; a head's logits are `logits/NAME`."""
CHECKED_BATCHES = (1, 5)
TOLERANCE = 1e-3
"""Largest difference between the file's and the student's outputs, relative to the student's largest value."""
_TRACED_BATCH = 2  # torch.export takes a batch of 1 for a constant


class ExportedStudent(nn.Module):
    """The exported module: images to {"features": (B, F)} and, with `heads`, {"logits/NAME": (B, C)} for each head.

    normalize: images are (B, 3, S, S) uint8 pixels; otherwise normalised float32.
    """

    def __init__(self, student: Student, inputs: Preprocessing, *, normalize: bool, heads: bool) -> None:
        super().__init__()
        self.model = student if heads else student.backbone
        self.head_slices = student.head_slices if heads else {}
        self.normalize = normalize
        std = torch.tensor(inputs.std).view(3, 1, 1)
        self.scale = nn.Buffer(1 / (255 * std))
        self.shift = nn.Buffer(-torch.tensor(inputs.mean).view(3, 1, 1) / std)

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        if self.normalize:
            images = images.to(torch.float32) * self.scale + self.shift
        if not isinstance(self.model, Student):
            return {FEATURES: self.model(images)}
        features = self.model.features(images)
        logits = self.model.head_logits(features)
        heads = {LOGITS + name: logits[:, columns] for name, columns in self.head_slices.items()}
        return {FEATURES: features} | heads


def export(
    student: Student,
    inputs: Preprocessing,
    path: Path,
    to: Format,
    *,
    normalize: bool,
    heads: bool,
    classes: Mapping[str, tuple[str, ...]],
) -> float:
    """Write the student to `path` for batches of any size; gives the largest relative difference of its outputs.

    classes: known class names by head. The file is loaded and compared with the student before it is moved to `path`.
    Raises UserError where the model cannot be traced, the outputs differ, or packages are missing.
    """
    if to == "onnx":
        require_extra("export", ("onnx", "onnxscript", "onnxruntime"), "--to onnx")
    model = ExportedStudent(student, inputs, normalize=normalize, heads=heads).eval()
    about = {
        "input": {"size": inputs.size, "mean": inputs.mean, "std": inputs.std, "normalize": normalize},
        "heads": {name: list(classes.get(name, ())) for name in student.heads} if heads else {},
    }
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".export-") as folder:
        written = Path(folder, path.name)
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # of torch's own code, about itself
            try:
                _write(model, _pixels(_TRACED_BATCH, inputs.size, normalize), written, to, json.dumps(about))
            except OSError:
                raise
            except Exception as error:  # torch's tracing raises errors of many kinds for what it cannot follow
                name, reason = architecture_of(student.backbone), first_line(error)[:200]
                what = f"{name} cannot be exported for batches of any size ({reason})"
                raise UserError(f"{path}: not written: {what}; use the student's folder itself") from error
            run = _load_onnx(written) if to == "onnx" else _load_torch(written)
            difference = _compare(model, run, inputs.size, path)
        for made in Path(folder).iterdir():  # above 2 GB, ONNX keeps weights in a file next to the model's
            move_into_place(made, path.parent / made.name)
    return difference


def _write(model: ExportedStudent, pixels: torch.Tensor, path: Path, to: Format, about: str) -> None:
    program = torch.export.export(model, (pixels,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    if to == "torch":
        torch.export.save(program, path, extra_files={METADATA: about})
        return
    made: Any = torch.onnx.export(
        program, dynamo=True, verbose=False, input_names=[INPUT], output_names=list(model(pixels)),
        dynamic_shapes=({0: "batch"},),
    )  # fmt: skip
    made.model.metadata_props[METADATA] = about
    made.save(path)


def _compare(model: ExportedStudent, run: Callable[[torch.Tensor], Outputs], size: int, path: Path) -> float:
    largest = 0.0
    for batch in CHECKED_BATCHES:
        pixels = _pixels(batch, size, model.normalize)
        found = run(pixels)
        for name, wanted in model(pixels).items():
            span = max(float(wanted.abs().max()), 1e-12)
            largest = max(largest, float(np.abs(found[name] - wanted.numpy()).max()) / span)
    if not largest <= TOLERANCE:
        what = f"its answers differ from the student's by {largest:.2g} of their largest value"
        raise UserError(f"{path}: not written: {what}; use the student's folder itself")
    return largest


def _pixels(batch: int, size: int, normalize: bool) -> torch.Tensor:
    """(batch, 3, size, size) of random pixels: uint8 with `normalize`, else float32 of a normalised image's range."""
    random = torch.Generator().manual_seed(batch)
    if normalize:
        return torch.randint(256, (batch, 3, size, size), generator=random, dtype=torch.uint8)
    return torch.randn(batch, 3, size, size, generator=random)


def _load_torch(path: Path) -> Callable[[torch.Tensor], Outputs]:
    program = torch.export.load(path).module()
    return lambda pixels: {name: value.numpy() for name, value in program(pixels).items()}


def _load_onnx(path: Path) -> Callable[[torch.Tensor], Outputs]:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    run: Any = session.run
    return lambda pixels: dict(zip(names, run(None, {INPUT: pixels.numpy()}), strict=True))
