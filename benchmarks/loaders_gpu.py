"""On a GPU: whether DALI's mixed decode keeps up with a ResNet-50 student. Made and not yet run on one."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from loaders_contenders import Case, Contender
from records import put

BATCH, SIDE = 256, 224


def feeding(pack: Path, images: int, threads: int, rounds: int, figures: dict[str, Any]) -> None:
    """Crops per second of the mixed decoder, 1 and 4 per image, over those that ResNet-50's training steps take."""
    steps = _resnet50_rates(rounds)
    put(figures, "resnet50_images_per_second", steps)
    loader = Contender("dali_mixed", threads)
    for crops, name in ((1, "dali_mixed"), (4, "dali_mixed_4")):
        loader.open(Case(pack=str(pack), crops=crops, side=SIDE))
        rates = np.array([images * crops / loader.epoch() for _ in range(rounds)])
        put(figures, f"{name}_crops_per_second", rates)
        put(figures, f"{name}_images_per_second", rates / crops)
        put(figures, f"{name}_over_resnet50", rates / np.array(steps))
    loader.close()


def _resnet50_rates(rounds: int, steps: int = 20) -> list[float]:
    """bf16, channels-last, on one batch that lies in the GPU's memory; the first round only warms up."""
    model = timm.create_model("resnet50").to("cuda", memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    pixels = torch.randn(BATCH, 3, SIDE, SIDE, device="cuda").contiguous(memory_format=torch.channels_last)
    labels = torch.randint(1000, (BATCH,), device="cuda")
    rates = []
    for _ in range(rounds + 1):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(steps):
            with torch.autocast("cuda", torch.bfloat16):
                loss = F.cross_entropy(model(pixels), labels)
            loss.backward()
            optimiser.step()
            optimiser.zero_grad()
        torch.cuda.synchronize()
        rates.append(BATCH * steps / (time.perf_counter() - start))
    return rates[1:]
