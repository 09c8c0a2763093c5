"""Compile teachers by `torch.compile`, where that saves more time than it takes."""

from collections.abc import Callable, Sequence

import torch
from torch.utils.flop_counter import FlopCounterMode

from repcon.config import PrecomputeConfig
from repcon.models.custom import is_module_function
from repcon.models.preprocessing import normalise
from repcon.models.teacher import Teacher
from repcon.runtime.errors import UserError
from repcon.runtime.system import cores

FLOPS_PER_CORE = 100e9
"""Operations per second that a core reaches in an uncompiled forward pass: 118e9 for a ResNet-50, 38e9 for an
EfficientNet-Lite0, measured at 128 pixels in float32."""
MIN_SECONDS = 400.0
"""Seconds of uncompiled forward passes, at this rate, that are worth compiling. It takes half a minute per model and
saves 12 % of a ResNet-50's time and 30 % of an EfficientNet-Lite0's."""


def compile_teachers(
    teachers: Sequence[Teacher],
    config: PrecomputeConfig,
    device: torch.device,
    *,
    crops: int,
    on_note: Callable[[str], None],
) -> None:
    """Compile those teachers for which the recipe says so, for batches of its `batch_size`.

    `auto` compiles where `pays` says so of the store's `crops`, and goes on uncompiled, with a note, where that
    fails. Raises UserError naming the teacher where one with `compile = true` cannot be compiled.
    """
    settings = {teacher.name: teacher.compile for teacher in config.teachers}
    for teacher in teachers:
        setting = settings.get(teacher.name, False)
        if setting is True or (setting == "auto" and pays(teacher, crops, device)):
            on_note(f"teacher {teacher.name}: compiling it, which takes about half a minute")
            try:
                _compile(teacher, config.batch_size, device)
            except UserError as error:
                if setting is True:
                    raise
                teacher.uncompile()
                on_note(f"warning: {error}; it goes on uncompiled")


def pays(teacher: Teacher, crops: int, device: torch.device) -> bool:
    """Whether compiling saves more time than it takes, for so many crops.

    Answers compiled and uncompiled differ in their last bits, and a run that goes on has to repeat those of the run
    before. So this depends on the model, the crops of the whole store and the number of cores, not on timing. False on
    a GPU, where the gain has not been measured, and for a user's own module, which torch may not be able to compile.
    """
    if device.type != "cpu" or is_module_function(teacher.metadata.model):
        return False
    return flops_per_crop(teacher) * crops >= MIN_SECONDS * FLOPS_PER_CORE * cores()


@torch.no_grad()
def flops_per_crop(teacher: Teacher) -> int:
    """Floating-point operations (two per multiplication and addition) of one crop's forward pass on the CPU."""
    side = teacher.preprocessing.size
    inputs = normalise(torch.zeros((1, 3, side, side), dtype=torch.uint8), teacher.preprocessing, teacher.dtype)
    with FlopCounterMode(display=False) as counter:
        teacher.module(inputs)
    return counter.get_total_flops()


def _compile(teacher: Teacher, batch_size: int, device: torch.device) -> None:
    """Compile now rather than at the first batch, so that a failure names the setting, and for smaller batches too.

    Otherwise the last batch of the first unit would be compiled again.
    """
    side = teacher.preprocessing.size
    images = torch.zeros((batch_size, 3, side, side), dtype=torch.uint8, device=device)
    inputs = normalise(images, teacher.preprocessing, teacher.dtype).contiguous(memory_format=torch.channels_last)
    if batch_size > 1:
        torch._dynamo.mark_dynamic(inputs, 0)
    teacher.compile(device)
    try:
        teacher.forward(inputs)
    except UserError as error:
        raise UserError(f"{error}; set compile = false") from error
