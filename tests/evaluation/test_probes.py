"""Probes on made-up features whose answers are known."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from repcon.evaluation import intervals, probes


def clusters(classes: int, each: int, width: int, noise: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(classes, width))
    labels = np.repeat(np.arange(classes), each)
    features = centres[labels] + generator.normal(0, noise, (len(labels), width))
    return features.astype(np.float32), labels


def test_knn_matches_a_plain_count():
    train, labels = clusters(5, 12, 8, 2.0)
    test, _ = clusters(5, 9, 8, 2.0, seed=1)
    predicted = probes.knn(train, labels, test, (1, 5, 20))
    similarity = probes.unit(test) @ probes.unit(train).T
    for row, similar in enumerate(similarity):
        order = np.argsort(-similar)
        assert predicted[1][row] == labels[order[0]]
        for k in (5, 20):
            votes = np.bincount(labels[order[:k]], minlength=5)
            tied = np.flatnonzero(votes == votes.max())
            closeness = [similar[order[:k]][labels[order[:k]] == label].sum() for label in tied]
            assert predicted[k][row] == tied[int(np.argmax(closeness))]


def test_knn_in_parts_is_knn(monkeypatch):
    train, labels = clusters(5, 12, 8, 2.0)
    test, _ = clusters(5, 9, 8, 2.0, seed=1)
    whole = probes.knn(train, labels, test)
    monkeypatch.setattr(probes, "_MAX_SIMILARITIES", 7 * len(train))
    for k, predicted in probes.knn(train, labels, test).items():
        np.testing.assert_array_equal(predicted, whole[k])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_first_of_equally_similar_rows_are_nearest(dtype):
    """Rows of -1 and 1, whose similarities are multiples of an eighth and exact."""
    generator = np.random.default_rng(0)
    train, test = (generator.choice([-1.0, 1.0], (rows, 16)).astype(dtype) for rows in (500, 40))
    similarity = test @ train.T / 16
    first = np.argsort(-similarity, axis=1, kind="stable")[:, 0]
    np.testing.assert_array_equal(probes.knn(train, np.arange(500), test, (1, 20))[1], first)
    for k in (1, 7, 20, 500):
        order = np.argsort(-similarity, axis=1, kind="stable")[:, :k]
        nearest, closeness = probes.nearest_rows(train, test, k)
        np.testing.assert_array_equal(nearest, order)
        np.testing.assert_array_equal(closeness, np.take_along_axis(similarity, order, axis=1))


def test_knn_tells_nearly_equal_ties_apart():
    """Float32 features whose summed similarities differ in the fifth digit."""
    turned = np.array([[0.3, 0.3001], [0.3, -0.3], [0.3, 0.3], [0.3, -0.3]], np.float32)
    train = np.concatenate([np.ones((4, 1), np.float32), turned], axis=1)
    for labels in (np.array([0, 0, 1, 1]), np.array([1, 1, 0, 0])):
        assert probes.knn(train, labels, np.array([[1, 0.3, 0]], np.float32), (4,))[4][0] == labels[2]


def test_knn_ignores_lengths_and_takes_what_there_is():
    train, labels = clusters(3, 4, 6, 0.1)
    lengths = np.random.default_rng(2).uniform(0.1, 9, (len(train), 1))
    predicted = probes.knn(train * lengths, labels, train, (1, 50))
    assert (predicted[1] == labels).all()
    assert predicted[50].shape == labels.shape


def test_probe_separates_clusters_and_standardises_by_the_training_part():
    train, labels = clusters(6, 20, 16, 0.5)
    test, truth = clusters(6, 10, 16, 0.5, seed=1)
    skewed = np.linspace(0.001, 1000, 16, dtype=np.float32)
    probe = probes.linear_probe(train * skewed, labels, test * skewed, seed=0)
    assert (probe.predicted == truth).mean() > 0.98
    constant = np.ones((len(train), 1), np.float32)
    again = probes.linear_probe(np.hstack([train, constant]), labels, np.hstack([test, constant[: len(test)] * 5]), 0)
    assert np.isfinite(again.predicted).all()


def test_c_is_chosen_without_the_test_rows(monkeypatch: pytest.MonkeyPatch):
    """The fit sees training rows only: whatever stands in the test part, C stays, and no test row is fitted."""
    train, labels = clusters(5, 16, 12, 3.0)
    test, _ = clusters(5, 16, 12, 3.0, seed=1)
    fitted: list[int] = []
    fit = LogisticRegression.fit

    def watched(self, features, targets):
        fitted.append(len(features))
        assert not np.isin(np.round(features[:, 0], 5), marks).any()
        return fit(self, features, targets)

    scale = np.where(train.std(0) > 1e-8, train.std(0), 1)
    marks = np.round(((test - train.mean(0)) / scale)[:, 0], 5)
    monkeypatch.setattr(LogisticRegression, "fit", watched)
    first = probes.linear_probe(train, labels, test, seed=3)
    assert max(fitted) == len(train)
    marks = np.array([np.inf])
    assert probes.linear_probe(train, labels, np.random.default_rng(0).normal(size=test.shape), seed=3).c == first.c


def test_few_shot_draws_are_the_same_for_every_backbone_and_improve_with_shots():
    train, labels = clusters(8, 20, 24, 2.0)
    test, truth = clusters(8, 10, 24, 2.0, seed=1)
    one, again = (probes.few_shot(train, labels, test, truth, 1, 20, seed=0) for _ in range(2))
    ten = probes.few_shot(train, labels, test, truth, 10, 20, seed=0)
    assert (one == again).all() and one.shape == (20, len(test)) and one.dtype == bool
    assert ten.mean() > one.mean()


def test_equally_good_backbones_seldom_differ_beyond_their_interval():
    """The same picture contents under independent noise: about one interval in twenty leaves zero out."""
    generator, apart = np.random.default_rng(3), 0
    for _ in range(60):
        train, labels = clusters(12, 12, 16, 2.0, seed=int(generator.integers(1 << 30)))
        test, truth = clusters(12, 12, 16, 2.0, seed=int(generator.integers(1 << 30)))
        first, second = (
            probes.few_shot(
                train + generator.normal(size=train.shape),
                labels,
                test + generator.normal(size=test.shape),
                truth,
                5,
                10,
                0,
            )
            for _ in range(2)
        )
        interval = intervals.difference(first, second)
        apart += interval["low"] > 0 or interval["high"] < 0
    assert apart <= 9


@pytest.mark.parametrize(("counts", "share", "taken"), [((10, 4, 2, 1), 0.5, (5, 2, 1, 0)), ((3, 3), 0.0, (0, 0)),
                                                         ((5, 2), 0.95, (4, 1)), ((7, 2), 0.01, (1, 1))])  # fmt: skip
def test_split_takes_a_share_of_each_class(counts, share, taken):
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(len(counts)), counts))
    rest, chosen = probes.split_classes(labels, share, seed=5)
    assert tuple(np.bincount(labels[chosen], minlength=len(counts))) == taken
    assert sorted([*rest, *chosen]) == list(range(len(labels)))
    assert (probes.split_classes(labels, share, seed=5)[1] == chosen).all()


def test_folds_share_each_class_and_every_image():
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(4), (10, 4, 2, 3)))
    parts = probes.fold_classes(labels, 3, seed=5)
    assert sorted(np.concatenate(parts)) == list(range(len(labels)))
    counts = np.array([np.bincount(labels[part], minlength=4) for part in parts])
    assert (counts.max(0) - counts.min(0) <= 1).all() and np.ptp(counts.sum(1)) <= 1
    assert [list(part) for part in parts] == [list(part) for part in probes.fold_classes(labels, 3, seed=5)]
