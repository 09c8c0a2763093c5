"""Check that the teachers of a resumed run give the stored labels again."""

from contextlib import closing, suppress

import numpy as np
import torch

from repcon.decode.base import CropRequest, Loader
from repcon.decode.factory import open_loader
from repcon.labels.store import CropLabels, Unit
from repcon.models.teacher import Teacher
from repcon.precompute.context import PrecomputeContext
from repcon.precompute.recompute import compare
from repcon.runtime.errors import UserError

CROPS = 8
"""Crops of a finished unit that are labelled again."""
MAX_KL = {"fp32": 0.01, "bf16": 0.05, "fp16": 0.05}
"""Limit of their mean KL in nat by precision; other devices and decoders stay far below."""


def check_teacher_consistency(context: PrecomputeContext, todo: list[Unit]) -> None:
    """Raises UserError where a teacher with units in `todo` labels its finished units differently now.

    Architecture, weights, preprocessing and classes are compared before; they do not show a network's other settings,
    what a function of the user's does, or what a library has changed.
    """
    left = {unit.name for unit in todo}
    needed = {name for unit in todo for name in unit.heads}
    finished = [unit for unit in context.store.units() if unit.name not in left]
    for teacher in (teacher for teacher in context.teachers if teacher.name in needed):
        unit = next((unit for unit in finished if teacher.name in unit.heads), None)
        if unit is not None:
            _check_teacher(context, teacher, unit)


def _check_teacher(context: PrecomputeContext, teacher: Teacher, unit: Unit) -> None:
    rows, crop = unit.rows[:CROPS], unit.crops.start
    stored = context.store.reader.read_rows(crop, rows, [teacher.name])
    ids, logp = stored.labels[teacher.name]
    with closing(open_loader("reference", context.pack, [teacher.preprocessing.size])) as loader:
        pixels = {
            place: found for place in range(len(rows)) if (found := _pixels(loader, stored, rows, place)) is not None
        }
    places = [place for place in pixels if not np.isnan(logp[place]).any()]
    if not places:
        return
    images = torch.cat([pixels[place] for place in places]).to(context.device)
    with torch.compiler.set_stance("force_eager"):  # else it would be compiled for this batch size as well
        logits = teacher(images).cpu()
    found = compare(context.store.heads[teacher.name], ids[places], logp[places], logits)
    if found["kl"] > MAX_KL[teacher.metadata.precision]:
        what = "it answers otherwise than when the store's labels were made"
        much = f"KL {found['kl']:.2g} nat on {len(places)} crops"
        hint = "bring back the network, function and library versions of that run, or name another OUT"
        raise UserError(f"teacher {teacher.name}: {what} ({much}); {hint}")


def _pixels(loader: Loader, stored: CropLabels, rows: range, place: int) -> torch.Tensor | None:
    """(1, 3, S, S) uint8 of one row's crop; None where its image is damaged now: these labels are made."""
    request = CropRequest(
        images=np.array([rows[place]]),
        crops=np.array([[0]]),
        boxes=stored.boxes[place][None, None],
        flips=stored.flips[place][None, None],
    )
    with suppress(UserError):
        (batch,) = loader.batches([request])
        (found,) = batch.pixels.values()
        return found
    return None
