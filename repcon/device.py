"""Which device a command computes on."""

from typing import TYPE_CHECKING

from repcon.errors import UserError

if TYPE_CHECKING:
    import torch

    from repcon.config import Device


def indexed(device: "torch.device | str") -> "torch.device":
    """The device as its tensors name it: "cuda" is the current GPU, and not equal to its "cuda:0"."""
    import torch  # Slow to import.

    place = torch.device(device)
    return torch.device("cuda", torch.cuda.current_device()) if str(place) == "cuda" else place


def choose(device: "Device") -> "torch.device":
    """The device that a recipe's `device` means here: `auto` is CUDA where there is any.

    Raises UserError for `cuda` where torch sees none.
    """
    import torch  # Slow to import.

    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError("device cuda: torch sees no CUDA device here; use device = 'cpu' or 'auto'")
    return torch.device("cuda")
