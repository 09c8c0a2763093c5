"""Statistics of a store: sizes, mass and KL by k, entropy, agreement of teachers, classes."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
import torch

from repcon.labels import topk
from repcon.labels.layout import HeadInfo, Unit
from repcon.labels.store import CropLabels, LabelStore
from repcon.labels.truncation import encodings, entropy, probabilities, stored_losses
from repcon.runtime.console import warn

SAMPLE_ROWS = 2**16
"""Crops in the sample, spread over the finished units; sizes are counted over all units."""
_SHOWN_CLASSES = 10
_MAX_COUNTED_CLASSES = 4096
_ENCODED_ROWS = 16_384
_KS = (1, 2, 4, 8, 16, 32, 64, 128)
UNCOMPRESSED = "the same labels uncompressed, as float16"
"""The baseline of `compression`."""
MUTUAL_INFORMATION = "adjusted for chance: 0 for nothing in common, 1 for all"
"""Explanation of the mutual information of two teachers' top classes."""
_NEARLY_UNIFORM = 0.9
"""Share of the maximal entropy above which a teacher's mean entropy counts as uninformative."""
_ONE_CLASS = 0.9
"""Share of the crops with the same top class above which a teacher counts as uninformative."""


def figures(store: LabelStore, sample_rows: int = SAMPLE_ROWS) -> dict[str, Any]:
    """The figures of `repcon inspect`, as JSON values; of an unfinished store those of its finished units."""
    done = store.completion.finished()
    sizes, reasons = store.completion.shard_bytes(done), store.completion.missing_reasons(done)
    crops = {head: sum(len(unit.crops) * len(unit.rows) for unit in done if head in unit.heads) for head in store.heads}
    box_crops = sum(len(unit.crops) * len(unit.rows) for unit in done if unit.writes_boxes)
    parts = list(sample(store, done, sample_rows, np.array(list(reasons), np.int64)))
    heads = {
        name: _sizes(head, sizes, crops[name]) | _labels(store, head, [part.labels[name] for part in parts])
        for name, head in store.heads.items()
    }
    manifest = store.manifest
    boxes = sum(size for path, size in sizes.items() if path.startswith("crops/"))
    held = [heads[name]["bytes_per_crop"] for name in store.heads] + [boxes / max(box_crops, 1)]
    return {
        "images": store.images,
        "crops": store.crops,
        "missing": len(reasons),
        "missing_rows": {str(row): reason for row, reason in reasons.items()},
        "units": len(store.units()),
        "units_finished": len(done),
        "bytes": sum(sizes.values()),
        "bytes_per_crop": sum(held),
        "box_bytes_per_crop": held[-1],
        "compression": (9 + sum(head["raw_bytes_per_crop"] for head in heads.values())) / max(sum(held), 1e-9),
        "codec": manifest.codec,
        "values": manifest.values,
        "k": manifest.k,
        "temperatures": list(manifest.temperatures),
        "crop_recipe": manifest.crop_recipe,
        "pack_fingerprint": manifest.pack_fingerprint,
        "fingerprint": store.fingerprint,
        "sampled_crops": sum(len(part.flips) for part in parts),
        "heads": heads,
        "agreement": _agreement(store, parts),
    }


def known(found: Mapping[str, Any]) -> dict[str, Any]:
    """The figures with None for a size per crop that is unknown because nothing of a teacher is finished."""
    heads = {
        name: head if head["crops_finished"] else {**head, "bytes_per_crop": None}
        for name, head in found["heads"].items()
    }
    is_known = all(head["crops_finished"] for head in heads.values())
    unknown = () if is_known else ("bytes_per_crop", "box_bytes_per_crop", "compression")
    return {**found, "heads": heads, **dict.fromkeys(unknown)}


def why_no_labels(found: Mapping[str, Any]) -> str:
    """Why the sample is empty; "" where it is not."""
    if found["sampled_crops"]:
        return ""
    return "no crop has every teacher's answer yet" if found["units_finished"] else "nothing is finished yet"


def why_uninformative(entropy_nat: float, classes: int, top_share: float) -> str:
    """Why a teacher's labels hardly carry information, and what helps; empty where they do.

    entropy_nat: mean over crops at temperature 1. top_share: of the crops with the most frequent class on top.
    """
    remedy = "images that show some of its classes help, and a teacher trained without label smoothing"
    most = math.log(classes)
    if entropy_nat > _NEARLY_UNIFORM * most:
        return f"its answers are nearly uniform (entropy {entropy_nat:.2f} of at most {most:.2f} nat); {remedy}"
    if top_share > _ONE_CLASS:
        return f"the same class is on top of {100 * top_share:.0f} % of its answers; {remedy}"
    return ""


def warn_uninformative(teacher: str, reason: str) -> None:
    """Prints the reason that `why_uninformative` gives."""
    warn(f"teacher {teacher} tells little about these images: {reason}")


def sample(store: LabelStore, done: list[Unit], rows: int, missing: np.ndarray) -> Iterator[CropLabels]:
    """Evenly spread parts of crops that are finished for boxes and all heads, about `rows` rows; without `missing`."""
    writer_count = len(store.manifest.teachers) + 1
    counts: dict[tuple[int, int], int] = {}
    for unit in done:
        for crop in unit.crops:
            place = (crop, unit.rows.start)
            counts[place] = counts.get(place, 0) + len(unit.heads) + unit.writes_boxes
    complete = sorted(place for place, count in counts.items() if count == writer_count)
    wanted = max(1, -(-rows // store.manifest.rows_per_shard))
    places = np.unique(np.linspace(0, len(complete) - 1, wanted).astype(np.int64)) if complete else []
    chosen = [complete[place] for place in places]
    share = -(-rows // max(len(chosen), 1))
    for crop, start in chosen:
        stop = min(start + min(share, store.manifest.rows_per_shard), store.images)
        kept = ~np.isin(np.arange(start, stop), missing)
        yield store.reader.read_rows(crop, range(start, stop)).take((crop,), kept)


def _sizes(head: HeadInfo, sizes: dict[str, int], crops: int) -> dict[str, Any]:
    held = {path.rpartition("/")[2]: size for path, size in sizes.items() if path.startswith(f"heads/{head.name}/")}
    ids = 2 if head.classes <= 65_535 else 4
    return {
        "classes": head.classes,
        "k": head.k,
        "crops_finished": crops,
        "bytes_per_crop": sum(held.values()) / max(crops, 1),
        "id_bytes_per_crop": held.get("ids", 0) / max(crops, 1),
        "raw_bytes_per_crop": (ids + 2) * head.k + 2 * len(head.temperatures),
        "architecture": head.metadata.architecture,
        "weight_hash": head.metadata.weight_hash,
        "precision": head.metadata.precision,
        "licence": head.metadata.licence,
    }


def _labels(store: LabelStore, head: HeadInfo, parts: list[tuple[np.ndarray, np.ndarray]]) -> dict[str, Any]:
    """Mass, losses, entropy, encodings and classes of a head's sampled rows."""
    if not parts or not sum(len(ids) for ids, _ in parts):
        return {}
    ids, logp = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    first = ids[:, 0]
    top, rest = probabilities(head, logp)
    mass, lost = stored_losses(top, rest, head.classes)
    classes, counts = np.unique(first, return_counts=True)  # of those that occur: there may be millions
    most = np.argsort(-counts, kind="stable")[:_SHOWN_CLASSES]
    names = head.metadata.classes or {int(number): str(number) for number in classes[most]}
    entropy_nat = float(entropy(top, rest, head.classes).mean())
    encoded: dict[str, dict[str, Any]] = {
        **encodings(head, ids[:_ENCODED_ROWS], logp[:_ENCODED_ROWS], store.manifest.codec)
    }
    if store.manifest.values == "quantized8":
        # The loss by steps of 0.04 nat cannot be computed from rows that were quantized already.
        encoded["quantized8"] |= {"kl": None, "kl_worst": None}
    return {
        "top1_probability": float(top[:, 0].mean()),
        "mass": float(mass[-1]),
        "mass_by_k": mass.tolist(),
        "kl_by_k": lost.tolist(),
        "entropy_nat": entropy_nat,
        "uninformative": why_uninformative(entropy_nat, head.classes, float(counts.max() / len(first))),
        "encodings": encoded,
        "bytes_by_k": _bytes_by_k(store, head, ids[:_ENCODED_ROWS], logp[:_ENCODED_ROWS]),
        "classes_on_top": len(classes),
        "most_on_top": [[names[int(classes[place])], float(counts[place] / len(first))] for place in most],
        "top1_counts": np.bincount(first, minlength=head.classes).tolist()
        if head.classes <= _MAX_COUNTED_CLASSES
        else [],
    }


def _bytes_by_k(store: LabelStore, head: HeadInfo, ids: np.ndarray, logp: np.ndarray) -> dict[str, list[Any]]:
    """Compressed bytes per crop of these rows cut to `k` labels, for both encodings of the values."""
    ks = [*(k for k in _KS if k < head.k), head.k]
    found: dict[str, list[Any]] = {"k": ks}
    for k in ks:
        rows = topk.truncate(torch.from_numpy(logp), k, head.temperatures).numpy()
        for values, held in encodings(replace(head, k=k), ids[:, :k], rows, store.manifest.codec).items():
            found.setdefault(values, []).append(held["bytes_per_crop"])
    return found


def _agreement(store: LabelStore, parts: list[CropLabels]) -> dict[str, dict[str, float]]:
    """For each pair of teachers: mutual information of their top-1 classes, and how often they are the same.

    Mutual information is adjusted for chance: 0 for independent, 1 for equivalent, whatever the classes are. The
    other figure is there for equal lists of classes only.
    """
    from sklearn.metrics import adjusted_mutual_info_score

    found = {}
    for left, right in combinations(store.heads, 2):
        ids = [
            np.concatenate([crop_labels.labels[name][0][:, 0] for crop_labels in parts] or [np.empty(0)])
            for name in (left, right)
        ]
        if len(ids[0]) < 2:
            continue
        figures = {"mutual_information": float(adjusted_mutual_info_score(*ids))}
        classes = [store.heads[name].metadata.classes for name in (left, right)]
        if classes[0] and classes[0] == classes[1]:
            figures["same_class"] = float((ids[0] == ids[1]).mean())
        found[f"{left} / {right}"] = figures
    return found
