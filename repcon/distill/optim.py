"""Optimizer updates for `train` and `teach`: timm's optimizer, schedule and moving average behind one call."""
# pyright: reportPrivateImportUsage=false

from contextlib import AbstractContextManager
from types import MethodType
from typing import Any

import torch
from torch import nn

from repcon.config import OptimConfig, Precision, TrainingPrecision
from repcon.models.timm_import import timm
from repcon.runtime.device import DTYPES
from repcon.runtime.errors import UserError

FUSED = ("adam", "adamw", "sgd")
"""Optimizers with a fused update in torch; the fused update takes a tenth of a small model's step on two cores."""


def resolve_precision(precision: TrainingPrecision, device: torch.device) -> Precision:
    """The precision that `auto` stands for: bf16 where the device has instructions for it, fp32 elsewhere."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if torch.cpu._is_avx512_bf16_supported() else "fp32"  # pyright: ignore[reportPrivateUsage]


def autocast(device: torch.device, precision: TrainingPrecision) -> AbstractContextManager[Any]:
    """Autocast for the forward pass; weights and their updates stay float32."""
    precision = resolve_precision(precision, device)
    return torch.autocast(device.type, DTYPES[precision], enabled=precision != "fp32")


def step_seed(seed: int, number: int) -> int:
    """The torch seed of step or epoch `number`, so that a resumed run draws the same random numbers."""
    return (seed * 0x9E3779B97F4A7C15 + number) % 2**63


class OptimizerUpdates:
    """Backward pass, gradient clipping, optimizer, schedule and moving average of the weights.

    total: updates of the run. per_epoch: updates of an epoch. The schedule follows `count`, the number of updates so
    far; its warm-up takes `config.warmup_epochs`, at most half of all updates.
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
        precision = resolve_precision(precision, device)
        if device.type == "cpu" and precision != "fp32":
            _run_grouped_convs_in_fp32(model)
        self.model = model
        self.config = config
        self.count = 0
        self.optimizer = _optimizer(model, config)
        self.schedule = _schedule(self.optimizer, config, total, per_epoch)
        self.ema = timm.utils.ModelEmaV3(model, decay=config.ema) if config.ema else None
        self.scaler = torch.GradScaler(device.type, enabled=precision == "fp16")
        self._trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        self._set_lr()

    @property
    def lr(self) -> float:
        """The learning rate of the next update."""
        return float(self.optimizer.param_groups[0]["lr"])

    @property
    def averaged(self) -> nn.Module:
        """The weights to evaluate and to keep: the moving average where there is one."""
        return self.ema.module if self.ema is not None else self.model

    def step(self, loss: torch.Tensor, *, update: bool = True) -> None:
        """Add the gradient of `loss` (a scalar) and, with `update`, update the weights."""
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
        self._set_lr()

    def state_dict(self) -> dict[str, Any]:
        """Everything except the model's own weights; includes those of the moving average."""
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
        self._set_lr()

    def _set_lr(self) -> None:
        if self.schedule is not None:
            self.schedule.step_update(self.count)


def _run_grouped_convs_in_fp32(model: nn.Module) -> None:
    """Exclude trainable grouped convolutions from autocast.

    On CPUs their backward pass takes up to 19 times as long in bf16 as in float32 (torch 2.13, depthwise 5 x 5 with
    stride 2), which makes a bf16 step of EfficientNet-Lite0 slower than a float32 one.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.groups > 1 and module.weight.requires_grad:
            module.forward = MethodType(_forward_in_fp32, module)  # A method, so that a deep copy has its own.


def _forward_in_fp32(module: nn.Conv2d, images: torch.Tensor) -> torch.Tensor:
    with torch.autocast(images.device.type, enabled=False):
        return type(module).forward(module, images.float())


def _optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    if not any(p.requires_grad for p in model.parameters()):
        raise UserError("freeze_blocks: nothing is left to train; lower it")
    try:
        fused: dict[str, Any] = {"fused": True} if config.name in FUSED else {}
        optimizer = timm.optim.create_optimizer_v2(
            model, opt=config.name, lr=config.lr, weight_decay=config.weight_decay, **fused
        )
    except (AssertionError, ValueError, KeyError) as error:
        raise UserError(f"optim.name {config.name!r}: timm makes no such optimiser here ({error})") from error
    if getattr(optimizer, "is_second_order", False):
        raise UserError(f"optim.name {config.name!r}: takes second derivatives, which the loss does not give")
    return optimizer


def _schedule(optimizer: torch.optim.Optimizer, config: OptimConfig, total: int, per_epoch: float) -> Any:
    """timm's schedule, counted in updates: an "epoch" of its interface is one update here.

    timm's step of 90 epochs and its milestones for a run of 300 epochs become the same fractions of this run.
    """
    if config.schedule == "plateau":
        raise UserError("optim.schedule 'plateau' waits for a metric per epoch; choose one that follows the updates")
    warmup = min(round(config.warmup_epochs * per_epoch), total // 2)
    try:
        schedule, _ = timm.scheduler.create_scheduler_v2(
            optimizer,
            config.schedule,
            num_epochs=max(total, 1),
            decay_epochs=max(1, round(0.3 * total)) if config.schedule == "step" else None,
            decay_milestones=[round(fraction * total) for fraction in (0.3, 0.6, 0.9)],
            warmup_epochs=warmup,
            warmup_lr=config.lr / 100,
            step_on_epochs=False,
            updates_per_epoch=1,
        )
    except ValueError as error:
        raise UserError(f"optim.schedule {config.schedule!r}: {error}") from error
    return schedule
