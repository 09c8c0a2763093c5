"""Batch sizes that fit the memory: an estimate, and halving when memory runs out."""

import gc
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import nn

from repcon.models.teacher import Teacher
from repcon.runtime.device import out_of_memory
from repcon.runtime.errors import UserError
from repcon.runtime.memory import memory_total

MAX_BATCH = {"cpu": 32, "cuda": 1024}
"""On a CPU larger batches gain nothing: their activations exceed what malloc keeps (repcon.runtime.memory)."""
MEMORY_SHARE = {"cpu": 0.2, "cuda": 0.6}
"""Of the machine's or the GPU's whole memory: the same on every run, so that a resumed run repeats its batches."""

Result = TypeVar("Result")
Pixels = Mapping[int, torch.Tensor]
"""(B, 3, S, S) uint8 for each side S."""


class AdaptiveBatcher:
    """Splits batches into forward passes of at most `size` crops; halves `size` when memory runs out."""

    def __init__(self, size: int, device: torch.device, on_warning: Callable[[str], None]) -> None:
        """`on_warning` is called when the size changes."""
        self.size, self._device, self._on_warning = size, device, on_warning

    def run(self, pixels: Pixels, answer: Callable[[Pixels], Result]) -> list[Result]:
        """Results of `answer` for the parts of a batch, in order.

        Raises UserError where not even one crop fits.
        """
        count = len(next(iter(pixels.values())))
        results: list[Result] = []
        start = 0
        while start < count:
            stop = min(start + self.size, count)
            try:
                results.append(answer({side: images[start:stop] for side, images in pixels.items()}))
                start = stop
                continue
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
                if self.size == 1:
                    hint = "name fewer teachers per run"
                    raise UserError(f"device {self._device}: out of memory with one crop; {hint}") from error
            # Outside of `except`, whose traceback keeps the failed pass's tensors alive.
            self._halve()
        return results

    def _halve(self) -> None:
        message = f"out of memory with {self.size} crops per pass: going on with {self.size // 2}"
        self.size //= 2
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        self._on_warning(message)


def find_batch_size(teachers: Sequence[Teacher], device: torch.device) -> int:
    """The largest power of two whose pass fits the memory budget, at most `MAX_BATCH`.

    It depends on the models and the machine's total memory only, not on timing or on free memory: batch sizes affect
    the last bits of the answers, and a resumed run has to repeat them.
    """
    on_gpu = device.type == "cuda"
    memory = torch.cuda.get_device_properties(device).total_memory if on_gpu else memory_total()
    budget = MEMORY_SHARE[device.type] * memory
    per_crop = max(_bytes_per_crop(teacher, device) for teacher in teachers)
    size = MAX_BATCH[device.type]
    while size > 1 and size * per_crop > budget:
        size //= 2
    return size


@torch.inference_mode()
def _bytes_per_crop(teacher: Teacher, device: torch.device) -> float:
    """Memory of one crop at the widest layer: inputs and outputs, times two for temporaries."""
    widest = 0

    def note(module: nn.Module, inputs: tuple, output: object) -> None:
        nonlocal widest
        widest = max(widest, sum(value.nbytes for value in [*inputs, output] if isinstance(value, torch.Tensor)))

    leaves = [module for module in teacher.module.modules() if not any(module.children())]
    hooks = [leaf.register_forward_hook(note) for leaf in leaves]
    side = teacher.preprocessing.size
    try:
        teacher(torch.zeros((1, 3, side, side), dtype=torch.uint8, device=device))
    except torch.OutOfMemoryError as error:
        hint = "label with fewer teachers at a time, or in a lower precision"
        raise UserError(f"device {device}: out of memory with the teachers and one crop; {hint}") from error
    finally:
        for hook in hooks:
            hook.remove()
    return 2 * widest + 5 * 3 * side * side
