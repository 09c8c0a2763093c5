"""The verdict on made-up answers whose outcome is known."""

import numpy as np
import pytest

from repcon.evaluation import intervals
from repcon.evaluation.results import difference, headline, verdict


def answers(right: int, images: int = 400, *, first: int = 0) -> dict[str, np.ndarray]:
    """Right on `right` images in a row from the one numbered `first` on."""
    given = np.zeros(images, bool)
    given[np.arange(first, first + right) % images] = True
    return {"probe": given, "shot_5": np.stack([given, given])}


def test_a_model_above_every_other_one_beats_them():
    measured = {"birds": {"generalist": answers(280), "teacher": answers(300), "student": answers(340)}}
    found = verdict(measured, "student", ["generalist", "teacher"])
    assert found["outcome"] == "better" and found["rival"] == found["best_rival"] == "teacher"
    assert np.isclose(found["difference"]["mean"], 10)
    low, high = (f"{found['difference'][key]:.1f}" for key in ("low", "high"))
    assert found["sentence"] == (
        "student beats every other model: +10.0 points of linear probe over the best of them (teacher), "
        f"95 % interval {low} to {high}"
    )
    assert "details" not in found


def test_within_the_noise_of_the_best_is_level():
    measured = {"birds": {"generalist": answers(200), "teacher": answers(300), "student": answers(301, first=150)}}
    found = verdict(measured, "student", ["generalist", "teacher"])
    assert found["outcome"] == "level" and found["difference"]["low"] < 0 < found["difference"]["high"]
    assert found["sentence"].startswith("student is level with the best other model (teacher): +0.2 points")


def test_one_better_model_suffices_to_be_below():
    measured = {"birds": {"generalist": answers(200), "teacher": answers(380), "student": answers(340)}}
    found = verdict(measured, "student", ["generalist", "teacher"])
    assert found["outcome"] == "worse"
    assert found["sentence"].startswith("student is below the best other model (teacher): -10.0 points of linear probe")


def test_a_rival_that_is_not_beaten_beyond_the_noise_is_named_though_another_is_higher():
    """Many differences both ways are noise; few one-sided ones are not, though their mean is smaller."""
    noisy, close = answers(300, first=200), answers(308)
    measured = {"birds": {"noisy": noisy, "close": close, "student": answers(320)}}
    found = verdict(measured, "student", ["noisy", "close"])
    assert found["differences"]["close"]["low"] > 0 > found["differences"]["noisy"]["low"]
    assert found["outcome"] == "level" and found["rival"] == "noisy"
    assert found["sentence"].startswith("student is level with noisy: +5.0 points")


def test_several_sets_count_alike_and_each_is_compared_with_its_own_best():
    measured = {
        "birds": {"a": answers(100, 200), "b": answers(140, 200), "student": answers(144, 200)},
        "food": {"a": answers(900, 1000), "b": answers(600, 1000), "student": answers(920, 1000)},
    }
    found = verdict(measured, "student", ["a", "b"])
    a = [intervals.difference(measured[s]["student"]["probe"], measured[s]["a"]["probe"]) for s in measured]
    assert np.isclose(found["differences"]["a"]["mean"], (22 + 2) / 2)
    assert found["differences"]["a"] == intervals.mean_over_sets(a)
    assert found["outcome"] == "better" and " on average: +12.0 points" in found["sentence"]
    assert {name: held["rival"] for name, held in found["by_dataset"].items()} == {"birds": "b", "food": "a"}
    assert found["details"].startswith("student by data set: birds +2.0 (") and "; food +2.0 (" in found["details"]


def test_without_rivals_or_a_common_metric():
    alone = verdict({"birds": {"student": answers(300)}}, "student", [])
    assert alone["outcome"] == "alone" and alone["sentence"].startswith("student is the only model, at 75.0 % linear")
    sets = [{"student": {"probe": np.ones(4)}}, {"student": {"knn_5": np.ones(4)}}]
    assert headline(sets) == "" and verdict(dict(zip("ab", sets, strict=True)), "student", []) == {}
    assert headline([{"s": {"shot_1": np.ones(3), "shot_5": np.ones(3)}}]) == "shot_5"


def test_a_verdict_between_equal_models_is_seldom_better_or_worse():
    generator, wrong = np.random.default_rng(0), 0
    for _ in range(100):
        measured = {
            name: {model: {"probe": generator.random(150) < 0.7} for model in ("rival", "student")} for name in "ab"
        }
        wrong += verdict(measured, "student", ["rival"])["outcome"] != "level"
    assert wrong <= 9


def test_the_mean_over_sets_covers_the_truth():
    generator, inside = np.random.default_rng(1), 0
    for _ in range(200):
        sets = [{m: {"probe": generator.random(n) < p} for m, p in (("a", 0.6), ("b", 0.7))} for n in (80, 300)]
        interval = difference(sets, "b", "a", "probe")
        inside += interval["low"] <= 10 <= interval["high"]
    assert inside >= 183
    one = {"mean": 3.0, "low": 1.0, "high": 6.0}
    assert intervals.mean_over_sets([one]) == pytest.approx(one)
    assert intervals.mean_over_sets([one, one])["high"] == pytest.approx(3 + 3 / np.sqrt(2))
