"""Crop, resize and mirror many boxes of decoded images at once."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from repcon_kernels.functional import implementation_module

IMPLEMENTATIONS = ("torch", "triton")


def cut_crops(
    images: Sequence[Tensor], boxes: Tensor, flips: Tensor, out: Tensor, *, implementation: str = "torch"
) -> None:
    """Fill `out` with the boxes of each image, resized with the antialiased triangle filter, rounded to nearest even.

    images: n of (height, width, 3) uint8, contiguous, on the device of `out`.
    boxes: (n, c, 4) int32 x, y, width, height inside the images, on the CPU; the values are not checked.
    flips: (n, c) uint8, on the CPU: where not 0, the crop is mirrored left to right.
    out: (n * c, side, side, 3) uint8, contiguous; the crops of one image follow one another.
    implementation: "torch" (crop by crop: the specification) or "triton" (one launch; needs a GPU).

    Only a box's own pixels are averaged. Raises ValueError for shapes, dtypes, layouts and devices that do not fit.
    """
    _validate(images, boxes, flips, out, implementation)
    if not out.numel():
        return
    if implementation == "torch":
        _cut_with_torch(images, boxes, flips, out)
    else:
        implementation_module(implementation, out).cut_crops(images, boxes, flips, out)


def _cut_with_torch(images: Sequence[Tensor], boxes: Tensor, flips: Tensor, out: Tensor) -> None:
    targets = iter(out)
    for image, image_boxes, image_flips in zip(images, boxes.tolist(), flips.tolist(), strict=True):
        for (x, y, width, height), flip in zip(image_boxes, image_flips, strict=True):
            planes = image[y : y + height, x : x + width].permute(2, 0, 1)[None].float()
            crop = F.interpolate(planes, size=out.shape[1:3], mode="bilinear", antialias=True, align_corners=False)[0]
            crop = crop.flip(-1) if flip else crop
            next(targets).copy_(crop.round().clamp(0, 255).permute(1, 2, 0))


def _validate(images: Sequence[Tensor], boxes: Tensor, flips: Tensor, out: Tensor, implementation: str) -> None:
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation must be one of {', '.join(IMPLEMENTATIONS)}, not {implementation!r}")
    n, c = flips.shape if flips.dim() == 2 else (-1, -1)
    if n != len(images) or boxes.shape != (n, c, 4) or boxes.dtype != torch.int32 or flips.dtype != torch.uint8:
        raise ValueError(
            f"for {len(images)} images boxes must be (n, c, 4) int32 and flips (n, c) uint8, not "
            f"{tuple(boxes.shape)} {boxes.dtype} and {tuple(flips.shape)} {flips.dtype}"
        )
    if boxes.device.type != "cpu" or flips.device.type != "cpu":
        raise ValueError("boxes and flips must be on the CPU")
    square = out.dim() == 4 and out.shape == (n * c, out.shape[1], out.shape[1], 3)
    if not square or out.dtype != torch.uint8 or not out.is_contiguous():
        raise ValueError(f"out must be ({n * c}, side, side, 3) uint8, contiguous, not {tuple(out.shape)} {out.dtype}")
    for number, image in enumerate(images):
        valid = image.dim() == 3 and image.shape[2] == 3 and image.dtype == torch.uint8 and image.is_contiguous()
        if not valid or image.device != out.device:
            raise ValueError(
                f"image {number} must be (height, width, 3) uint8, contiguous, on {out.device}, not "
                f"{tuple(image.shape)} {image.dtype} on {image.device}"
            )
