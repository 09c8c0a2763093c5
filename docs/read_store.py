"""Reads one crop of one head of a repcon label store with zarr and numpy alone; see store-format.md.

python docs/read_store.py labels.zarr HEAD CROP
"""

import json
import sys
from pathlib import Path

import numpy as np
import zarr


def read(store: str, head: str, crop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """boxes (N, 4), flips (N,), ids (N, k), and (N, k + T) float16: k log-probabilities, then T log-tails."""
    manifest = json.loads(Path(store, "manifest.json").read_text())
    assert (manifest["format"], manifest["version"]) == ("repcon labels", 1)
    classes = next(teacher["num_classes"] for teacher in manifest["teachers"] if teacher["name"] == head)
    values = {"float16": "logp", "quantized8": "gaps", "gaps8": "gaps"}[manifest["values"]]
    paths = ("crops/box", "crops/flip", f"heads/{head}/ids", f"heads/{head}/{values}")
    boxes, flips, ids, rows = (zarr.open_array(store, path=path, mode="r")[crop] for path in paths)
    if values == "gaps":
        rows = decode(rows, min(manifest["k"], classes), classes, manifest["temperatures"])
    return boxes, flips, ids, rows


def decode(codes: np.ndarray, k: int, classes: int, temperatures: list[float]) -> np.ndarray:
    """Eight-bit codes (width, N) as (N, k + T) float16."""
    steps = np.concatenate([np.arange(127), 127 + np.rint((1.055 ** np.arange(127) - 1) / 0.055), [0, 0]])
    angles = np.arange(256) * np.pi / 506
    angles[0], angles[253:] = np.pi / 2024, np.pi / 2 - np.pi / 2024
    outside = np.zeros(codes.shape) if k == classes else np.sin(angles[codes]) ** 2
    below = 0.04 * np.concatenate([np.zeros((1, codes.shape[1])), steps[codes[1:k]].cumsum(0)])
    first = np.log(1 - outside[0]) - np.log(np.exp(-below).sum(0))
    rows, spare = list(np.rint(first / 0.0025) * 0.0025 - below), k
    with np.errstate(divide="ignore"):
        for t in temperatures:
            share = outside[0] if t == 1 else outside[spare] / (1 - outside[spare])
            rows.append(np.log(share) + (0 if t == 1 else np.log(np.exp(-below / t).sum(0)) + first / t))
            spare += t != 1
    return np.where(codes[0] == 255, np.nan, rows).T.astype(np.float16)


if __name__ == "__main__":
    boxes, flips, ids, rows = read(sys.argv[1], sys.argv[2], int(sys.argv[3]))
    for image in range(min(5, len(ids))):
        print(boxes[image], flips[image], ids[image, :3], np.exp(rows[image, :3].astype(np.float32)).round(3))
