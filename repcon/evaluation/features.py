"""Features of labelled images, extracted once per backbone and cached by content.

Every backbone gets the largest centred square of an image, resized to the input side.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from rich.progress import Progress
from torch import nn

from repcon.config import LoaderKind
from repcon.decode.base import CropRequest
from repcon.decode.factory import open_loader
from repcon.images.pack import ImagePack
from repcon.models.custom import check_registered, full_weight_hash, is_module_function, load_custom_model
from repcon.models.factory import create_model
from repcon.models.identity import architecture_of, weight_hash
from repcon.models.output_checks import BATCH_INDEPENDENCE_ROWS, check_deterministic
from repcon.models.preprocessing import Preprocessing, normalise, preprocessing_of
from repcon.runtime.atomic_files import AtomicFile
from repcon.runtime.console import warn
from repcon.runtime.device import out_of_memory
from repcon.runtime.errors import UserError

FORMAT = 1
"""Version of the extraction, part of every cache key."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExtractConfig:
    """Settings of the extraction; `size` 0 takes the backbone's own input side."""

    size: int
    batch_size: int
    loader: LoaderKind
    num_workers: int
    device: str
    cache: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Features:
    """One backbone's features of some images."""

    values: np.ndarray
    """(n, D) float32, pooled."""
    weight_hash: str
    input_size: int
    """Side in pixels at which the images were seen."""


def centre_boxes(sizes: np.ndarray) -> np.ndarray:
    """(n, 2) widths and heights to (n, 4) uint16 boxes: the largest centred square of each image."""
    side = sizes.min(axis=1)
    corner = (sizes - side[:, None]) // 2
    return np.column_stack([corner, side, side]).astype(np.uint16)


def centred_squares(pack: ImagePack, rows: np.ndarray, batch_size: int) -> Iterator[CropRequest]:
    """Crop requests for the centred square of each row, in order, not flipped."""
    crops, flips = np.zeros((len(rows), 1), np.int64), np.zeros((len(rows), 1), np.uint8)
    squares = CropRequest(images=rows, crops=crops, boxes=centre_boxes(pack.sizes[rows])[:, None], flips=flips)
    return squares.split(batch_size)


def extract(model: str, pack: ImagePack, rows: np.ndarray, config: ExtractConfig, progress: Progress) -> Features:
    """The backbone's features of `rows`, in their order; cached rows are not computed again.

    model: as for `factory.create_model`, or a `module:function` whose module gives features. The latter are not cached,
    since weights do not tell what a function makes of them. Raises UserError for a backbone that cannot take the size.
    """
    backbone, preprocessing = _backbone(model, config.size)
    backbone = backbone.to(config.device).eval()
    if is_module_function(model):
        values = _compute(backbone, preprocessing, pack, rows, config, progress, own=model)
        return Features(values=values, weight_hash=full_weight_hash(backbone), input_size=preprocessing.size)
    weights = weight_hash(backbone)
    # Layers without weights (activations, pooling) are chosen by a folder's config.json: their list tells them apart.
    layers = hashlib.sha256(repr(backbone).encode()).hexdigest()
    name = f"{architecture_of(backbone)} {layers}"
    cache = FeatureCache(config.cache, name, weights, pack.fingerprint, preprocessing)
    missing = cache.missing(rows)
    if len(missing):
        cache.add(missing, _compute(backbone, preprocessing, pack, missing, config, progress))
    return Features(values=cache.take(rows), weight_hash=weights, input_size=preprocessing.size)


def _backbone(model: str, size: int) -> tuple[nn.Module, Preprocessing]:
    if not is_module_function(model):
        backbone = create_model(model, num_classes=0, size=size)
        return backbone, preprocessing_of(backbone, size)
    backbone, preprocessing = load_custom_model(model, "backbone")
    check_registered(backbone, f"backbone {model}")
    if isinstance(list(backbone.modules())[-1], nn.Linear):
        what = "ends in a linear layer; if that is its classifier, return the module without it: features are compared"
        warn(f"{model} {what}")
    return backbone, replace(preprocessing, size=size or preprocessing.size)


def _compute(
    backbone: nn.Module,
    preprocessing: Preprocessing,
    pack: ImagePack,
    rows: np.ndarray,
    config: ExtractConfig,
    progress: Progress,
    own: str = "",
) -> np.ndarray:
    """Features (n, D) of `rows`.

    own: the user's function that made the backbone; it is checked to give the same features of an image in any batch.
    """
    task = progress.add_task("features", total=len(rows), unit="images", note="")
    loader = open_loader(
        config.loader, pack, (preprocessing.size,), num_workers=config.num_workers, device=config.device
    )
    parts = []
    try:
        for batch in loader.batches(centred_squares(pack, rows, config.batch_size)):
            pixels = batch.pixels[preprocessing.size].to(config.device)
            inputs = normalise(pixels, preprocessing, torch.float32)
            first = inputs[:BATCH_INDEPENDENCE_ROWS].clone() if own and not parts else None
            parts.append(_forward(backbone, inputs))
            if first is not None:
                check_deterministic(backbone, first, torch.from_numpy(parts[0]).to(inputs.device), f"backbone {own}")
            progress.advance(task, len(pixels))
    finally:
        loader.close()
        progress.remove_task(task)
    return np.concatenate(parts)


@torch.inference_mode()
def _forward(backbone: nn.Module, inputs: torch.Tensor) -> np.ndarray:
    """(B, 3, S, S) to (B, D) float32 on the host."""
    try:
        features = backbone(inputs)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # timm asserts that patches fill the input; a user's module may raise anything
        if out_of_memory(error):
            raise
        side, why = inputs.shape[-1], str(error).strip() or type(error).__name__
        raise UserError(
            f"size: the backbone does not take inputs of {side} pixels ({why}); set its own, or 0"
        ) from error
    if not isinstance(features, torch.Tensor) or features.ndim != 2 or len(features) != len(inputs):
        given = f"features of shape {tuple(features.shape)}" if hasattr(features, "shape") else type(features).__name__
        raise UserError(f"the backbone gives {given}, not one vector per image")
    values = features.float().cpu().numpy()
    if not np.isfinite(values).all():
        raise UserError(
            "the backbone gives features that are no numbers: its weights are damaged, or its training diverged"
        )
    return values


class FeatureCache:
    """One file of features per (architecture, weights, pack, preprocessing): other weights are another file.

    `add` replaces the file atomically, so a killed run leaves the old one.
    """

    def __init__(
        self,
        folder: Path,
        architecture: str,
        weights: str,
        pack_fingerprint: str,
        preprocessing: Preprocessing,
    ) -> None:
        normalisation = [preprocessing.size, preprocessing.mean, preprocessing.std]
        self.identity = json.dumps([FORMAT, architecture, weights, pack_fingerprint, *normalisation])
        self.path = folder / f"{hashlib.sha256(self.identity.encode()).hexdigest()[:32]}.npz"
        self._rows = np.zeros(0, np.int64)
        self._values = np.zeros((0, 0), np.float32)
        if self.path.is_file():
            self._read()

    def _read(self) -> None:
        try:
            with np.load(self.path, allow_pickle=False) as held:
                identity, self._rows, self._values = str(held["identity"]), held["rows"], held["values"]
        except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
            raise UserError(f"{self.path}: this cache of features cannot be read ({error}); delete it") from error
        if identity != self.identity:
            raise UserError(f"{self.path}: this cache holds the features of something else; delete it")

    def missing(self, rows: np.ndarray) -> np.ndarray:
        """The rows that are not cached, sorted, each once."""
        return np.setdiff1d(rows, self._rows)

    def add(self, rows: np.ndarray, values: np.ndarray) -> None:
        """Add (n,) rows with their (n, D) values and write the file."""
        all_rows = np.concatenate([self._rows, rows])
        all_values = np.concatenate([self._values, values]) if len(self._rows) else values
        order = np.argsort(all_rows)
        self._rows, self._values = all_rows[order], all_values[order]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with AtomicFile(self.path) as file:
            np.savez(file, identity=np.array(self.identity), rows=self._rows, values=self._values)

    def take(self, rows: np.ndarray) -> np.ndarray:
        """(n, D) float32 in the order of `rows`."""
        return self._values[np.searchsorted(self._rows, rows)]
