"""A unit in progress: its boxes, the labels so far, and its missing images."""

from collections.abc import Iterator, Mapping

import numpy as np

from repcon.config import CropConfig
from repcon.crops.plan import plan_crops
from repcon.decode.base import CropRequest
from repcon.images.pack import ImagePack
from repcon.labels.store import LabelStore, Unit, UnitClaim
from repcon.runtime.errors import UserError


def by_image(rows: np.ndarray, crops: range, boxes: np.ndarray, flips: np.ndarray) -> CropRequest:
    """A request for images `rows` (n,) with all their m crops, from boxes (m, n, 4) and flips (m, n)."""
    return CropRequest(
        images=rows,
        crops=np.tile(crops, (len(rows), 1)),
        boxes=np.ascontiguousarray(boxes.swapaxes(0, 1)),
        flips=np.ascontiguousarray(flips.swapaxes(0, 1)),
    )


class WorkUnit:
    """A unit's boxes and its labels so far; m crops by r images."""

    def __init__(self, unit: Unit, store: LabelStore, pack: ImagePack, recipe: CropConfig) -> None:
        self.unit, self._store, self._pack = unit, store, pack
        rows = slice(unit.rows.start, unit.rows.stop)
        if unit.writes_boxes:
            planned = plan_crops(recipe, pack.hashes[rows], pack.sizes[rows], list(unit.crops))
            self.boxes, self.flips = planned.boxes, planned.flips
        else:
            self.boxes, self.flips = store.reader.boxes(unit.crops, unit.rows)
        shape = (len(unit.crops), len(unit.rows))
        self.missing: dict[int, str] = {}
        """Rows of the pack whose image could not be decoded, with the reason."""
        self._labels = {}
        for name in unit.heads:
            head = store.heads[name]
            ids = np.zeros((*shape, head.k), np.int32)
            self._labels[name] = ids, np.full((*shape, head.k + len(head.temperatures)), np.nan, np.float16)

    def requests(self, images_per_batch: int) -> Iterator[CropRequest]:
        """All images of the unit, each once with all its crops."""
        rows = np.arange(self.unit.rows.start, self.unit.rows.stop)
        return by_image(rows, self.unit.crops, self.boxes, self.flips).split(images_per_batch)

    def add_labels(self, images: np.ndarray, labels: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> None:
        """Adds the labels of some images: per head ids (n * m, k) and logp (n * m, k + T), image by image.

        Raises UserError naming teacher, image and crop where an answer is not a number.
        """
        columns, crops = images - self.unit.rows.start, len(self.unit.crops)
        for name, (ids, logp) in labels.items():
            self._require_finite(name, images, logp)
            held_ids, held_logp = self._labels[name]
            held_ids[:, columns] = ids.reshape(len(columns), crops, -1).swapaxes(0, 1)
            held_logp[:, columns] = logp.reshape(len(columns), crops, -1).swapaxes(0, 1)

    def _require_finite(self, name: str, images: np.ndarray, logp: np.ndarray) -> None:
        top = self._store.heads[name].k
        wrong = np.isnan(logp).any(1) | np.isinf(logp[:, :top]).any(1)  # a masked class has topk.LEAST
        if wrong.any():
            place, crop = divmod(int(wrong.argmax()), len(self.unit.crops))
            where = f"image {self._pack.keys[int(images[place])]}, crop {self.unit.crops[crop]}"
            remedy = "try precision fp32, or look at its weights"
            raise UserError(f"teacher {name}: its answer is not a number (NaN or infinite) for {where}; {remedy}")

    def write(self, claim: UnitClaim) -> int:
        """Writes the finished unit into the store; returns its bytes. Raises LostClaimError, as `LabelWriter.write`."""
        return self._store.writer.write(self.unit, self.boxes, self.flips, self._labels, self.missing, claim)
