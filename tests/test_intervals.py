"""Intervals cover the truth about as often as they say."""

import numpy as np

from repcon.probing import intervals


def test_intervals_over_images_cover_the_truth():
    generator = np.random.default_rng(0)
    inside = 0
    for _ in range(200):
        interval = intervals.over_images(generator.random(400) < 0.8)
        inside += interval["low"] <= 80 <= interval["high"]
    assert 180 <= inside <= 198


def test_intervals_of_draws_hold_both_the_images_and_the_draws():
    """Draws that are good or bad for all images at once: the images alone say little of how sure the mean is."""
    generator, inside = np.random.default_rng(4), 0
    for _ in range(200):
        chance = np.clip(generator.normal(0.6, 0.1, size=(10, 1)), 0, 1)
        interval = intervals.over_images(generator.random((10, 400)) < chance)
        inside += interval["low"] <= 60 <= interval["high"]
    assert 180 <= inside <= 200
    same = generator.random(400) < 0.8
    assert intervals.over_images(np.stack([same] * 10)) == intervals.over_images(same)


def test_paired_difference_is_sharper_than_two_accuracies():
    generator = np.random.default_rng(1)
    first = generator.random(1000) < 0.8
    second = first ^ (generator.random(1000) < 0.02)
    paired = intervals.over_images(second.astype(float) - first)
    alone = intervals.over_images(first)
    assert paired["high"] - paired["low"] < (alone["high"] - alone["low"]) / 2


def test_intervals_over_draws_follow_student():
    interval = intervals.over_draws(np.array([0.5, 0.6, 0.7]))
    assert np.isclose(interval["mean"], 60)
    assert np.isclose(interval["high"] - 60, 4.302653 * 10 / np.sqrt(3), rtol=1e-5)
    assert intervals.over_draws(np.array([0.5]))["high"] == np.inf


def test_show_names_the_wider_half():
    assert intervals.show({"mean": 87.46, "low": 85.86, "high": 88.8}) == "87.5 ± 1.6"
    assert intervals.show({"mean": 0.5, "low": 0.0, "high": 1.0}, signed=True) == "+0.5 ± 0.5"
