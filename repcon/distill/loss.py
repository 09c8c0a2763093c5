"""The training loss: the KL of every head from its stored labels, with temperature, weight and tail mode."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from importlib.util import find_spec

import torch
from repcon_kernels import HeadSpec, multi_head_kl
from torch import Tensor

from repcon.config import HeadConfig, LossKind, Tail
from repcon.labels.store import HeadInfo
from repcon.runtime.console import print_plain
from repcon.runtime.errors import UserError

MAX_DEFAULT_TEMPERATURE = 2.0
"""The highest temperature that is chosen for a head without one."""

_announced: set[str] = set()


class MultiHeadKLLoss:
    """KL divergence of the student's heads from the stored labels of their teachers.

        loss = MultiHeadKLLoss(store.heads, [HeadConfig(name="birds", temperature=2.0), HeadConfig(name="generalist")])
        loss(logits, {"birds": (ids, logp), "generalist": (ids, logp)}, rows).sum().backward()

    The logits hold the heads' columns one after another in the order of `heads`, as in `Student`.

    store_heads: the store's heads, `LabelStore.heads`.
    heads: those that count, with weight and temperature.
    tail: how the classes that were not stored count; "bucket" and "uniform" need the temperature's stored tail.
    implementation: "auto" takes "triton" on a GPU and "torch" elsewhere.
    announce: print once which implementation is used; for the loss that is trained on.

    Raises UserError naming the head that is not in the store, occurs twice, or has a temperature without stored tail.
    """

    def __init__(
        self,
        store_heads: Mapping[str, HeadInfo],
        heads: Sequence[HeadConfig],
        *,
        tail: Tail = "uniform",
        implementation: LossKind = "auto",
        device: torch.device | str = "cpu",
        announce: bool = True,
    ) -> None:
        self.names = tuple(head.name for head in heads)
        self.device = torch.device(device)
        self.tail = tail
        self.specs = _head_specs(store_heads, heads, tail)
        self.weights = torch.tensor([head.weight for head in heads], dtype=torch.float32, device=self.device)
        self.implementation, reason = choose_implementation(implementation, self.device)
        if self.implementation == "triton" and self.device.type == "cuda":
            from repcon_kernels.kl_div.launch import arrival_counters  # imports Triton, which takes a second

            # Allocated now: during torch.compile's warm-up for CUDA graphs they would lie in a graph's own memory.
            arrival_counters(self.device, len(self.names))
        count = f"{len(self.names)} head{'s' if len(self.names) > 1 else ''}"
        if announce:
            _announce(f"loss: {self.implementation} on {self.device} ({reason}), tail {tail}, {count}")

    def __call__(
        self, logits: Tensor, labels: Mapping[str, tuple[Tensor, Tensor]], rows: Tensor | None = None
    ) -> Tensor:
        """(H,) float32 in the order of `names`: weight x temperature^2 x mean KL over the batch. Sum them up.

        logits: (B, sum of classes), float32, bfloat16 or float16.
        labels: per head, ids (R, k) and log-probabilities with log-tails (R, k + T) as the store gives them.
        rows: (B,) int64, the label row of each row of logits; None where R = B and they correspond.
        """
        missing = [name for name in self.names if name not in labels]
        if missing:
            raise UserError(f"labels: no labels of head {missing[0]!r} were given; read the store with this head")
        if logits.shape[1] != self.specs[-1].stop:
            raise UserError(
                f"logits: {logits.shape[1]} columns, but the heads {', '.join(self.names)} have {self.specs[-1].stop} "
                "classes; build the student with the same heads in the same order"
            )
        return multi_head_kl(
            logits,
            self.specs,
            [labels[name][0] for name in self.names],
            [labels[name][1] for name in self.names],
            rows=rows,
            weights=self.weights,
            tail=self.tail,
            implementation=self.implementation,
        )


def choose_implementation(implementation: LossKind, device: torch.device) -> tuple[str, str]:
    """(implementation, reason) for this device. Raises UserError where Triton is asked for and cannot run."""
    installed = find_spec("triton") is not None
    if implementation == "triton" and not installed:
        raise UserError("loss: 'triton' was asked for, but the package is not installed: pip install triton")
    if implementation == "triton" and device.type == "cpu":
        from repcon_kernels.kl_div.launch import interpreted  # imports Triton, as above

        if not interpreted():
            raise UserError("loss: 'triton' was asked for, and needs a GPU; use 'torch' or 'auto' here")
    if implementation != "auto":
        return implementation, "as asked for"
    if device.type == "cuda" and not installed:
        return "torch", "Triton is not installed: pip install triton for a faster loss"
    return ("triton" if device.type == "cuda" else "torch"), f"the choice for {device.type}"


def _head_specs(store_heads: Mapping[str, HeadInfo], heads: Sequence[HeadConfig], tail: Tail) -> tuple[HeadSpec, ...]:
    if not heads:
        raise UserError("heads: none are left to train on; name some of the store's: " + ", ".join(store_heads))
    specs: list[HeadSpec] = []
    for index, head in enumerate(heads):
        if head.name not in store_heads:
            raise UserError(f"heads: the store has no {head.name!r}; it has {', '.join(store_heads)}")
        if head.name in {earlier.name for earlier in heads[:index]}:
            raise UserError(f"heads: {head.name!r} occurs twice; name each head once")
        if not (math.isfinite(head.weight) and head.weight >= 0):
            raise UserError(f"head {head.name!r}: weight must be a number of at least 0, not {head.weight}")
        stored = store_heads[head.name]
        if head.temperature == 0:
            head = dataclasses.replace(head, temperature=default_temperature(stored.temperatures))
        specs.append(
            HeadSpec(
                start=specs[-1].stop if specs else 0,
                classes=stored.classes,
                k=stored.k,
                temperature=head.temperature,
                tail_column=_tail_column(head, stored, tail),
            )
        )
    return tuple(specs)


def default_temperature(stored: Sequence[float]) -> float:
    """The highest stored temperature of at most 2, else the lowest."""
    return max((temperature for temperature in stored if temperature <= MAX_DEFAULT_TEMPERATURE), default=min(stored))


def _tail_column(head: HeadConfig, stored: HeadInfo, tail: Tail) -> int:
    """The column of the stored log-tail for the head's temperature; 0 where none is needed."""
    if not (math.isfinite(head.temperature) and head.temperature > 0):
        raise UserError(f"head {head.name!r}: temperature must be a number above 0, not {head.temperature}")
    for column, temperature in enumerate(stored.temperatures):
        if math.isclose(temperature, head.temperature, rel_tol=1e-6):
            return column
    if tail == "renormalise":
        return 0
    raise UserError(
        f"head {head.name!r}: temperature {head.temperature:g} is not among those whose tails the store holds "
        f"({', '.join(f'{temperature:g}' for temperature in stored.temperatures)}); take one of them, or tail = "
        "'renormalise', or precompute with this temperature"
    )


def _announce(message: str) -> None:
    """Print a message once per run, on rank 0."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if message not in _announced and not (distributed and torch.distributed.get_rank() > 0):
        print_plain(message)
    _announced.add(message)
