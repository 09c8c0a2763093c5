"""`repcon export`: a student as one file for torch or an ONNX runtime, checked against the student."""

from pathlib import Path
from typing import Any

from repcon.config import ExportConfig
from repcon.models.export import SUFFIXES, export
from repcon.models.preprocessing import preprocessing_of
from repcon.models.student import head_class_names, load_student
from repcon.runtime.console import console
from repcon.runtime.errors import UserError


def run(config: ExportConfig) -> dict[str, Any]:
    """Writes the file; gives its name, its size and how far it is from the student."""
    out = _out(config)
    model = load_student(config.model)
    inputs = preprocessing_of(model.backbone)
    difference = export(
        model, inputs, out, config.to, normalize=config.normalize, heads=config.heads,
        classes=head_class_names(config.model),
    )  # fmt: skip
    console.print(f"[dim]checked against the student: differs by {difference:.1e} of the largest value[/]")
    return {"file": str(out), "bytes": out.stat().st_size, "difference": difference, "size": inputs.size}


def _out(config: ExportConfig) -> Path:
    suffix = SUFFIXES[config.to]
    out = Path(config.out or Path(config.model, f"student{suffix}"))
    if out.suffix != suffix:
        raise UserError(f"out: {out} must end in {suffix} for --to {config.to}")
    if not out.parent.is_dir():
        raise UserError(f"out: {out.parent} is no folder; make it first")
    if out.is_dir():
        raise UserError(f"out: {out} is a folder; name a file")
    return out
