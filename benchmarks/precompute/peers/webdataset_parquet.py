"""A webdataset whose crops a DataLoader's workers cut with torchvision, and a Parquet file."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as arrow
import pyarrow.parquet as parquet
import torch

from benchmarks.loaders.peers.contenders import decoder
from benchmarks.precompute.peers.task import Task


def write_tars(images: Path, out: Path, per_tar: int) -> None:
    """The folder's images as tars; not part of the timed work, as repcon's pack is not."""
    import webdataset  # pyright: ignore[reportMissingImports]

    out.mkdir()
    with webdataset.ShardWriter(str(out / "%06d.tar"), maxcount=per_tar, verbose=0) as writer:
        for path in sorted(images.glob("*.jpg")):
            writer.write({"__key__": path.stem, "jpg": path.read_bytes()})


def label(task: Task, tars: Path) -> None:
    """Write labels.parquet, a row per crop."""
    import webdataset  # pyright: ignore[reportMissingImports]
    from torchvision.transforms.v2 import functional

    decode = decoder()

    def cut(sample: dict[str, Any]) -> tuple[int, torch.Tensor]:
        number, image, crops = int(sample["__key__"]), decode(sample["jpg"]), []
        for (x, y, width, height), flip in zip(task.boxes[number].tolist(), task.flips[number], strict=True):
            crop = functional.resized_crop(image, y, x, height, width, [task.size, task.size], antialias=True)
            crops.append(functional.horizontal_flip(crop) if flip else crop)
        return number, torch.stack(crops)

    shards = sorted(str(path) for path in tars.glob("*.tar"))
    data = webdataset.WebDataset(shards, shardshuffle=False).map(cut).batched(task.images_per_batch)
    loader = webdataset.WebLoader(data, batch_size=None, num_workers=min(task.workers, len(shards)))
    forward = task.load()
    mean, std = (255 * torch.tensor(values).view(1, 3, 1, 1) for values in (task.mean, task.std))
    task.out.mkdir()
    writer = None
    for numbers, crops in loader:
        inputs = ((crops.flatten(0, 1).float() - mean) / std).contiguous(memory_format=torch.channels_last)
        logp, ids = forward(inputs).float().log_softmax(1).topk(task.k)
        numbers = np.asarray(numbers)
        columns = {
            "image": np.repeat(numbers, crops.shape[1]),
            "crop": np.tile(np.arange(crops.shape[1]), len(numbers)),
            "box": list(task.boxes[numbers].reshape(-1, 4)),
            "flip": task.flips[numbers].reshape(-1),
            "ids": list(ids.numpy().astype(np.uint16)),
            "logp": list(logp.numpy().astype(np.float16)),
        }
        table = arrow.table(columns)
        writer = writer or parquet.ParquetWriter(task.out / "labels.parquet", table.schema, compression="zstd")
        writer.write_table(table)
    if writer:
        writer.close()
