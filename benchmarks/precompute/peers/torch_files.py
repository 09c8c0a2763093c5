"""A DataLoader with Pillow and torchvision, and a file per image, as FKD writes them."""

from typing import Any

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import functional

from benchmarks.precompute.peers.task import Task


class Images(Dataset):
    """An image's normalised crops (c, 3, S, S), and its number."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.paths = sorted(task.images.glob("*.jpg"))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, number: int) -> tuple[torch.Tensor, int]:
        image: Any = Image.open(self.paths[number]).convert("RGB")
        crops = []
        for (x, y, width, height), flip in zip(self.task.boxes[number].tolist(), self.task.flips[number], strict=True):
            crop: Any = functional.resized_crop(image, y, x, height, width, [self.task.size, self.task.size])
            if flip:
                crop = functional.hflip(crop)
            tensor = functional.to_tensor(crop)
            crops.append(functional.normalize(tensor, list(self.task.mean), list(self.task.std)))
        return torch.stack(crops), number


def label(task: Task) -> None:
    """Write `<number>.pt` with boxes, flips, ids and log-probabilities of each image."""
    task.out.mkdir()
    forward = task.load()
    for crops, numbers in DataLoader(Images(task), batch_size=task.images_per_batch, num_workers=task.workers):
        logits = forward(crops.flatten(0, 1).contiguous(memory_format=torch.channels_last)).float()
        logp, ids = logits.log_softmax(1).topk(task.k)
        parts = zip(logp.unflatten(0, crops.shape[:2]), ids.unflatten(0, crops.shape[:2]), strict=True)
        for number, (image_logp, image_ids) in zip(numbers.tolist(), parts, strict=True):
            held = [task.boxes[number], task.flips[number], image_ids.clone(), image_logp.clone()]
            torch.save([torch.as_tensor(part) for part in held], task.out / f"{number:06d}.pt")
