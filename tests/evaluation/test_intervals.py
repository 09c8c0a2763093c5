"""Intervals cover the truth about as often as they say."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from repcon.evaluation import intervals


def test_intervals_of_accuracies_cover_the_truth():
    generator = np.random.default_rng(0)
    inside = 0
    for _ in range(200):
        interval = intervals.accuracy(generator.random(400) < 0.8)
        inside += interval["low"] <= 80 <= interval["high"]
    assert 180 <= inside <= 198


def test_intervals_of_draws_hold_both_the_images_and_the_draws():
    """Draws that are good or bad for all images at once: the images alone say little of how sure the mean is."""
    generator, inside = np.random.default_rng(4), 0
    for _ in range(200):
        chance = np.clip(generator.normal(0.6, 0.1, size=(10, 1)), 0, 1)
        interval = intervals.accuracy(generator.random((10, 400)) < chance)
        inside += interval["low"] <= 60 <= interval["high"]
    assert 180 <= inside <= 200
    same = generator.random(400) < 0.8
    assert intervals.accuracy(np.stack([same] * 10)) == pytest.approx(intervals.accuracy(same))


def test_paired_difference_is_sharper_than_two_accuracies():
    generator = np.random.default_rng(1)
    first = generator.random(1000) < 0.8
    second = first ^ (generator.random(1000) < 0.02)
    paired = intervals.difference(second, first)
    alone = intervals.accuracy(first)
    assert paired["high"] - paired["low"] < (alone["high"] - alone["low"]) / 2


def test_intervals_over_draws_follow_student():
    interval = intervals.over_draws(np.array([0.5, 0.6, 0.7]))
    assert np.isclose(interval["mean"], 60)
    assert np.isclose(interval["high"] - 60, 4.302653 * 10 / np.sqrt(3), rtol=1e-5)
    assert intervals.over_draws(np.array([0.5]))["high"] == np.inf
    assert intervals.over_draws(np.array([0.5, 0.5, 0.5]))["low"] == -np.inf


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    [(4, 4, 51.01, 100), (0, 4, 0, 48.99), (81, 263, 25.53, 36.62), (1, 1, 20.65, 100)],
)
def test_accuracies_have_wilsons_interval(right: int, count: int, low: float, high: float):
    interval = intervals.accuracy(np.arange(count) < right)
    assert [interval["low"], interval["high"]] == pytest.approx([low, high], abs=0.01)


ANSWERS = st.integers(1, 40).flatmap(
    lambda n: st.lists(st.lists(st.booleans(), min_size=n, max_size=n), min_size=2, max_size=4)
)


@given(ANSWERS)
def test_no_interval_collapses_or_leaves_its_mean_out(answers: list[list[bool]]):
    draws = np.array(answers)
    for interval, least in (
        (intervals.accuracy(draws[0]), 0),
        (intervals.accuracy(draws), 0),
        (intervals.difference(draws[0], draws[1]), -100),
        (intervals.difference(draws, draws[:, ::-1]), -100),
    ):
        assert least <= interval["low"] <= interval["mean"] <= interval["high"] <= 100
        assert interval["high"] - interval["low"] > 1


@given(ANSWERS)
def test_what_leaves_zero_out_is_significant(answers: list[list[bool]]):
    first, second = np.array(answers)[:2]
    found = intervals.difference(first, second)
    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    changed = only_first + only_second
    assert found["p"] == pytest.approx(binomtest(only_first, changed).pvalue if changed else 1.0)
    if found["p"] >= 0.05:
        assert found["low"] <= 0 <= found["high"]
    of_draws = intervals.difference(np.stack([first, second]), np.stack([second, second]))
    if of_draws["p"] >= 0.05:
        assert of_draws["low"] <= 0 <= of_draws["high"]


def test_two_images_make_no_star_and_six_of_six_do():
    assert intervals.difference(np.ones(2), np.zeros(2))["low"] <= 0
    assert intervals.difference(np.ones(5), np.zeros(5))["low"] <= 0  # p = 0.0625
    assert intervals.difference(np.ones(6), np.zeros(6))["low"] > 0
    assert intervals.difference(np.zeros(300), np.ones(300))["high"] < 0


def test_differences_of_draws_are_tested_by_the_images_not_by_the_draws():
    """Three images that many draws agree on are still three images."""
    assert intervals.difference(np.ones((50, 3)) * 0.5, np.zeros((50, 3)))["low"] <= 0
    many = np.random.default_rng(0).random((10, 60)) < 0.7
    assert intervals.difference(many, np.zeros((10, 60)))["low"] > 0


def test_intervals_of_differences_cover_the_truth():
    generator, inside = np.random.default_rng(5), 0
    for _ in range(200):
        chance = generator.random(60)
        interval = intervals.difference(chance < 0.8, (chance < 0.7) ^ (generator.random(60) < 0.05))
        inside += interval["low"] <= 100 * (0.8 - (0.7 * 0.95 + 0.3 * 0.05)) <= interval["high"]
    assert 183 <= inside <= 200


def test_show_names_the_wider_half():
    assert intervals.plus_minus({"mean": 87.46, "low": 85.86, "high": 88.8}) == "87.5 ± 1.6"
    assert intervals.plus_minus({"mean": 0.5, "low": 0.0, "high": 1.0}, signed=True) == "+0.5 ± 0.5"
