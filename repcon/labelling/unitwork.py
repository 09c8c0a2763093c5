"""One unit on its way: the boxes that are cut, the labels that arrive, the images that turned out to be damaged."""

from collections.abc import Iterator, Mapping

import numpy as np

from repcon.config import CropConfig
from repcon.crops import plan
from repcon.errors import UserError
from repcon.images import Pack
from repcon.loaders import Request
from repcon.store import LabelStore, Unit


class UnitWork:
    """A unit's boxes and its labels so far; m crops by r images."""

    def __init__(self, unit: Unit, store: LabelStore, pack: Pack, recipe: CropConfig) -> None:
        self.unit, self._store, self._pack = unit, store, pack
        rows = slice(unit.rows.start, unit.rows.stop)
        if unit.writes_boxes:
            planned = plan(recipe, pack.hashes[rows], pack.sizes[rows], list(unit.crops))
            self.boxes, self.flips = planned.boxes, planned.flips
        else:
            self.boxes, self.flips = store.boxes(unit.crops, unit.rows)
        shape = (len(unit.crops), len(unit.rows))
        self.missing: dict[int, str] = {}
        """Rows of the pack whose image could not be decoded, with the reason."""
        self._labels = {}
        for name in unit.heads:
            head = store.heads[name]
            ids = np.zeros((*shape, head.k), np.int32)
            self._labels[name] = ids, np.full((*shape, head.k + len(head.temperatures)), np.nan, np.float16)

    def requests(self, images_per_batch: int) -> Iterator[Request]:
        """All images of the unit, each once with all its crops."""
        first = self.unit.rows.start
        for start in range(0, len(self.unit.rows), images_per_batch):
            columns = slice(start, min(start + images_per_batch, len(self.unit.rows)))
            images = np.arange(columns.start, columns.stop, dtype=np.int64) + first
            yield Request(
                images=images,
                crops=np.tile(np.arange(self.unit.crops.start, self.unit.crops.stop), (len(images), 1)),
                boxes=np.ascontiguousarray(self.boxes[:, columns].swapaxes(0, 1)),
                flips=np.ascontiguousarray(self.flips[:, columns].swapaxes(0, 1)),
            )

    def keep(self, images: np.ndarray, labels: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> None:
        """Takes the labels of some images: per head ids (n * m, k) and logp (n * m, k + T), image by image.

        Raises UserError naming teacher, image and crop where an answer is not a number.
        """
        columns, crops = images - self.unit.rows.start, len(self.unit.crops)
        for name, (ids, logp) in labels.items():
            self._refuse_nan(name, images, logp)
            held_ids, held_logp = self._labels[name]
            held_ids[:, columns] = ids.reshape(len(columns), crops, -1).swapaxes(0, 1)
            held_logp[:, columns] = logp.reshape(len(columns), crops, -1).swapaxes(0, 1)

    def _refuse_nan(self, name: str, images: np.ndarray, logp: np.ndarray) -> None:
        top = self._store.heads[name].k
        wrong = np.isnan(logp).any(1) | np.isinf(logp[:, :top]).any(1)
        if wrong.any():
            place, crop = divmod(int(wrong.argmax()), len(self.unit.crops))
            where = f"image {self._pack.keys[int(images[place])]}, crop {self.unit.crops[crop]}"
            remedy = "try precision fp32, or look at its weights; log-probabilities below -65,504 do not fit the store"
            raise UserError(f"teacher {name}: its answer is not a number (NaN or infinite) for {where}; {remedy}")

    def write(self) -> int:
        """Writes the finished unit into the store; gives its bytes."""
        return self._store.write(self.unit, self.boxes, self.flips, self._labels, missing=sorted(self.missing))
