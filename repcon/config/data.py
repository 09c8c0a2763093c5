"""Settings of packs, class subsets and crops."""

from dataclasses import dataclass
from typing import Annotated

from tyro.conf import Positional, arg

from repcon.config.base import BaseConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassSubset(BaseConfig):
    """A part of a data set's classes: those of `names`, or a slice [start, stop) of all, shuffled by `seed`."""

    names: Annotated[tuple[str, ...], arg(name="")] = ()
    """Classes by name or number (`--classes 5 6 7`); a number counts the pack's classes in their order, from 0."""
    seed: int = 0
    start: float = 0.0
    """Where the slice begins, as a share of the classes."""
    stop: float = 1.0
    """Where it ends. start=0, stop=0.5 is the teacher half, start=0.5, stop=1 the downstream half."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PackConfig(BaseConfig):
    """Pack images into tar shards that teachers and students read."""

    source: Annotated[Positional[str | tuple[str, ...]], arg(metavar="SOURCE [SOURCE ...]")]
    """An image folder (a sub-folder per class gives labels), a WebDataset tar, a Parquet file, a folder of such files,
    or hf://datasets/OWNER/NAME[/CONFIG][:SPLIT]; several go into one pack, classes of one name together."""
    out: Annotated[Positional[str], arg(metavar="OUT")]
    """Folder that the pack is written to."""
    limit: int = 0
    """At most so many images, spread evenly over each source; several sources get equal shares, as far as they have so
    many. 0 takes all."""
    label_column: str = ""
    """Of Parquet files, the column of the labels; empty takes the one that is declared so, or called label."""
    image_column: str = ""
    """Of Parquet files, the column of the images, if several hold bytes."""
    max_side: int = 1024
    """Longest side in pixels; larger images are made smaller, once. 0 keeps every size."""
    jpeg_quality: int = 95
    """Of images that have to be re-encoded; baseline RGB JPEGs keep their bytes."""
    shard_megabytes: int = 256
    num_workers: int = 0
    """Threads that read and encode; 0 takes one per core."""
    ffcv: bool = False
    """Also write `images.beton` for FFCV, with the same JPEG bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CropConfig(BaseConfig):
    """How crop boxes are drawn: torchvision's RandomResizedCrop, from a counter-based generator."""

    seed: int = 0
    scale: tuple[float, float] = (0.25, 1.0)
    """Smallest and largest share of the image's area."""
    ratio: tuple[float, float] = (0.75, 4 / 3)
    """Narrowest and widest shape, width over height."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
