"""An evaluation's results: means, intervals and paired differences, of each data set and of the mean over them."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from repcon.evaluation import intervals
from repcon.evaluation.data_sets import Split
from repcon.evaluation.verdict import Answers


def summarise(measured: Answers, about: Mapping[str, Mapping[str, Any]], split: Split, baseline: str) -> dict[str, Any]:
    """Means, intervals and paired differences to the baseline, in per cent and points; JSON-able."""
    backbones = {
        name: {
            **about[name],
            "metrics": {metric: intervals.accuracy(values) for metric, values in answers.items()},
        }
        for name, answers in measured.items()
    }
    differences = {
        name: {metric: intervals.difference(values, measured[baseline][metric]) for metric, values in answers.items()}
        for name, answers in measured.items()
        if name != baseline
    }
    return {
        "backbones": backbones,
        "baseline": baseline,
        "differences": differences,
        "classes": len(split.classes),
        "class_names": list(split.classes),
        "left_out": list(split.left_out),
        "smallest_class": list(split.smallest_class),
        "folds": len(split.folds),
        "train_images": max(len(train) for train, _ in split.folds),
        "test_images": len(split.tested),
        "chance": 100 / len(split.classes),
        "preparation": "largest centred square, resized with antialias",
    }


def combine(results: Mapping[str, Mapping[str, Any]], baseline: str) -> dict[str, Any]:
    """`datasets` (the results of each, of `summarise`'s shape), and `mean`: `backbones` and `differences` as there.

    The mean is of the metrics that every data set has, and counts each set alike.
    """
    mean = {
        part: {
            name: wrap(_mean([unwrap(one[part][name]) for one in results.values()]))
            for name in next(iter(results.values()))[part]
        }
        for part, wrap, unwrap in (
            ("backbones", lambda metrics: {"metrics": metrics}, lambda held: held["metrics"]),
            ("differences", lambda metrics: metrics, lambda held: held),
        )
    }
    return {"datasets": dict(results), "mean": mean, "baseline": baseline}


def _mean(parts: list[Mapping[str, Mapping[str, float]]]) -> dict[str, dict[str, float]]:
    """{metric: interval} of the mean over the data sets."""
    metrics = [metric for metric in parts[0] if all(metric in part for part in parts)]
    return {metric: intervals.mean_over_sets([part[metric] for part in parts]) for metric in metrics}


def flatten_answers(measured: Answers) -> dict[str, np.ndarray]:
    """One (m,) array per backbone and metric, named `backbone/metric`, so that others can pair and pool the answers; of
    few-shot the share of draws."""
    return {
        f"{name}/{metric}": values.mean(axis=0) if values.ndim == 2 else values
        for name, answers in measured.items()
        for metric, values in answers.items()
    }
