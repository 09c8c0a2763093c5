"""Input preprocessing: size, mean and standard deviation of a model, and the normalisation of uint8 pixels."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn

from repcon.models.identity import architecture_of
from repcon.runtime.errors import UserError

LARGEST_SIDE = 4096
"""The largest accepted input side in pixels."""
MIN_STD = 1e-3
"""A quarter of the step between two values of 8 bits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Preprocessing:
    """A model's inputs: square images of side `size`, normalised per channel as (pixels / 255 - mean) / std.

    Raises UserError for values out of range.
    """

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __post_init__(self) -> None:
        try:
            mean, std = three(self.mean), three(self.std)
        except (TypeError, ValueError) as error:
            raise UserError(f"mean {self.mean} and std {self.std}: must be three numbers each") from error
        object.__setattr__(self, "mean", mean)
        object.__setattr__(self, "std", std)
        if not (all(0 <= value <= 1 for value in mean) and all(MIN_STD <= value <= 1 for value in std)):
            hint = "they are of pixels from 0 to 1: divide those of pixels from 0 to 255 by 255"
            hint = f"{hint}; no std is below {MIN_STD}"
            raise UserError(f"mean {mean} and std {std}; {hint}")
        if type(self.size) is not int or not 1 <= self.size <= LARGEST_SIDE:
            raise UserError(f"size {self.size}: must be a whole number of pixels from 1 to {LARGEST_SIDE:,}")


def preprocessing_of(model: nn.Module, size: int = 0) -> Preprocessing:
    """A timm model's preprocessing. size: input side in pixels in place of the model's own; 0 keeps it."""
    config = timm_config(model)
    where = f"model {config.get('file') or architecture_of(model)}"
    try:
        mean, std, side = list(config["mean"]), list(config["std"]), size or input_side(config)
    except (KeyError, TypeError, ValueError) as error:
        hint = "its config.json must give input_size, mean and std as lists of three numbers"
        raise UserError(f"{where}: its preprocessing cannot be read; {hint}") from error
    if len(mean) != 3 or len(std) != 3:
        raise UserError(f"{where}: takes {len(mean)} channels; repcon feeds three")
    try:
        return Preprocessing(size=side, mean=three(mean), std=three(std))
    except (UserError, TypeError, ValueError) as error:
        raise UserError(f"{where}: {error}") from error


def three(values: Iterable[Any]) -> tuple[float, float, float]:
    """Three numbers, one per channel. Raises ValueError for another count."""
    red, green, blue = values
    return float(red), float(green), float(blue)


def input_side(config: Mapping[str, Any]) -> int:
    """The input side in pixels. Raises UserError for inputs that are not square."""
    _, height, width = map(int, config["input_size"])
    if height != width:
        raise UserError(f"model {config.get('architecture')}: its own input is {width} x {height}; give it a `size`")
    return height


def timm_config(model: nn.Module) -> dict[str, Any]:
    """The model's `pretrained_cfg`. Raises UserError for a model that is not timm's."""
    config = getattr(model, "pretrained_cfg", None)
    if not config:
        raise UserError(f"model {architecture_of(model)}: not a timm model, so its preprocessing must be given with it")
    return dict(config)


def normalise(images: torch.Tensor, p: Preprocessing, dtype: torch.dtype) -> torch.Tensor:
    """Normalise (B, 3, S, S) uint8 pixels to `dtype`, computed in float32; keeps device and channels-last memory."""
    if not images.is_contiguous(memory_format=torch.channels_last):
        scale, shift = (values.view(3, 1, 1) for values in _scale_and_shift(p.mean, p.std, 1, images.device))
        return images.to(torch.float32).mul_(scale).add_(shift).to(dtype)
    # As rows of 3 * S values, in which a CPU vectorises: over an innermost dimension of 3 it takes four times as long.
    scale, shift = _scale_and_shift(p.mean, p.std, images.shape[3], images.device)
    rows = images.permute(0, 2, 3, 1).flatten(2).to(torch.float32)
    return rows.mul_(scale).add_(shift).to(dtype).unflatten(2, (-1, 3)).permute(0, 3, 1, 2)


@cache
def _scale_and_shift(
    mean: tuple[float, ...], std: tuple[float, ...], repeats: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """(repeats * 3,) float32 each; cached, since copying them to a GPU for every batch would stall it."""
    with torch.inference_mode(False):
        deviations = torch.tensor(std)
        shift = -torch.tensor(mean) / deviations
        return (1 / (255 * deviations)).repeat(repeats).to(device), shift.repeat(repeats).to(device)
