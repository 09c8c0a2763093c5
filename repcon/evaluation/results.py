"""An evaluation's results: means, intervals, paired differences, and the verdict whether one model is better.

Comparisons are paired by test image. Over several data sets the mean counts each set alike, whatever its size.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from repcon.evaluation import intervals
from repcon.evaluation.backbones import JOIN
from repcon.evaluation.data_sets import Split

METRICS = {
    "knn_1": "kNN, k = 1", "knn_5": "kNN, k = 5", "knn_20": "kNN, k = 20", "probe": "linear probe",
    "shot_1": "1-shot", "shot_5": "5-shot", "shot_10": "10-shot", "finetune": "fine-tuned",
}  # fmt: skip
"""By the name that results have."""
COLUMN_TITLES = METRICS | {"knn_1": "kNN 1", "knn_5": "kNN 5", "knn_20": "kNN 20", "probe": "probe"}
"""Short, for the columns of a terminal's table."""
VERDICT_METRICS = {
    "probe": "linear probe", "finetune": "fine-tuned accuracy", "shot_10": "10-shot accuracy",
    "shot_5": "5-shot accuracy", "shot_1": "1-shot accuracy", "knn_5": "kNN 5 accuracy", "knn_1": "kNN 1 accuracy",
    "knn_20": "kNN 20 accuracy",
}  # fmt: skip
"""A verdict is given by the first of these that was measured on every data set, and what it is called."""
Correctness = Mapping[str, Mapping[str, np.ndarray]]
"""{model: {metric: (m,) whether each test image was classified correctly, for few-shot (draws, m)}}."""


def summarise(
    measured: Correctness, about: Mapping[str, Mapping[str, Any]], split: Split, baseline: str
) -> dict[str, Any]:
    """Means, intervals and paired differences to the baseline, in per cent and points; JSON-able."""
    backbones = {
        name: {**about[name], "metrics": {metric: intervals.accuracy(values) for metric, values in answers.items()}}
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
    sets, names = list(results.values()), next(iter(results.values()))["backbones"]
    backbones = {name: {"metrics": _mean([one["backbones"][name]["metrics"] for one in sets])} for name in names}
    differences = {name: _mean([one["differences"][name] for one in sets]) for name in names if name != baseline}
    mean = {"backbones": backbones, "differences": differences}
    return {"datasets": dict(results), "mean": mean, "baseline": baseline}


def _mean(parts: list[Mapping[str, Mapping[str, float]]]) -> dict[str, dict[str, float]]:
    """{metric: interval} of the mean over the data sets."""
    metrics = [metric for metric in parts[0] if all(metric in part for part in parts)]
    return {metric: intervals.mean_over_sets([part[metric] for part in parts]) for metric in metrics}


def per_image(measured: Correctness) -> dict[str, np.ndarray]:
    """One (m,) array per backbone and metric, named `backbone/metric`, so that others can pair and pool the answers; of
    few-shot the share of draws."""
    return {
        f"{name}/{metric}": values.mean(axis=0) if values.ndim == 2 else values
        for name, answers in measured.items()
        for metric, values in answers.items()
    }


def headline(measured: Sequence[Correctness]) -> str:
    """The metric that a verdict is given by; empty where the data sets have none in common."""
    common = [set(answers) for models in measured for answers in models.values()]
    return next((metric for metric in VERDICT_METRICS if common and all(metric in held for held in common)), "")


def single_backbones(facts: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The names of the backbones that are one model; of all where none is. Concatenated ones are compared with
    nothing."""
    return [name for name, held in facts.items() if JOIN not in held["model"]] or list(facts)


def subject_of(facts: Mapping[str, Mapping[str, Any]], measured: Sequence[Correctness]) -> str:
    """The backbone that a verdict is about: the student with the most heads (the last of equals), else the best.

    facts: {backbone: its `model` and `heads`}; measured: answers of each data set.
    """
    single = single_backbones(facts)
    students = [name for name in single if facts[name]["heads"]]
    if students:
        return max(reversed(students), key=lambda name: len(facts[name]["heads"]))
    metric = headline(measured)
    return max(single, key=lambda name: sum(models[name][metric].mean() for models in measured) if metric else 0)


def difference(measured: Sequence[Correctness], model: str, rival: str, metric: str) -> dict[str, float]:
    """`model` less `rival` in points, with its 95 % interval: the mean over the data sets of paired differences."""
    pairs = [(models[model][metric], models[rival][metric]) for models in measured]
    return intervals.mean_over_sets([intervals.difference(first, second) for first, second in pairs])


def verdict(measured: Mapping[str, Correctness], subject: str, rivals: Sequence[str]) -> dict[str, Any]:
    """The comparison of `subject` with its rivals, as one sentence and as figures; {} where no metric is common.

    measured: answers by data set. `outcome` is `better` where the subject is above every rival beyond the noise,
    `worse` where some rival is above the subject beyond the noise, else `level`; `alone` without rivals. `rival` and
    `difference` are of the strongest rival that decides it. Of several data sets, `by_dataset` compares with the best
    rival of each, and `details` says so in one line.
    """
    metric = headline(list(measured.values()))
    if not metric:
        return {}
    sets = list(measured.values())
    found: dict[str, Any] = {"metric": metric, "subject": subject}
    if not rivals:
        mean = intervals.mean_over_sets([intervals.accuracy(models[subject][metric]) for models in sets])
        found |= {"outcome": "alone", "accuracy": mean}
        return found | {"sentence": _sentence(found, several=len(sets) > 1)}
    apart = {rival: difference(sets, subject, rival, metric) for rival in rivals}
    best = min(apart, key=lambda rival: apart[rival]["mean"])
    above = [rival for rival in rivals if apart[rival]["high"] < 0]
    unsure = [rival for rival in rivals if apart[rival]["low"] <= 0]
    outcome = "worse" if above else "level" if unsure else "better"
    rival = min(above or unsure or rivals, key=lambda rival: apart[rival]["mean"])
    found |= {"outcome": outcome, "rival": rival, "best_rival": best, "difference": apart[rival], "differences": apart}
    if len(sets) > 1:
        found["by_dataset"] = {
            name: _against_best(models, metric, subject, rivals) for name, models in measured.items()
        }
        found["details"] = _details(found)
    return found | {"sentence": _sentence(found, several=len(sets) > 1)}


def _against_best(models: Correctness, metric: str, subject: str, rivals: Sequence[str]) -> dict[str, Any]:
    """The best rival of one data set, and the difference to it."""
    best = max(rivals, key=lambda rival: float(models[rival][metric].mean()))
    return {"rival": best, "difference": difference([models], subject, best, metric)}


def _sentence(found: Mapping[str, Any], *, several: bool) -> str:
    subject, metric = found["subject"], VERDICT_METRICS[found["metric"]]
    mean = "on average" if several else ""
    if found["outcome"] == "alone":
        accuracy = found["accuracy"]
        words = f"{subject} is the only model, at {accuracy['mean']:.1f} % {metric} {mean}".rstrip()
        return f"{words}, 95 % interval {accuracy['low']:.1f} to {accuracy['high']:.1f}"
    rival = found["rival"]
    strongest = "the best of them" if found["outcome"] == "better" else "the best other model"
    against = f"{strongest} ({rival})" if rival == found["best_rival"] else rival
    how = {"better": "beats every other model", "level": f"is level with {against}", "worse": f"is below {against}"}
    over = f" over {against}" if found["outcome"] == "better" else ""
    apart = found["difference"]
    words = " ".join(part for part in (subject, how[found["outcome"]], mean) if part)
    points = f"{apart['mean']:+.1f} points of {metric}{over}"
    return f"{words}: {points}, 95 % interval {apart['low']:.1f} to {apart['high']:.1f}"


def _details(found: Mapping[str, Any]) -> str:
    """How the subject compares with the best other model of each data set, as one line."""
    parts = [
        f"{name} {held['difference']['mean']:+.1f} ({held['difference']['low']:.1f} to "
        f"{held['difference']['high']:.1f}) over {held['rival']}"
        for name, held in found["by_dataset"].items()
    ]
    return f"{found['subject']} by data set: {'; '.join(parts)}"
