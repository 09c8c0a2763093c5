"""The labelled data sets of an evaluation: their names, and the split of each, the same for every backbone."""

import re
from dataclasses import dataclass, replace

import numpy as np

from repcon.config import DatasetConfig, EvaluateConfig, split_name
from repcon.evaluation import probes
from repcon.images.pack import ImagePack, select_classes
from repcon.runtime.errors import UserError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")

Fold = tuple[np.ndarray, np.ndarray]
"""Training and test images: (n,) and (m,) int64 places in a split's `rows`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """The labelled images that every backbone is measured on, and which of them train and test the probes."""

    rows: np.ndarray
    """(n,) int64 rows of the pack."""
    labels: np.ndarray
    """(n,) int64 places in `classes`."""
    folds: tuple[Fold, ...]
    """No image is tested twice, nor by a probe that was trained on it."""
    classes: tuple[str, ...]
    left_out: tuple[str, ...]
    """Classes with a single image, which cannot be in both parts."""

    @property
    def tested(self) -> np.ndarray:
        """(m,) places in `rows` in the order of the answers."""
        return np.concatenate([test for _, test in self.folds])

    @property
    def smallest_class(self) -> tuple[str, int]:
        """The class with the fewest training images in any fold, and how many these are."""
        counts = np.min([np.bincount(self.labels[train], minlength=len(self.classes)) for train, _ in self.folds], 0)
        return self.classes[int(counts.argmin())], int(counts.min())


def parse_data_sets(config: EvaluateConfig) -> dict[str, EvaluateConfig]:
    """{name: the settings of an evaluation of that data set alone}, in the given order.

    Raises UserError for no data set, two of one name, or a name that is no file name.
    """
    if config.datasets and config.data:
        raise UserError("data: given together with `datasets`; name every data set in one of the two")
    entries = config.data if isinstance(config.data, tuple) else (config.data,) if config.data else ()
    data_sets = config.datasets or tuple(
        DatasetConfig(name=name, data=data, classes=config.classes) for name, data in map(split_name, entries)
    )
    if not data_sets:
        raise UserError("data: none given; name a labelled image folder, tar or pack, or several as NAME=DATA")
    found: dict[str, EvaluateConfig] = {}
    for one in data_sets:
        if len(data_sets) > 1 and not NAME.fullmatch(one.name):
            raise UserError(f"data: {one.name!r} is no name for a data set; use letters, digits, `.`, `-` and `_`")
        if one.name in found:
            raise UserError(f"data: two data sets are called {one.name!r}; give each a name of its own, NAME=DATA")
        found[one.name] = replace(config, data=one.data, classes=one.classes, datasets=())
    return found


def split_images(pack: ImagePack, config: EvaluateConfig) -> Split:
    """Split the images of `config.classes`, alike for every backbone.

    `config.test` of each class is for the test; with `config.folds`, each fold of each class in turn.
    Raises UserError for a share that is none, a single fold, and for fewer than two classes of two images.
    """
    if not 0 < config.test < 1:
        raise UserError(f"test: {config.test} is no share of the images between 0 and 1; 0.5 is usual")
    if config.folds < 0 or config.folds == 1:
        raise UserError(f"folds: {config.folds} makes no sense; give 2 or more, or 0 for one split by `test`")
    rows, labels, names = select_classes(pack, config.classes)
    counts = np.bincount(labels, minlength=len(names))
    kept = np.flatnonzero(counts >= 2)
    left_out = tuple(names[label] for label in np.flatnonzero(counts < 2))
    if len(kept) < 2:
        raise UserError(f"{config.data}: fewer than two of the {len(names)} classes have two images or more")
    usable = np.isin(labels, kept)
    rows, labels = rows[usable], np.searchsorted(kept, labels[usable])
    if config.folds:
        tests = probes.fold_classes(labels, config.folds, config.seed)
        folds = tuple((np.setdiff1d(np.arange(len(labels)), test), test) for test in tests)
    else:
        folds = (probes.split_classes(labels, config.test, config.seed),)
    return Split(
        rows=rows, labels=labels, folds=folds, classes=tuple(names[label] for label in kept), left_out=left_out
    )
