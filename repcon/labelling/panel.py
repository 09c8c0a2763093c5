"""The teachers of a run, side by side on one device: pixels in, what the store keeps of their answers out."""

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from repcon import backbones, topk
from repcon.errors import UserError
from repcon.teachers import Teacher

LARGEST_BATCH = {"cpu": 32, "cuda": 1024}
"""On a CPU larger batches gain nothing: their activations outgrow what the C library keeps (repcon.memory)."""
MEMORY_SHARE = {"cpu": 0.2, "cuda": 0.6}
"""Of the machine's or the GPU's whole memory: the same on every run, so that a resumed run repeats its batches."""

Labels = dict[str, tuple[torch.Tensor, torch.Tensor]]
"""Per head: ids (B, k) int32 and logp (B, k + T) float16."""


@dataclass(frozen=True, slots=True)
class Answers:
    """One batch's labels on their way to the host."""

    heads: Labels
    copied: "torch.cuda.Event | None"

    def wait(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Per head: ids (B, k) int32 and logp (B, k + T) float16, once they have arrived."""
        if self.copied is not None:
            self.copied.synchronize()
        return {name: (ids.numpy(), logp.numpy()) for name, (ids, logp) in self.heads.items()}


class Panel:
    """Teachers that see the same crops. Those of one size, normalisation and precision share the input tensor.

    batch_size: crops per forward pass. Where the memory does not hold it, it is halved, and `say` is told.
    """

    def __init__(
        self,
        teachers: Sequence[Teacher],
        k: int,
        temperatures: Sequence[float],
        *,
        device: torch.device,
        batch_size: int,
        say: Callable[[str], None],
    ) -> None:
        self.batch_size = batch_size
        self._teachers, self._k, self._temperatures = tuple(teachers), k, tuple(temperatures)
        self._device, self._say = device, say

    def __call__(self, pixels: Mapping[int, torch.Tensor], heads: Sequence[str]) -> Answers:
        """Pixels (B, 3, S, S) uint8 for each side S to the labels of the teachers that `heads` names."""
        count = len(next(iter(pixels.values())))
        parts: list[Labels] = []
        start = 0
        while start < count:
            stop = min(start + self.batch_size, count)
            part = self._attempt({side: images[start:stop] for side, images in pixels.items()}, heads)
            if part is not None:
                parts.append(part)
                start = stop
        return self._to_host(parts)

    def _attempt(self, pixels: Mapping[int, torch.Tensor], heads: Sequence[str]) -> Labels | None:
        """One pass; None when the memory did not hold it, and the batch size is halved for the next attempt."""
        try:
            return self._answer(pixels, heads)
        except RuntimeError as error:
            if not _out_of_memory(error):
                raise
            if self.batch_size == 1:
                raise UserError(
                    f"device {self._device}: out of memory with one crop; name fewer teachers per run"
                ) from error
            message = f"out of memory with {self.batch_size} crops per pass: going on with {self.batch_size // 2}"
        # Outside of `except`, whose traceback keeps the failed pass's tensors alive.
        self.batch_size //= 2
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        self._say(message)
        return None

    @torch.inference_mode()
    def _answer(self, pixels: Mapping[int, torch.Tensor], heads: Sequence[str]) -> Labels:
        there = {side: images.to(self._device, non_blocking=True) for side, images in pixels.items()}
        inputs: dict[object, torch.Tensor] = {}
        answers: Labels = {}
        for teacher in (teacher for teacher in self._teachers if teacher.name in heads):
            key = (teacher.preprocessing, teacher.dtype)
            if key not in inputs:
                images = there[teacher.preprocessing.size]
                inputs[key] = backbones.normalise(images, teacher.preprocessing, teacher.dtype)
            ids, logp = topk.encode(teacher.answer(inputs[key]), self._k, self._temperatures)
            answers[teacher.name] = (ids.to(torch.int32), logp.to(torch.float16))
        return answers

    def _to_host(self, parts: list[Labels]) -> Answers:
        heads = {
            name: (torch.cat([part[name][0] for part in parts]), torch.cat([part[name][1] for part in parts]))
            for name in parts[0]
        }
        if self._device.type != "cuda":
            return Answers(heads, None)
        heads = {name: (_pinned(ids), _pinned(logp)) for name, (ids, logp) in heads.items()}
        copied = torch.cuda.Event()
        copied.record()
        return Answers(heads, copied)


def _pinned(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


def _out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def find_batch_size(teachers: Sequence[Teacher], device: torch.device) -> int:
    """The largest power of two whose pass fits the memory budget, at most `LARGEST_BATCH`.

    It follows from the models and from the machine's whole memory, never from timing or from what is free just
    now: batch sizes show in the last bits of the answers, and a resumed run has to repeat them.
    """
    budget = MEMORY_SHARE[device.type] * _memory_bytes(device)
    per_crop = max(_bytes_per_crop(teacher, device) for teacher in teachers)
    size = LARGEST_BATCH[device.type]
    while size > 1 and size * per_crop > budget:
        size //= 2
    return size


def _memory_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    import os

    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@torch.inference_mode()
def _bytes_per_crop(teacher: Teacher, device: torch.device) -> float:
    """Memory that one crop takes at the widest layer: what goes in and what comes out, twice over for temporaries."""
    widest = 0

    def note(module: nn.Module, inputs: tuple, output: object) -> None:
        nonlocal widest
        widest = max(widest, sum(_tensor_bytes([*inputs, output])))

    leaves = [module for module in teacher.module.modules() if not any(module.children())]
    hooks = [leaf.register_forward_hook(note) for leaf in leaves]
    side = teacher.preprocessing.size
    try:
        teacher(torch.zeros((1, 3, side, side), dtype=torch.uint8, device=device))
    finally:
        for hook in hooks:
            hook.remove()
    return 2 * widest + 5 * 3 * side * side


def _tensor_bytes(values: Sequence[object]) -> Iterator[int]:
    return (value.numel() * value.element_size() for value in values if isinstance(value, torch.Tensor))
