"""Probes of frozen features: cosine kNN, logistic regression, few-shot classification by nearest class mean."""

import warnings
from dataclasses import dataclass

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

PROBE_C = (1e-3, 1e-2, 3e-2, 1e-1, 1.0)
"""Inverse regularisation strengths to choose from; rising, so that each fit starts from the last one's weights."""
PROBE_ITERATIONS = 300
PROBE_TOLERANCE = 3e-4
_SIMILARITY_STEPS = 2**20
"""Steps of similarity per unit that kNN tells apart, about as many as float32 sums do."""
_MAX_SIMILARITIES = 2**23
"""Similarities that kNN holds at a time; each takes about 20 bytes."""


def unit(features: np.ndarray) -> np.ndarray:
    """Rows of length one; a row of zeros stays zero."""
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)


def knn(
    train: np.ndarray, labels: np.ndarray, test: np.ndarray, neighbours: tuple[int, ...] = (1, 5, 20)
) -> dict[int, np.ndarray]:
    """Predicted class of each test row for each k: a vote of the k nearest by cosine, ties to the more similar.

    train (n, D), labels (n,) int in [0, C), test (m, D); gives {k: (m,) int64}. k above n takes all n. The nearest are
    those of `nearest_rows`; of classes with equal votes and similarities the first is predicted.
    """
    most = min(max(neighbours), len(train))
    nearest, closeness = nearest_rows(train, test, most)
    votes = labels[nearest]
    predicted = {}
    for k in neighbours:
        score = np.zeros((len(test), labels.max() + 1))
        rows = np.repeat(np.arange(len(test)), min(k, most))
        # A vote counts 1, its similarity a thousandth of that: it orders ties and nothing else.
        np.add.at(score, (rows, votes[:, :k].ravel()), 1 + closeness[:, :k].ravel() * 1e-3 / most)
        predicted[k] = score.argmax(axis=1)
    return predicted


def nearest_rows(train: np.ndarray, test: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Of each test row the k most similar training rows by cosine, in order, and their similarities.

    train (n, D), test (m, D), k <= n; gives (m, k) int64 and (m, k) float64. Similarities are rounded to 2^-20; of
    equally similar rows the first in `train` come first.
    """
    train, test, count = unit(train), unit(test), len(train)
    best = np.empty((len(test), k), np.int64)
    part = max(1, _MAX_SIMILARITIES // count)
    for start in range(0, len(test), part):
        steps = np.rint(test[start : start + part] @ train.T * _SIMILARITY_STEPS)
        # One number per row of train, which no two share: the similarity before the place, counted from the end.
        keys = steps.astype(np.int64) * count + np.arange(count)[::-1]
        keys.partition(count - k, axis=1)
        best[start : start + part] = np.sort(keys[:, count - k :], axis=1)[:, ::-1]
    return count - 1 - best % count, best // count / _SIMILARITY_STEPS


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """A fitted linear probe."""

    predicted: np.ndarray
    """(m,) int64 classes of the test rows."""
    c: float
    converged: bool


def linear_probe(train: np.ndarray, labels: np.ndarray, test: np.ndarray, seed: int) -> Probe:
    """Logistic regression on standardised features; C is chosen inside the training part, then all of it is fitted.

    train (n, D), labels (n,) int, test (m, D). Mean and deviation are those of the training part.
    """
    mean, deviation = train.mean(axis=0), train.std(axis=0)
    scale = np.where(deviation > 1e-8, deviation, 1)
    standard = ((train - mean) / scale).astype(np.float64)  # The solver's own type: float32 would be cast at each step.
    c = choose_c(standard, labels, seed)
    model = LogisticRegression(C=c, max_iter=PROBE_ITERATIONS, tol=PROBE_TOLERANCE)
    converged = _fit(model, standard, labels)
    predicted = np.asarray(model.predict(((test - mean) / scale).astype(np.float64)))
    return Probe(predicted=predicted, c=c, converged=converged)


def choose_c(train: np.ndarray, labels: np.ndarray, seed: int) -> float:
    """C by accuracy on a quarter of each class that is not fitted: the middle of those as good as the best.

    As good means within one standard error. The accuracies are flat near their best and the quarter is small, so that
    the best single C would vary from backbone to backbone by chance. Classes with a single image are only fitted.
    """
    fitted, held = split_classes(labels, 0.25, seed)
    if len(held) == 0:
        return PROBE_C[len(PROBE_C) // 2]
    model = LogisticRegression(max_iter=PROBE_ITERATIONS, tol=PROBE_TOLERANCE, warm_start=True)
    accuracies = []
    for c in PROBE_C:
        model.set_params(C=c)
        _fit(model, train[fitted], labels[fitted])
        accuracies.append(float(np.mean(model.predict(train[held]) == labels[held])))
    best = max(accuracies)
    good = np.flatnonzero(np.array(accuracies) >= best - np.sqrt(best * (1 - best) / len(held)))
    return PROBE_C[good[(len(good) - 1) // 2]]


def _fit(model: LogisticRegression, features: np.ndarray, labels: np.ndarray) -> bool:
    """Fit the model; False where the iterations did not suffice (it is then slightly more regularised than asked)."""
    with warnings.catch_warnings(record=True) as raised:
        warnings.simplefilter("always", ConvergenceWarning)
        model.fit(features, labels)
    return not any(issubclass(warning.category, ConvergenceWarning) for warning in raised)


def few_shot(
    train: np.ndarray, labels: np.ndarray, test: np.ndarray, test_labels: np.ndarray, shots: int, draws: int, seed: int
) -> np.ndarray:
    """(draws, m) bool: whether each test row goes to its class in each draw, that of the nearest class mean by cosine.

    A mean is of `shots` random training rows. Draws depend on (seed, shots, draw) and the labels only, so that every
    backbone is given the same ones.
    """
    classes = int(labels.max()) + 1
    members = [np.flatnonzero(labels == label) for label in range(classes)]
    train, test = unit(train), unit(test)
    right = np.zeros((draws, len(test)), bool)
    for draw in range(draws):
        generator = np.random.default_rng([seed, shots, draw])
        chosen = np.stack([generator.choice(rows, shots, replace=False) for rows in members])
        means = unit(train[chosen].mean(axis=1))
        right[draw] = (test @ means.T).argmax(axis=1) == test_labels
    return right


def split_classes(labels: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Splits places into (rest, taken), about `share` of each class taken: at least one, and at least one left.

    A class with one member is left whole in the rest, and with a share of 0 all are. Both are sorted.
    """
    generator = np.random.default_rng([seed, len(labels)])
    taken = []
    for label in np.unique(labels):
        members = generator.permutation(np.flatnonzero(labels == label))
        count = int(np.clip(round(share * len(members)), min(1, len(members) - 1), len(members) - 1))
        taken.append(members[: count if share > 0 else 0])
    chosen = np.sort(np.concatenate(taken)) if taken else np.zeros(0, np.int64)
    return np.setdiff1d(np.arange(len(labels)), chosen), chosen


def fold_classes(labels: np.ndarray, folds: int, seed: int) -> list[np.ndarray]:
    """Sorted places of each of `folds` parts, of about the same size, with an equal share of each class.

    A class of fewer members than folds has at most one in each part.
    """
    generator = np.random.default_rng([seed, len(labels), folds])
    mixed = [generator.permutation(np.flatnonzero(labels == label)) for label in np.unique(labels)]
    dealt = np.concatenate(mixed)
    return [np.sort(part) for part in (dealt[first::folds] for first in range(folds)) if len(part)]
