"""A sheet of stored crops with their labels, on which a mix-up of crops and labels would be seen."""

import base64
import io
from dataclasses import dataclass

import numpy as np
from PIL import Image

from repcon.decode import reference
from repcon.images.pack import ImagePack
from repcon.labels.layout import HeadInfo
from repcon.labels.store import LabelStore

IMAGES, SIDE, TOP = 6, 160, 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Crop:
    """One stored crop, cut by the reference loader."""

    number: int
    box: tuple[int, int, int, int]
    flipped: bool
    place: tuple[float, float, float, float]
    """left, top, width, height of the box in per cent of the image."""
    picture: str
    """A `data:` URI."""
    labels: dict[str, list[tuple[str, float]]]
    """By teacher, the three most probable classes with their probabilities at temperature 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SheetImage:
    """One image of the pack with two of its crops."""

    key: str
    row: int
    size: tuple[int, int]
    picture: str
    crops: tuple[Crop, ...]


def sheet(pack_url: str, store_url: str) -> list[SheetImage]:
    """Images evenly spaced over the store, the first and the last crop of each, with the labels as they are stored.

    Raises UserError where the store is of another pack.
    """
    pack, store = ImagePack.open(pack_url), LabelStore.open(store_url)
    store.require_pack(pack.fingerprint, len(pack))
    usable = np.setdiff1d(np.arange(store.images), store.completion.missing_rows())
    places = np.linspace(0, len(usable) - 1, IMAGES + 2)[1:-1].astype(int) if len(usable) else []
    numbers = sorted({0, store.crops - 1})
    return [_sheet_image(pack, store, row, numbers) for row in dict.fromkeys(usable[places].tolist())]


def _crop(image: np.ndarray, store: LabelStore, number: int, row: int) -> Crop:
    crop_labels = store.reader.read_rows(number, range(row, row + 1))
    box = tuple(int(value) for value in crop_labels.boxes[0])
    flipped = bool(crop_labels.flips[0])
    pixels = reference.crop(image, box, SIDE, flipped).permute(1, 2, 0).numpy()
    height, width = image.shape[:2]
    x, y, w, h = box
    return Crop(
        number=number,
        box=(x, y, w, h),
        flipped=flipped,
        place=(100 * x / width, 100 * y / height, 100 * w / width, 100 * h / height),
        picture=_uri(pixels),
        labels={
            name: _top_classes(head, *(array[0] for array in crop_labels.labels[name]))
            for name, head in store.heads.items()
        },
    )


def _top_classes(head: HeadInfo, ids: np.ndarray, logp: np.ndarray) -> list[tuple[str, float]]:
    """(name, probability) of the most probable classes of one row."""
    count, classes = min(TOP, head.k), head.metadata.classes
    names = [classes[label] if label < len(classes) else f"class {label}" for label in ids[:count].tolist()]
    return list(zip(names, np.exp(logp[:count].astype(np.float64)).tolist(), strict=True))


def _sheet_image(pack: ImagePack, store: LabelStore, row: int, numbers: list[int]) -> SheetImage:
    image = reference.decode(pack.read(row))
    small = Image.fromarray(image)
    small.thumbnail((2 * SIDE, 2 * SIDE))
    return SheetImage(
        key=pack.keys[row],
        row=row,
        size=(image.shape[1], image.shape[0]),
        picture=_uri(np.asarray(small)),
        crops=tuple(_crop(image, store, number, row) for number in numbers),
    )


def _uri(pixels: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
