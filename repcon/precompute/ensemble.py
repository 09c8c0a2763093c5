"""Several teachers on the same batches: from pixels to top-k labels."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from repcon.labels import topk
from repcon.models.custom import is_module_function
from repcon.models.output_checks import (
    BATCH_INDEPENDENCE_ROWS,
    check_deterministic,
    check_not_probabilities,
    mutual_information,
)
from repcon.models.preprocessing import normalise
from repcon.models.teacher import Teacher
from repcon.precompute.batching import AdaptiveBatcher, Pixels

SAMPLE, MIN_SAMPLE = 64, 4
"""Crops in the sample that shows whether a teacher's answers depend on the image, and the least number for it."""
MIN_INFORMATION = 1e-3
"""Mutual information of answer and image in nat below which a warning is given."""
HeadLabels = dict[str, tuple[torch.Tensor, torch.Tensor]]
"""Per head: ids (B, k) int32 and logp (B, k + T) float16."""


@dataclass(frozen=True, slots=True)
class LabelsInFlight:
    """One batch's labels, being copied to the host."""

    heads: HeadLabels
    copied: "torch.cuda.Event | None"

    def wait(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Per head: ids (B, k) int32 and logp (B, k + T) float16, once the copy is complete."""
        if self.copied is not None:
            self.copied.synchronize()
        return {name: (ids.numpy(), logp.numpy()) for name, (ids, logp) in self.heads.items()}


class TeacherEnsemble:
    """Teachers that label the same crops. Those of equal size, normalisation and precision share the input tensor.

    batch_size: crops per forward pass, halved when memory runs out, which `on_warning` reports.
    """

    def __init__(
        self,
        teachers: Sequence[Teacher],
        k: int,
        temperatures: Sequence[float],
        *,
        device: torch.device,
        batch_size: int,
        on_warning: Callable[[str], None],
    ) -> None:
        self._batcher = AdaptiveBatcher(batch_size, device, on_warning)
        self._teachers, self._k, self._temperatures = tuple(teachers), k, tuple(temperatures)
        self._device, self._on_warning = device, on_warning
        self._checked: set[str] = set()
        self._samples = {teacher.name: torch.empty(0, teacher.metadata.num_classes) for teacher in teachers}

    def __call__(self, pixels: Pixels, heads: Sequence[str]) -> LabelsInFlight:
        """Pixels (B, 3, S, S) uint8 for each side S to the labels of the teachers that `heads` names."""
        return self._to_host(self._batcher.run(pixels, lambda part: self._answer(part, heads)))

    @torch.inference_mode()
    def _answer(self, pixels: Pixels, heads: Sequence[str]) -> HeadLabels:
        on_device = {side: images.to(self._device, non_blocking=True) for side, images in pixels.items()}
        inputs: dict[object, torch.Tensor] = {}
        labels: HeadLabels = {}
        teachers = [teacher for teacher in self._teachers if teacher.name in heads]
        keys = [(teacher.preprocessing, teacher.dtype) for teacher in teachers]
        for teacher, key in zip(teachers, keys, strict=True):
            if key not in inputs:
                images = on_device[teacher.preprocessing.size]
                inputs[key] = normalise(images, teacher.preprocessing, teacher.dtype)
            # A user's module may change its input in place, which other teachers need unchanged.
            own = keys.count(key) > 1 and is_module_function(teacher.metadata.model)
            given = inputs[key].clone() if own else inputs[key]
            first = None if teacher.name in self._checked else given[:BATCH_INDEPENDENCE_ROWS].clone()
            logits = teacher.forward(given)
            if first is not None:
                self._check(teacher, first, logits)
            if teacher.name in self._samples:
                self._sample(teacher.name, logits)
            ids, logp = topk.encode(logits, self._k, self._temperatures)
            labels[teacher.name] = (ids.to(torch.int32), logp.to(torch.float16))
        return labels

    def _check(self, teacher: Teacher, inputs: torch.Tensor, logits: torch.Tensor) -> None:
        """Checks a teacher's first batch: finite, repeatable logits."""
        who = f"teacher {teacher.name}"
        with torch.compiler.set_stance("force_eager"):  # else it would be compiled for these batch sizes as well
            check_deterministic(teacher.forward, inputs, logits, who)
        if warning := check_not_probabilities(logits, teacher.dtype, who):
            self._on_warning(f"warning: {warning}")
        self._checked.add(teacher.name)

    def _sample(self, name: str, logits: torch.Tensor) -> None:
        """Adds to the sample that shows whether a teacher's answers depend on the image, and checks a complete one."""
        self._samples[name] = torch.cat([self._samples[name], logits[:SAMPLE].cpu()])
        if len(self._samples[name]) >= SAMPLE:
            self._check_sample(name)

    def finish(self) -> None:
        """Checks the samples that are not complete because there were too few images."""
        for name in [name for name, sample in self._samples.items() if len(sample) >= MIN_SAMPLE]:
            self._check_sample(name)

    def _check_sample(self, name: str) -> None:
        sample = self._samples.pop(name)
        found = mutual_information(sample)
        if found < MIN_INFORMATION:
            much = f"{found:.1g} nat on average over {len(sample)} crops"
            hint = "check its mean and std, its weights, and whether these are images that it knows"
            self._on_warning(f"warning: teacher {name}: its answers hardly differ between images ({much}); {hint}")

    def _to_host(self, parts: list[HeadLabels]) -> LabelsInFlight:
        heads = {
            name: (torch.cat([part[name][0] for part in parts]), torch.cat([part[name][1] for part in parts]))
            for name in parts[0]
        }
        if self._device.type != "cuda":
            return LabelsInFlight(heads, None)
        heads = {name: (_pinned(ids), _pinned(logp)) for name, (ids, logp) in heads.items()}
        copied = torch.cuda.Event()
        copied.record(torch.cuda.current_stream(self._device))
        return LabelsInFlight(heads, copied)


def _pinned(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
