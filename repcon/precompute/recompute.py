"""Labels some of a store's crops again and compares with the stored labels: for `verify`, and before a run resumes."""

from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace

import numpy as np
import torch
from rich.markup import escape

from repcon.config import VerifyConfig, parse_named_values
from repcon.decode.base import CropRequest
from repcon.decode.factory import open_loader
from repcon.decode.libraries import LIBRARIES
from repcon.images.pack import ImagePack
from repcon.labels import topk
from repcon.labels.layout import HeadInfo
from repcon.labels.store import LabelStore, TeacherMetadata, Unit
from repcon.labels.truncation import bucket_kl
from repcon.models import teacher as teachers
from repcon.models.teacher import Teacher
from repcon.precompute.context import PrecomputeContext, locate
from repcon.precompute.decoding import Decoding
from repcon.runtime.console import console, progress
from repcon.runtime.device import choose
from repcon.runtime.errors import UserError

Labels = dict[str, tuple[np.ndarray, np.ndarray]]
"""Per head: ids (n, k), log-probabilities and log-tails (n, k + T) float16."""
_BATCH = 32
_NEAR_TIE = 0.01
"""Classes this close in stored probability may change places and still agree."""
CHECKED_CROPS = 8
"""Crops of a finished unit that are labelled again."""
MAX_KL = {"fp32": 0.01, "bf16": 0.05, "fp16": 0.05}
"""Limit of their mean KL in nat by precision; other devices and decoders stay far below."""


def rerun(store: LabelStore, pack: ImagePack, config: VerifyConfig) -> dict[str, dict[str, dict[str, float]]]:
    """Per teacher and loader: `kl` and `kl_worst` in nat from the stored label to the new one, at the temperature that
    loses most, `agreement` of their most probable classes, and `pixel_difference` to the reference loader (mean
    absolute, of 255) where that ran.

    Raises UserError when a teacher cannot be loaded as it was, or a loader that was named is missing.
    """
    device = choose(config.device)
    models = parse_named_values("models", config.models, "NAME=MODEL", store.heads)
    metadata = find_teachers(store, models)
    models = {name: metadata[name].model for name in models}
    sides = {name: teachers.check_trusted(metadata[name], models.get(name, "")) for name in store.heads}
    request, stored = draw_sample(store, config.sample, config.seed)
    sizes = sorted(set(sides.values()))
    pixels = {}
    for kind in LIBRARIES if "auto" in config.loaders else dict.fromkeys(config.loaders):
        if decoded := _decode(kind, pack, sizes, request, config, device):
            pixels[kind] = decoded
    found: dict[str, dict[str, dict[str, float]]] = {}
    with progress() as bar:
        answers = len(store.heads) * len(pixels) * len(request.images)
        task = bar.add_task("teachers again", total=answers, unit="crops", note="")
        for name, head in store.heads.items():
            teacher = teachers.load_stored_teacher(metadata[name], device, model=models.get(name, ""))
            side = sides[name]
            found[name] = {}
            for kind, decoded in pixels.items():
                parts = [teacher(part.to(device)).cpu() for part in decoded[side].split(_BATCH)]
                figures = compare(head, *stored[name], torch.cat(parts))
                if kind != "reference" and "reference" in pixels:
                    difference = decoded[side].float() - pixels["reference"][side].float()
                    figures["pixel_difference"] = float(difference.abs().mean())
                found[name][kind] = figures
                bar.advance(task, len(request.images))
    return found


def find_teachers(store: LabelStore, models: Mapping[str, str]) -> dict[str, TeacherMetadata]:
    """The metadata of the store's teachers, with relative folders resolved; `models` are those that the user names.

    Raises UserError naming every teacher whose folder does not exist.
    """
    named = {name: models.get(name, head.metadata.model) for name, head in store.heads.items()}
    found = locate(named, store.url, "--models")
    return {name: replace(head.metadata, model=found[name]) for name, head in store.heads.items()}


def draw_sample(store: LabelStore, count: int, seed: int) -> tuple[CropRequest, Labels]:
    """A seeded sample of n of the store's crops, one per image, and their labels; missing rows are left out."""
    generator = np.random.default_rng(seed)
    rows = np.setdiff1d(np.arange(store.images), store.completion.missing_rows())
    rows = np.sort(generator.choice(rows, min(count, len(rows)), replace=False))
    crops = generator.integers(0, store.crops, len(rows))
    parts = [
        store.reader.read_rows(int(crop), range(int(row), int(row) + 1)) for crop, row in zip(crops, rows, strict=True)
    ]
    if not parts:
        raise UserError(f"{store.url}: every image of this store is missing; there is nothing to compare")
    pairs = {name: zip(*(part.labels[name] for part in parts), strict=True) for name in store.heads}
    boxes, flips = np.stack([part.boxes for part in parts]), np.stack([part.flips for part in parts])
    request = CropRequest(images=rows, crops=crops[:, None], boxes=boxes, flips=flips)
    return request, {name: (np.concatenate(ids), np.concatenate(logp)) for name, (ids, logp) in pairs.items()}


def _decode(
    kind: str, pack: ImagePack, sizes: list[int], request: CropRequest, config: VerifyConfig, device: torch.device
) -> Mapping[int, torch.Tensor] | None:
    """The sample's pixels (n, 3, S, S) uint8 for each side S on the CPU; None for a loader nobody asked for by name
    that cannot be opened here."""
    try:
        loader = open_loader(kind, pack, sizes, device=str(device))
    except UserError as error:
        if kind in config.loaders:
            raise
        console.print(f"[dim]left out: {escape(str(error))}[/]", soft_wrap=True)
        return None
    with closing(loader):
        batches = list(loader.batches(request.split(_BATCH)))
        return {side: torch.cat([batch.pixels[side].cpu() for batch in batches]) for side in sizes}


def compare(head: HeadInfo, ids: np.ndarray, logp: np.ndarray, logits: torch.Tensor) -> dict[str, float]:
    """Stored ids (n, k) and logp (n, k + T) against new logits (n, C); the losses are those of the store's temperature
    that loses most."""
    chosen = torch.from_numpy(ids.astype(np.int64))
    exact = logits.float().log_softmax(1)
    fresh = topk.select(exact, chosen, head.temperatures).numpy()
    temperatures = enumerate(head.temperatures)
    lost = np.stack([bucket_kl(logp, fresh, head.k, index, temperature) for index, temperature in temperatures])
    agreement = _agreement(ids, logp, exact.numpy())
    return {"kl": float(lost.mean(1).max()), "kl_worst": float(lost.max()), "agreement": agreement}


def _agreement(ids: np.ndarray, logp: np.ndarray, exact: np.ndarray) -> float:
    """The share of rows whose most probable class is the stored one, or is stored as nearly as probable."""
    first = exact.argmax(1)
    stored = np.exp(logp[:, : ids.shape[1]].astype(np.float64))
    held = np.where(ids == first[:, None], stored, 0.0).max(1)
    return float((held >= stored[:, 0] - _NEAR_TIE).mean())


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
    rows, crop, side = unit.rows[:CHECKED_CROPS], unit.crops.start, teacher.preprocessing.size
    stored = context.store.reader.read_rows(crop, rows, [teacher.name])
    ids, logp = stored.labels[teacher.name]
    request = CropRequest.of_images(np.array(rows), range(crop, crop + 1), stored.boxes[None], stored.flips[None])
    with closing(open_loader("reference", context.pack, [side])) as loader:
        (decoded,) = Decoding(loader, context.pack).run(iter([request]))  # images that are damaged now are left out
    places = decoded.images - rows.start
    is_labelled = ~np.isnan(logp[places]).any(1)
    if not is_labelled.any():
        return
    places, images = places[is_labelled], decoded.pixels[side][torch.from_numpy(is_labelled)]
    logits = teacher(images.to(context.device)).cpu()
    found = compare(context.store.heads[teacher.name], ids[places], logp[places], logits)
    if found["kl"] > MAX_KL[teacher.metadata.precision]:
        what = "it answers otherwise than when the store's labels were made"
        much = f"KL {found['kl']:.2g} nat on {len(places)} crops"
        hint = "bring back the network, function and library versions of that run, or name another OUT"
        raise UserError(f"teacher {teacher.name}: {what} ({much}); {hint}")
