"""Bytes per crop of one teacher's labels as FKD, TinyViT and ml-dr lay them out, beside repcon's, at equal k.

repcon    the head's arrays in a store: zstd, and the same with eight-bit values. The crop is kept once for all heads.
fkd       torch.save per image: boxes and flips of its crops, then ids and probabilities as one float32 array
tinyvit   a log per pass: a random seed for the crop, uint16 ids, float16 probabilities; an index with a name per image
mldr      a zlib-compressed joblib file per image: the crop's parameters, probabilities and ids as lists
npz       a compressed .npz per image: boxes, flips, ids, log-probabilities

All but TinyViT's include the crop, since they have a file per image and teacher; `_disk` counts whole blocks.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.store.benchmark import fill
from benchmarks.store.labels import CROPS, HEADS, Labels, Pair, make_labels, spec_of
from benchmarks.store.peers.records import file_bytes
from benchmarks.store.peers.tables import ROWS
from repcon.labels.store import LabelStore

KS = (5, 10, 16, 100)
STORES = {"zstd": "float16", "gaps": "quantized8"}
"""Name of the figure: how the values are kept."""


def measure_layouts(folder: Path, images: int, files: int, figures: dict[str, Any]) -> None:
    """Adds `<layout>_<head>_k<k>_bytes`: stores of `images` images, `files` of them where each is a file."""
    folder.mkdir()
    for k in KS:
        labels = make_labels(images, k=k)
        for name, values in STORES.items():
            store = LabelStore.create(str(folder / f"{name}-{k}"), spec_of(labels, "zstd", values, ROWS))
            fill(store, labels)
            for head in HEADS:
                size = file_bytes(Path(store.url) / "heads" / head)
                figures[f"repcon_{name}_{head}_k{k}_bytes"] = size / (images * CROPS)
            figures["repcon_crop_bytes"] = file_bytes(Path(store.url) / "crops") / (images * CROPS)
        for head, pair in labels.heads.items():
            figures[f"tinyvit_{head}_k{k}_bytes"] = _tinyvit(pair, files) / (files * CROPS)
            for name, write in PER_IMAGE.items():
                place = folder / f"{name}-{head}-{k}"
                place.mkdir()
                for image in range(files):
                    write(place / f"{image}.tar", image, labels, pair)
                figures[f"{name}_{head}_k{k}_bytes"] = file_bytes(place) / (files * CROPS)
                blocks = sum(path.stat().st_blocks for path in place.iterdir())
                figures[f"{name}_{head}_k{k}_disk_bytes"] = blocks * 512 / (files * CROPS)


def _fkd(path: Path, image: int, labels: Labels, pair: Pair) -> None:
    ids, logp = (array[:, image] for array in pair)
    probabilities = np.exp(logp[:, :-1].astype(np.float32))
    boxes, flips = labels.boxes[:, image].astype(np.float32), labels.flips[:, image].astype(bool)
    torch.save([boxes, flips, np.stack([ids.astype(np.float32), probabilities], axis=1)], path)


def _mldr(path: Path, image: int, labels: Labels, pair: Pair) -> None:
    import joblib

    ids, logp = (array[:, image] for array in pair)
    probabilities = np.exp(logp[:, :-1].astype(np.float32))
    samples = [
        {
            "params": {"rrc": tuple(labels.boxes[crop, image].tolist()), "hflip": bool(labels.flips[crop, image])},
            "prob": (probabilities[crop].tolist(), ids[crop].tolist()),
        }
        for crop in range(CROPS)
    ]
    joblib.dump((image, samples), path, compress=True)


def _npz(path: Path, image: int, labels: Labels, pair: Pair) -> None:
    ids, logp = (array[:, image] for array in pair)
    with path.open("wb") as file:
        np.savez_compressed(file, box=labels.boxes[:, image], flip=labels.flips[:, image], ids=ids, logp=logp)


def _tinyvit(pair: Pair, images: int) -> int:
    """A record per image and pass, and the line of its index; the names are as long as ImageNet's."""
    seed, name_bytes = 4, len("n01440764_10026.JPEG\n")
    k = pair[0].shape[2]
    return (seed + 2 * k + 2 * k + name_bytes) * images * CROPS


PER_IMAGE: dict[str, Callable[[Path, int, Labels, Pair], None]] = {"fkd": _fkd, "mldr": _mldr, "npz": _npz}
