"""The training step that `train` and `teach` share: timm's optimiser, schedule and moving average behind one call."""

from contextlib import AbstractContextManager
from types import MethodType
from typing import Any

import torch
from torch import nn

import repcon.models.timm_import  # noqa: F401 - first: timm imports torchvision, which this makes importable
from repcon.config import OptimConfig, Precision, TrainingPrecision
from repcon.models import timm_import  # noqa: F401 (must run before timm is imported)
from repcon.runtime.device import DTYPES
from repcon.runtime.errors import UserError

# isort: split
from timm.optim import create_optimizer_v2  # pyright: ignore[reportPrivateImportUsage]
from timm.scheduler import create_scheduler_v2  # pyright: ignore[reportPrivateImportUsage]
from timm.utils import ModelEmaV3  # pyright: ignore[reportPrivateImportUsage]

FUSED = ("adam", "adamw", "sgd")
"""torch's own optimisers that update all weights in one call: on two cores a tenth of a small model's step."""


def resolve(precision: TrainingPrecision, device: torch.device) -> Precision:
    """What `auto` stands for on a device: bf16 where it has instructions for it, fp32 elsewhere."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if torch.cpu._is_avx512_bf16_supported() else "fp32"  # pyright: ignore[reportPrivateUsage]


def autocast(device: torch.device, precision: TrainingPrecision) -> AbstractContextManager[Any]:
    """The forward pass's number format; weights and their updates stay float32."""
    precision = resolve(precision, device)
    return torch.autocast(device.type, DTYPES[precision], enabled=precision != "fp32")


def keyed(seed: int, number: int) -> int:
    """The torch seed of one piece of work, by its number alone: after a resume its randomness is the same."""
    return (seed * 0x9E3779B97F4A7C15 + number) % 2**63


class OptimizerUpdates:
    """What turns losses into better weights: backward, clipping, optimiser, schedule, moving average.

    The schedule counts updates, from 0 to `total`, and is set before each of them, so `count` alone says where it
    stands. Warm-up takes `config.warmup_epochs`, at most half of all updates.
    """

    def __init__(
        self,
        model: nn.Module,
        config: OptimConfig,
        *,
        total: int,
        per_epoch: float,
        device: torch.device,
        precision: TrainingPrecision = "fp32",
    ) -> None:
        precision = resolve(precision, device)
        if device.type == "cpu" and precision != "fp32":
            _grouped_in_float32(model)
        self.model = model
        self.config = config
        self.count = 0
        self.optimizer = _optimizer(model, config)
        self.schedule = _schedule(self.optimizer, config, total, per_epoch)
        self.ema = ModelEmaV3(model, decay=config.ema) if config.ema else None
        self.scaler = torch.GradScaler(device.type, enabled=precision == "fp16")
        self._trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        self._set_rate()

    @property
    def lr(self) -> float:
        """The rate of the next update."""
        return float(self.optimizer.param_groups[0]["lr"])

    @property
    def averaged(self) -> nn.Module:
        """The weights to evaluate and to keep: the moving average where there is one."""
        return self.ema.module if self.ema is not None else self.model

    def step(self, loss: torch.Tensor, *, update: bool = True) -> None:
        """Adds the gradient of `loss` (a scalar) and, unless more batches are to join, updates the weights."""
        self.scaler.scale(loss).backward()
        if not update:
            return
        if self.config.clip_norm:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self._trained, self.config.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.count += 1
        if self.ema is not None:
            self.ema.update(self.model, step=self.count)
        self._set_rate()

    def state_dict(self) -> dict[str, Any]:
        """Everything but the model's own weights; the average's are here."""
        return {
            "count": self.count,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "ema": self.ema.module.state_dict() if self.ema is not None else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        if self.ema is not None:
            self.ema.module.load_state_dict(state["ema"])
        self._set_rate()

    def _set_rate(self) -> None:
        if self.schedule is not None:
            self.schedule.step_update(self.count)


def _grouped_in_float32(model: nn.Module) -> None:
    """Grouped convolutions that learn stay out of autocast.

    On CPUs their backward pass takes up to 19 times as long in bf16 as in float32 (torch 2.13, depthwise 5 x 5 with
    stride 2); left in it, they make a step of EfficientNet-Lite0 slower than all of it in float32.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.groups > 1 and module.weight.requires_grad:
            module.forward = MethodType(_in_float32, module)  # A method, so that a deep copy has its own.


def _in_float32(module: nn.Conv2d, images: torch.Tensor) -> torch.Tensor:
    with torch.autocast(images.device.type, enabled=False):
        return type(module).forward(module, images.float())


def _optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    if not any(p.requires_grad for p in model.parameters()):
        raise UserError("freeze_blocks: nothing is left to train; lower it")
    try:
        fused: dict[str, Any] = {"fused": True} if config.name in FUSED else {}
        made = create_optimizer_v2(model, opt=config.name, lr=config.lr, weight_decay=config.weight_decay, **fused)
    except (AssertionError, ValueError, KeyError) as error:
        raise UserError(f"optim.name {config.name!r}: timm makes no such optimiser here ({error})") from error
    if getattr(made, "is_second_order", False):
        raise UserError(f"optim.name {config.name!r}: takes second derivatives, which the loss does not give")
    return made


def _schedule(optimizer: torch.optim.Optimizer, config: OptimConfig, total: int, per_epoch: float) -> Any:
    """timm's schedule, counted in updates: an "epoch" of its interface is one update here.

    What timm gives in epochs of a run of 300 (steps of 90, milestones) is the same share of this run.
    """
    if config.schedule == "plateau":
        raise UserError("optim.schedule 'plateau' waits for a metric per epoch; choose one that follows the updates")
    warmup = min(round(config.warmup_epochs * per_epoch), total // 2)
    try:
        schedule, _ = create_scheduler_v2(
            optimizer,
            config.schedule,
            num_epochs=max(total, 1),
            decay_epochs=max(1, round(0.3 * total)) if config.schedule == "step" else None,
            decay_milestones=[round(share * total) for share in (0.3, 0.6, 0.9)],
            warmup_epochs=warmup,
            warmup_lr=config.lr / 100,
            step_on_epochs=False,
            updates_per_epoch=1,
        )
    except ValueError as error:
        raise UserError(f"optim.schedule {config.schedule!r}: {error}") from error
    return schedule
