"""Ray Data: files to labels with `map_batches` over a teacher per core, written as Parquet."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.loaders.peers.contenders import decoder
from benchmarks.precompute.peers.task import Task


class Label:
    """Decodes, cuts and labels a batch of files."""

    def __init__(self, task: Task) -> None:
        torch.set_num_threads(1)
        self.task, self.forward, self.decode = task, task.load(), decoder()
        self.mean, self.std = (255 * torch.tensor(values).view(1, 3, 1, 1) for values in (task.mean, task.std))

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        from torchvision.transforms.v2 import functional

        task, crops = self.task, []
        numbers = np.array([int(Path(path).stem) for path in batch["path"]])
        for number, data in zip(numbers, batch["bytes"], strict=True):
            image = self.decode(data)
            for (x, y, width, height), flip in zip(task.boxes[number].tolist(), task.flips[number], strict=True):
                crop = functional.resized_crop(image, y, x, height, width, [task.size, task.size], antialias=True)
                crops.append(functional.horizontal_flip(crop) if flip else crop)
        inputs = ((torch.stack(crops).float() - self.mean) / self.std).contiguous(memory_format=torch.channels_last)
        logp, ids = self.forward(inputs).float().log_softmax(1).topk(task.k)
        each = task.boxes.shape[1]
        return {
            "image": np.repeat(numbers, each),
            "crop": np.tile(np.arange(each), len(numbers)),
            "box": task.boxes[numbers].reshape(-1, 4),
            "flip": task.flips[numbers].reshape(-1),
            "ids": ids.numpy().astype(np.uint16),
            "logp": logp.numpy().astype(np.float16),
        }


def label(task: Task) -> None:
    """Write a folder of Parquet files, a row per crop. Ray is running."""
    import ray

    files = ray.data.read_binary_files(str(task.images), include_paths=True, file_extensions=["jpg"])
    labels = files.map_batches(
        Label, fn_constructor_args=(task,), batch_size=task.images_per_batch, num_cpus=1,
        compute=ray.data.ActorPoolStrategy(size=task.workers),
    )  # fmt: skip
    labels.write_parquet(str(task.out))
