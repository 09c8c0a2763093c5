"""DALI decoding on a GPU: whether it gives the teacher's crop, and keeps a ResNet-50 student fed.

    python -m benchmarks.loaders.gpu [--data FOLDER] [--json FILE] [--record]

resnet50_images_per_second   of its training steps alone: bf16, channels-last, one batch that lies in the GPU's memory
dali_mixed_1, _4             crops per second of mixed decode, 1 and 4 crops of 224 pixels per image; images per second;
                             _over_resnet50: crops per second over those that the training steps take
cut_us_per_crop              of the launch that cuts, resizes and flips, on decoded images
cut_share_of_step            of the time of a training step, what cutting its crops takes the GPU
dali_mixed_pixel_difference  mean absolute, of 255, to the float32 reference on the CPU
dali_mixed_label_kl, _kl_worst, _agreement   from the label that `repcon precompute` stored, through the reference
                             loader on this GPU, to the teacher on the crop of mixed decode; reference_: on its own

Pictures as in loaders.py: mosaics of photographs of 400 x 300 pixels, and photographs as they are for the labels.
"""

import tempfile
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from repcon_kernels import cut_crops

from benchmarks.harness import script
from benchmarks.harness.records import put
from benchmarks.loaders.contenders import MAKERS, Case, Contender
from benchmarks.loaders.contract import contract, put_contract
from benchmarks.loaders.sample_images import generated, mosaics, pack, photographs
from repcon.config import CropConfig
from repcon.crops.plan import plan_crops
from repcon.decode.reference import decode
from repcon.images.pack import ImagePack
from repcon.models.timm_import import timm
from repcon.runtime.console import console
from repcon.runtime.errors import UserError
from repcon.runtime.system import cores

IMAGES, LABELLED, PICTURE = 2048, 1024, (400, 300)
BATCH, SIDE = 256, 224
ROUNDS, STEPS = 7, 10
CUT = 16
"""Crops of each image in the launches whose time is taken."""


def main() -> None:
    arguments = script.parser("DALI decoding on a GPU.", data="folder of tars of photographs").parse_args()
    if not torch.cuda.is_available():
        raise UserError("loaders_gpu: torch sees no CUDA device here")
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(arguments.data, Path(folder))
    title = f"DALI on a GPU, crops of {SIDE} pixels; pictures: {figures['pictures']}"
    script.finish_figures("loaders-gpu", figures, title, arguments)


def measure(data: str, folder: Path) -> dict[str, Any]:
    """All figures."""
    console.quiet = True
    taken = photographs(Path(data), LABELLED) if data else []
    packed = pack(mosaics(taken, IMAGES, PICTURE) if taken else generated(IMAGES, PICTURE), folder / "pack")
    labelled = pack(taken, folder / "labelled") if taken else packed
    console.quiet = False
    small = ImagePack.open(packed)
    figures: dict[str, Any] = {
        "pictures": "photographs" if data else "generated",
        "threads": cores(),
        "images": len(small),
        "bytes_per_image": float(small.lengths.mean()),
    }
    feeding(packed, figures)
    cutting(small, figures)
    figures["label_images"] = len(ImagePack.open(labelled))
    for kind, found in contract(labelled, folder / "labels.zarr", SIDE, ("dali",), "cuda").items():
        put_contract(figures, "dali_mixed" if kind == "dali" else kind, found)
    return figures


def feeding(packed: Path, figures: dict[str, Any]) -> None:
    """Adds what the student takes and what mixed decode gives, one after the other."""
    steps = resnet50_rates()
    put(figures, "resnet50_images_per_second", steps)
    with closing(Contender("dali_mixed", MAKERS["dali_mixed"], cores())) as loader:
        for count in (1, 4):
            opened = loader.open(Case(pack=str(packed), crops=count, side=SIDE))
            rates = np.array([IMAGES * count / loader.epoch() for _ in range(ROUNDS)])
            name = f"dali_mixed_{count}"
            put(figures, f"{name}_crops_per_second", rates)
            put(figures, f"{name}_images_per_second", rates / count)
            put(figures, f"{name}_over_resnet50", rates / np.array(steps))
            figures[f"{name}_first_batch_seconds"] = opened.first_batch_seconds


def cutting(small: ImagePack, figures: dict[str, Any]) -> None:
    """Adds the time of launches that are large enough to hide Python's."""
    images = [torch.tensor(decode(small.read(row)), device="cuda") for row in range(BATCH)]
    plan = plan_crops(CropConfig(), small.hashes[:BATCH], small.sizes[:BATCH], range(CUT))
    boxes = torch.from_numpy(plan.boxes.swapaxes(0, 1).astype(np.int32))
    flips = torch.from_numpy(np.ascontiguousarray(plan.flips.swapaxes(0, 1)))
    out = torch.empty((BATCH * CUT, SIDE, SIDE, 3), dtype=torch.uint8, device="cuda")
    samples = []
    for _ in range(ROUNDS + 1):
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        first.record()
        for _ in range(STEPS):
            cut_crops(images, boxes, flips, out, implementation="triton")
        last.record()
        last.synchronize()
        samples.append(1e3 * first.elapsed_time(last) / (STEPS * len(out)))
    put(figures, "cut_us_per_crop", samples[1:])
    figures["cut_share_of_step"] = figures["cut_us_per_crop"] * 1e-6 * figures["resnet50_images_per_second"]


def resnet50_rates() -> list[float]:
    """Images per second, a number per round; the first round only warms up."""
    model = timm.create_model("resnet50").to("cuda", memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    pixels = torch.randn(BATCH, 3, SIDE, SIDE, device="cuda").contiguous(memory_format=torch.channels_last)
    labels = torch.randint(1000, (BATCH,), device="cuda")
    rates = []
    for _ in range(ROUNDS + 1):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(STEPS):
            with torch.autocast("cuda", torch.bfloat16):
                loss = F.cross_entropy(model(pixels), labels)
            loss.backward()
            optimiser.step()
            optimiser.zero_grad()
        torch.cuda.synchronize()
        rates.append(BATCH * STEPS / (time.perf_counter() - start))
    return rates[1:]


if __name__ == "__main__":
    script.run(main)
