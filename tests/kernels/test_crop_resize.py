"""Crops by the Triton kernel against torch's own resize, which defines them."""

import numpy as np
import pytest
import torch
from repcon_kernels import cut_crops

SIZES = [(41, 27), (1, 1), (90, 3), (3, 70), (16, 16)]


def pictures(generator: np.random.Generator, device: str) -> list[torch.Tensor]:
    """(height, width, 3) uint8 of each size, noise: every misplaced tap shows."""
    return [torch.from_numpy(generator.integers(0, 256, (h, w, 3), np.uint8)).to(device) for w, h in SIZES]


def boxes_of(generator: np.random.Generator, count: int) -> torch.Tensor:
    """(images, count, 4) int32: the whole image, its last pixel, and any."""
    found = []
    for width, height in SIZES:
        mine = [(0, 0, width, height), (width - 1, height - 1, 1, 1)]
        for _ in range(count - 2):
            w, h = int(generator.integers(1, width + 1)), int(generator.integers(1, height + 1))
            mine.append((int(generator.integers(0, width - w + 1)), int(generator.integers(0, height - h + 1)), w, h))
        found.append(mine)
    return torch.tensor(found, dtype=torch.int32)


@pytest.mark.parametrize("side", [7, 16, 23])
def test_the_kernel_cuts_what_torch_cuts(side: int, device: str) -> None:
    generator = np.random.default_rng(side)
    images, boxes = pictures(generator, device), boxes_of(generator, 4)
    flips = torch.from_numpy(generator.integers(0, 2, (len(SIZES), 4)).astype(np.uint8))
    results = []
    for implementation in ("torch", "triton"):
        out = torch.full((len(SIZES) * 4, side, side, 3), 77, dtype=torch.uint8, device=device)
        cut_crops(images, boxes, flips, out, implementation=implementation)
        results.append(out.cpu().float())
    gap = (results[0] - results[1]).abs()
    assert gap.max() <= 1 and gap.mean() <= 0.01


def test_neighbouring_memory_is_left_alone(device: str) -> None:
    around = torch.full((3, 5, 5, 3), 77, dtype=torch.uint8, device=device)
    image = torch.zeros(4, 4, 3, dtype=torch.uint8, device=device)
    box = torch.tensor([[[0, 0, 4, 4]]], dtype=torch.int32)
    cut_crops([image], box, torch.zeros(1, 1, dtype=torch.uint8), around[1:2], implementation="triton")
    assert (around[[0, 2]] == 77).all() and (around[1] == 0).all()


def test_no_crops_are_no_work(device: str) -> None:
    image = torch.zeros(4, 4, 3, dtype=torch.uint8, device=device)
    empty = torch.empty(1, 0, 4, dtype=torch.int32), torch.empty(1, 0, dtype=torch.uint8)
    for implementation in ("torch", "triton"):
        out = torch.empty(0, 5, 5, 3, dtype=torch.uint8, device=device)
        cut_crops([image], *empty, out, implementation=implementation)


def test_mistakes() -> None:
    image = torch.zeros(4, 6, 3, dtype=torch.uint8)
    box, flip = torch.tensor([[[0, 0, 4, 4]]], dtype=torch.int32), torch.zeros(1, 1, dtype=torch.uint8)
    out = torch.empty(1, 5, 5, 3, dtype=torch.uint8)
    mistakes = {
        "boxes must be": ([image], box.long(), flip, out),
        "for 2 images": ([image, image], box, flip, out),
        "flips": ([image], box, flip.bool(), out),
        "out must be": ([image], box, flip, out[:, :4]),
        "contiguous, not": ([image], box, flip, out.permute(0, 2, 1, 3)),
        "image 0 must be": ([image.float()], box, flip, out),
        "contiguous, on": ([image[:, :3]], box, flip, out),
    }
    for message, arguments in mistakes.items():
        with pytest.raises(ValueError, match=message):
            cut_crops(*arguments)
    with pytest.raises(ValueError, match="implementation must be"):
        cut_crops([image], box, flip, out, implementation="reference")
