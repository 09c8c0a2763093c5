"""`repcon precompute --estimate`: a sample's time, size and truncation error, before anything is committed."""

import time
from collections.abc import Sequence
from functools import partial
from typing import Any, get_args

import numpy as np
import torch

from repcon.config import PrecomputeConfig, Values
from repcon.crops.plan import CropPlan, plan_crops
from repcon.decode.base import CropRequest
from repcon.decode.factory import open_loader
from repcon.images.pack import ImagePack
from repcon.labels.layout import BOX, FLIP
from repcon.labels.statistics import warn_uninformative, why_uninformative
from repcon.labels.store import StoreSpec
from repcon.labels.truncation import KS, truncation
from repcon.labels.zarr_encoding import compressed_bytes
from repcon.models.output_checks import check_not_probabilities
from repcon.models.teacher import Teacher
from repcon.precompute.batching import AdaptiveBatcher, Pixels
from repcon.precompute.compilation import compile_teachers
from repcon.runtime.console import console, narrow_table, print_plain, progress
from repcon.runtime.errors import UserError
from repcon.runtime.prefetch import Prefetcher
from repcon.runtime.text import format_bytes, format_duration

SAMPLE_CROPS = 1024
SAMPLE_SECONDS = 30.0


def estimate(
    config: PrecomputeConfig,
    spec: StoreSpec,
    pack: ImagePack,
    teachers: Sequence[Teacher],
    device: torch.device,
    *,
    unlabelled: int,
) -> dict[str, Any]:
    """Labels some images, spread over the pack, and prints what all of them would take; writes nothing.

    unlabelled: crops that the teachers still have to answer, of those that the spec asks for.
    """
    rows, planned = _plan_sample(config, spec, pack)
    total = len(pack) * spec.crops
    compile_teachers(teachers, config, device, crops=total, on_note=print_plain)
    logits, crops_per_second, waited_share = _sample(config, pack, teachers, device, rows, planned)
    boxes = compressed_bytes(spec.codec, BOX, planned.boxes[0])
    box_bytes = (boxes + compressed_bytes(spec.codec, FLIP, planned.flips[0])) / planned.flips.shape[1]
    for teacher in teachers:
        _require_numbers(teacher, logits[teacher.name])
    ks = sorted({*KS, spec.k})
    heads = {name: truncation(answers, spec.temperatures, spec.codec, ks) for name, answers in logits.items()}

    def encoded(k: int, values: Values) -> dict[str, float]:
        return _encoding([head[k][values] for head in heads.values()], box_bytes, total)

    found = {
        "sampled_crops": len(next(iter(logits.values()))),
        "total_crops": total,
        "unlabelled_crops": unlabelled,
        "crops_per_second": round(crops_per_second, 3),
        "waited_share": round(waited_share, 4),
        "seconds": round(unlabelled / crops_per_second, 1),
        "box_bytes_per_crop": round(box_bytes, 2),
        "teachers": heads,
        "uninformative": {name: _uninformative(answers) for name, answers in logits.items()},
        "bytes": {k: encoded(k, spec.values)["bytes"] for k in ks},
        "encodings": {values: encoded(spec.k, values) for values in get_args(Values)},
    }
    _show(spec, found)
    return found


def _plan_sample(config: PrecomputeConfig, spec: StoreSpec, pack: ImagePack) -> tuple[np.ndarray, CropPlan]:
    """Rows (n,) of images spread over the pack, and the first crops of each."""
    depth = min(spec.crops, 8)
    count = min(len(pack), max(1, SAMPLE_CROPS // depth))
    rows = np.unique(np.linspace(0, len(pack) - 1, count).astype(np.int64))
    np.random.default_rng(0).shuffle(rows)  # so that the sample spans the pack where time runs out
    return rows, plan_crops(config.crop, pack.hashes[rows], pack.sizes[rows], range(depth))


def _require_numbers(teacher: Teacher, logits: torch.Tensor) -> None:
    check_not_probabilities(logits, teacher.dtype, f"teacher {teacher.name}")
    if logits.isnan().any():
        remedy = "try precision fp32, or look at its weights"
        raise UserError(f"teacher {teacher.name}: its answer is not a number (NaN); {remedy}")


def _uninformative(logits: torch.Tensor) -> str:
    """What is wrong with these (B, C) answers; empty where they tell something."""
    logp = logits.float().log_softmax(1)
    entropy = float(-(logp.exp() * logp).nansum(1).mean())
    counts = torch.bincount(logits.argmax(1), minlength=logits.shape[1])
    return why_uninformative(entropy, logits.shape[1], float(counts.max() / len(logits)))


def _encoding(heads: list[dict[str, float]], box_bytes: float, total: int) -> dict[str, float]:
    """What `total` crops take in one encoding, and what the encoding loses of the head that loses most."""
    per_crop = box_bytes + sum(head["bytes_per_crop"] for head in heads)
    lost = {key: max(head[key] for head in heads) for key in ("kl", "kl_worst", "saturated")}
    return {"bytes_per_crop": per_crop, "bytes": round(total * per_crop), **lost}


def _sample(
    config: PrecomputeConfig,
    pack: ImagePack,
    teachers: Sequence[Teacher],
    device: torch.device,
    rows: np.ndarray,
    planned: CropPlan,
) -> tuple[dict[str, torch.Tensor], float, float]:
    """Logits per teacher, crops per second after the first batch, and the share of time that the teachers waited."""
    sides = [teacher.preprocessing.size for teacher in teachers]
    loader = open_loader(config.loader, pack, sides, num_workers=config.num_workers, device=str(device))
    parts: dict[str, list[torch.Tensor]] = {teacher.name: [] for teacher in teachers}
    started, first_crops, waited = time.perf_counter(), 0, 0.0
    depth = len(planned.boxes)
    whole = CropRequest.of_images(rows, range(depth), planned.boxes, planned.flips)
    requests = list(whole.split(max(1, config.batch_size // depth)))
    try:
        with progress() as bars, Prefetcher(iter(loader.batches(requests)), 2) as batches:
            task = bars.add_task("estimate", total=planned.flips.size, unit="crops", note="")
            limit = time.perf_counter() + SAMPLE_SECONDS
            passes = AdaptiveBatcher(
                config.batch_size, device, lambda message: bars.console.print(message, style="yellow")
            )
            for number, batch in enumerate(batches):
                for teacher in teachers:
                    parts[teacher.name] += passes.run(batch.pixels, partial(_logits, teacher, device))
                bars.advance(task, len(batch.images))
                if number == 0 and len(requests) > 1:  # The first batch warms caches and compilers: it is not timed.
                    started, first_crops, waited = time.perf_counter(), len(batch.images), batches.waited_seconds
                if time.perf_counter() > limit and number + 1 < len(requests):
                    bars.console.print(f"stopped after {SAMPLE_SECONDS:.0f} s: that is sample enough")
                    break
            seconds, waited = time.perf_counter() - started, batches.waited_seconds - waited
    finally:
        loader.close()
    logits = {name: torch.cat(answers) for name, answers in parts.items()}
    timed = len(next(iter(logits.values()))) - first_crops
    if timed < 1:
        raise UserError(f"estimate: one batch took longer than {SAMPLE_SECONDS:.0f} s; lower batch_size")
    return logits, timed / seconds, waited / seconds


def _logits(teacher: Teacher, device: torch.device, pixels: Pixels) -> torch.Tensor:
    return teacher(pixels[teacher.preprocessing.size].to(device)).cpu()


def _show(spec: StoreSpec, found: dict[str, Any]) -> None:
    title = f"What k costs and loses: KL in nat (mass kept); sample of {found['sampled_crops']:,} crops"
    table = narrow_table(title, "k", ["bytes/crop", "store", *found["teachers"]])
    for k, size in found["bytes"].items():
        cells = [f"{head[k]['kl']:.4f}\n[dim]({head[k]['mass']:.4f})[/]" for head in found["teachers"].values()]
        sizes = (f"{size / found['total_crops']:.1f}", format_bytes(size))
        table.add_row(str(k), *sizes, *cells, style="bold green" if k == spec.k else "")
    console.print(table)
    for values, held in found["encodings"].items():
        size = f"{held['bytes_per_crop']:.1f} bytes/crop, {format_bytes(held['bytes'])}"
        lost = f"the encoding itself loses {held['kl']:.1e} nat, {held['kl_worst']:.1e} at most"
        chosen = " (chosen)" if values == spec.values else ""
        saturated = f", {100 * held['saturated']:.1f} % of the gaps saturated" if values == "quantized8" else ""
        console.print(f"k = {spec.k}, values = {values}{chosen}: {size}; {lost}{saturated}", highlight=False)
    for name, reason in found["uninformative"].items():
        if reason:
            warn_uninformative(name, reason)
    rate = f"{found['crops_per_second']:,.1f} crops/s, the teachers waiting {100 * found['waited_share']:.0f} %"
    duration = format_duration(found["seconds"])
    crops, total = found["unlabelled_crops"], found["total_crops"]
    what = f"{total:,} crops" if crops == total else f"the {crops:,} of {total:,} crops that are left,"
    console.print(f"{what} at {rate}: about [bold]{duration}[/] in one process here")
    console.print("nothing was written", style="dim")
