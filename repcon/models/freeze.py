"""Freeze a model's first blocks and its batch-norm statistics."""

from types import MethodType

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from repcon.models.identity import architecture_of
from repcon.models.timm_import import timm
from repcon.runtime.errors import UserError


def freeze(model: nn.Module, blocks: int, norm: bool) -> None:
    """Freeze the stem and the first `blocks` blocks, batch-norm statistics included.

    Blocks are counted as timm groups layers: one by one, also within a stage. With `norm`, all batch norms normalise
    by their stored statistics; their scales and shifts are still trained.
    """
    if blocks:
        layers = _layer_numbers(model)
        deepest = sorted(set(layers.values()))[1:-1]
        if blocks > len(deepest):
            raise UserError(f"freeze_blocks: {architecture_of(model)} has {len(deepest)} blocks, not {blocks}")
        for name, parameter in model.named_parameters():
            if layers[name] <= blocks:
                parameter.requires_grad_(False)
    for module in model.modules():
        if not isinstance(module, _BatchNorm):
            continue
        trained = [parameter.requires_grad for parameter in module.parameters()]
        if norm or (trained and not any(trained)):
            module.eval()
            module.train = MethodType(_stay_in_eval, module)


def _layer_numbers(model: nn.Module) -> dict[str, int]:
    """Each parameter's layer number: 0 the stem, then one per block, the last for everything after the blocks."""
    matcher = getattr(model, "group_matcher", None)
    if matcher is None:
        raise UserError(
            f"freeze_blocks: timm does not say what the blocks of {architecture_of(model)} are; leave it at 0"
        )
    return timm.models.group_parameters(model, matcher(coarse=False), reverse=True)  # pyright: ignore[reportReturnType]


def _stay_in_eval(self: nn.Module, mode: bool = True) -> nn.Module:
    """Replaces `train` of a frozen batch norm, so that `train()` on the whole model leaves it in evaluation mode."""
    return self
