"""The labelled data sets of an evaluation: their names, and the split of each, the same for every backbone."""

import re
from dataclasses import dataclass, replace

import numpy as np

from repcon.config import DatasetConfig, EvaluateConfig, split_name
from repcon.evaluation import probes
from repcon.images.pack import ImagePack, select_classes
from repcon.runtime.errors import UserError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """The labelled images that every backbone is measured on."""

    train: np.ndarray
    """(n,) int64 rows of the pack."""
    train_labels: np.ndarray
    test: np.ndarray
    """(m,) int64 rows of the pack, none of them in `train`."""
    test_labels: np.ndarray
    classes: tuple[str, ...]
    left_out: tuple[str, ...]
    """Classes with a single image, which cannot be in both parts."""

    @property
    def fewest(self) -> int:
        """Training images of the smallest class."""
        return int(np.bincount(self.train_labels).min())


def parse_data_sets(config: EvaluateConfig) -> dict[str, EvaluateConfig]:
    """{name: the settings of an evaluation of that data set alone}, in the given order.

    Raises UserError for no data set, two of one name, or a name that is no file name.
    """
    if config.datasets and config.data:
        raise UserError("data: given beside `datasets`; name every data set in one of the two")
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
    """Split the images of `config.classes`, alike for every backbone; `config.test` of each class is for the test.

    Raises UserError for a share that is none, and for fewer than two classes of two images.
    """
    if not 0 < config.test < 1:
        raise UserError(f"test: {config.test} is no share of the images between 0 and 1; 0.5 is usual")
    rows, labels, names = select_classes(pack, config.classes)
    counts = np.bincount(labels, minlength=len(names))
    kept = np.flatnonzero(counts >= 2)
    left_out = tuple(names[label] for label in np.flatnonzero(counts < 2))
    if len(kept) < 2:
        raise UserError(f"{config.data}: fewer than two of the {len(names)} classes have two images or more")
    usable = np.isin(labels, kept)
    rows, labels = rows[usable], np.searchsorted(kept, labels[usable])
    train, test = probes.split_classes(labels, config.test, config.seed)
    return Split(
        train=rows[train],
        train_labels=labels[train],
        test=rows[test],
        test_labels=labels[test],
        classes=tuple(names[label] for label in kept),
        left_out=left_out,
    )
