"""What the commands give to Python callers, and write into `results.json`: the keys of each result and their types.

`repcon.config` types what goes in, this module what comes out.
"""

from typing import Any, NotRequired, TypedDict


class Interval(TypedDict):
    """A figure and its 95 % interval, in per cent or points."""

    mean: float
    low: float
    high: float
    p: NotRequired[float]
    """Of a paired difference: the exact test's."""


class PackResult(TypedDict):
    """Of `repcon.pack`. Where only FFCV's file was added to a pack: `images` and `fingerprint`."""

    images: int
    fingerprint: str
    classes: NotRequired[int]
    shards: NotRequired[int]
    megabytes: NotRequired[float]
    kept: NotRequired[int]
    """Images whose bytes were kept."""
    re_encoded: NotRequired[dict[str, int]]
    """By reason; likewise `left_out`."""
    left_out: NotRequired[dict[str, int]]
    warnings: NotRequired[list[str]]
    seconds: NotRequired[float]


class TeachResult(TypedDict):
    classes: int
    class_names: list[str]
    best_epoch: int
    validation_accuracy: float
    """In per cent."""
    validation_loss: float
    train_loss: float
    start: str
    """The model that was fine-tuned."""
    start_weight_hash: str
    data_fingerprint: str
    labels_fingerprint: str
    train_images: int
    validation_images: int
    license: str


class PrecomputeResult(TypedDict):
    """Of `repcon.precompute`; with `estimate`, the figures of its table instead."""

    images: int
    """Decoded by this run; likewise crops and units."""
    crops: int
    units: int
    seconds: NotRequired[float]
    """Missing, like what follows up to `written_bytes`, where all labels were there already."""
    images_per_second: NotRequired[float]
    crops_per_second: NotRequired[float]
    waited_share: NotRequired[float]
    """Of the time that the teachers waited for crops."""
    written_bytes: NotRequired[int]
    total_crops: int
    """Of the store."""
    teachers: list[str]
    missing: int
    """Images that could not be decoded."""
    fingerprint: str


class TrainResult(TypedDict):
    student: str
    """The folder of the student, which timm opens too."""
    loss: dict[str, float]
    """By head, at the last logged step; in nat."""
    validation: dict[str, Any]
    validation_start: dict[str, Any]
    """Before the first step; as `validation`."""
    heads_worse_than_at_the_start: list[str]
    init: dict[str, Any]
    """How the backbone started."""
    steps: int
    images: int
    images_per_second: float
    data_share: float
    """Of the time that training waited for data."""
    seconds: float
    memory_bytes: NotRequired[int]
    store_fingerprint: str
    pack_fingerprint: str


class EvaluateResult(TypedDict):
    """Of `repcon.evaluate` on one data set.

    On several, `datasets` has such a result of each, `mean` has `backbones` and `differences`, and of the other keys
    there are `baseline`, `size`, `verdict` and `heads`.
    """

    backbones: dict[str, dict[str, Any]]
    """By name: `metrics` ({metric: Interval}), `weight_hash`, `input_size`, `heads`, ..."""
    baseline: str
    differences: dict[str, dict[str, Interval]]
    """By backbone and metric, to the baseline."""
    verdict: NotRequired[dict[str, Any]]
    heads: NotRequired[list[dict[str, Any]]]
    datasets: NotRequired[dict[str, dict[str, Any]]]
    mean: NotRequired[dict[str, Any]]
    data: str
    size: int
    classes: int
    class_names: list[str]
    left_out: list[str]
    """Classes with a single image."""
    smallest_class: list[Any]
    """Its name, and its training images."""
    shots_left_out: list[int]
    folds: int
    train_images: int
    test_images: int
    chance: float
    """In per cent."""
    preparation: str


class ReportResult(TypedDict):
    html: str
    markdown: str
    sources: int
    sections: int
    plots: int
    notes: list[str]


class ExportResult(TypedDict):
    file: str
    bytes: int
    difference: float
    """Largest difference to the student's own output."""
    size: int
    """Input side in pixels."""


class PushResult(TypedDict):
    address: str
    commit: str
    kind: str
    fingerprint: str


class PullResult(TypedDict):
    out: str
    kind: str
    commit: str
    fingerprint: str


class ConsolidateResult(TypedDict):
    sentence: str
    """What was made, of what."""
    student: str
    report: str
    backbone: str
    store: str
    pack: str
    transfer: EvaluateResult
    """Empty without labelled images."""
