"""Plots: what is drawn from awkward numbers, and how a picture takes its page's colours."""

import re
from xml.etree import ElementTree

import numpy as np
import pytest

from repcon.reports import plots
from repcon.reports.figures import Interval
from repcon.reports.plot_style import DARK, INK, LIGHT, SERIES, SeriesStyles, standalone
from repcon.reports.plots import Bar


def test_a_long_line_keeps_its_means_and_its_range() -> None:
    xs, ys = np.arange(1000.0), np.tile([0.0, 2.0], 500)
    centre, mean, low, high = plots.binned(xs, ys, 100)
    assert len(centre) == 100
    np.testing.assert_allclose(mean, 1.0)
    np.testing.assert_allclose(low, 0.0)
    np.testing.assert_allclose(high, 2.0)
    assert centre[0] == 4.5


def test_what_is_not_finite_is_left_out() -> None:
    centre, mean, _, _ = plots.binned([0, 1, 2, 3], [1.0, float("nan"), float("inf"), 4.0], 10)
    assert centre.tolist() == [0, 3]
    assert mean.tolist() == [1, 4]


@pytest.mark.parametrize("values", [[], [1.0], [float("nan")], [3.0, 3.0], [1e-30, 1e30]])
def test_lines_of_any_numbers_are_a_picture(values: list[float]) -> None:
    series = {f"run {i}": (list(range(len(values))), values) for i in range(20)}
    ElementTree.fromstring(plots.lines("a", "Loss", series, "step", "nat", from_zero=True).svg)


def test_intervals_without_bounds_and_series_without_values() -> None:
    unbounded = Interval(mean=1.0, low=float("-inf"), high=float("inf"))
    groups = {"probe": {"b": unbounded}, "1-shot": {"b": Interval(mean=2.0, low=2.0, high=2.0)}}
    text = plots.intervals("a", "Transfer", groups, ["a", "b"], "%", zero=True).svg
    ElementTree.fromstring(text)
    assert "var(--s2)" in text
    assert "var(--s1)" not in text


@pytest.mark.parametrize("rows", [[], [0.0], [-1.0, 2.0], [1e9, 1e-9], [float("nan")]])
def test_bars_of_any_numbers_are_a_picture(rows: list[float]) -> None:
    bars = [Bar(label=f"bar {value}", value=value, low=value / 2, high=value * 2, limit=1.0) for value in rows]
    ElementTree.fromstring(plots.bars("a", "Ratios", bars, "ratio").svg)


def test_colours_are_the_pages_and_ids_the_plots() -> None:
    series = {f"run {number}": ([0.0, 1.0], [0.0, float(number)]) for number in range(8)}
    text = plots.lines("mine", "Loss", series, "step", "nat", points=True).svg
    used = set(re.findall(r"var\(--(\w+)\)", text))
    assert used == {"ink", "muted", "grid", *(f"s{number}" for number in range(1, 9))}
    assert used <= LIGHT.keys() == DARK.keys()
    assert not re.search("|".join((INK, *SERIES)), text)
    assert text == plots.lines("mine", "Loss", series, "step", "nat", points=True).svg
    ids = re.findall(r' id="([^"]*)"', text)
    assert ids and len(ids) == len(set(ids))
    others = re.findall(r' id="([^"]*)"', plots.lines("other", "Loss", series, "step", "nat", points=True).svg)
    assert others and not set(ids) & set(others)
    assert set(re.findall(r"url\(#([^)]*)\)|href=\"#([^\"]*)\"", text)) <= {(n, "") for n in ids} | {
        ("", n) for n in ids
    }


def test_a_name_keeps_its_style_from_plot_to_plot() -> None:
    styles = SeriesStyles()
    interval = Interval(mean=1.0, low=0.0, high=2.0)
    plots.intervals("a", "Transfer", {"probe": {"x": interval, "y": interval}}, ["x", "y"], "%", styles=styles)
    text = plots.lines("b", "Loss", {"y": ([0.0, 1.0], [1.0, 2.0])}, "step", "nat", styles=styles).svg
    assert "var(--s2)" in text and "var(--s1)" not in text
    looks = [styles[f"model {number}"] for number in range(64)]
    assert len({(look.color, look.marker) for look in looks}) == 64
    assert len({(look.color, str(look.dash)) for look in looks[:32]}) == 32


def test_many_metrics_of_many_backbones_stay_on_a_screen() -> None:
    backbones = {f"backbone {n}": Interval(mean=float(n), low=0.0, high=20.0) for n in range(10)}
    plot = plots.intervals("a", "Transfer", {f"metric {n}": backbones for n in range(8)}, list(backbones), "%")
    _, _, width, height = map(float, re.search(r'viewBox="([^"]*)"', plot.svg)[1].split())
    assert plot.wide and height < 0.75 * width
    assert all(plot.svg.count(f">{name}<") == 2 for name in backbones)  # once per row of panels


def test_a_picture_alone_brings_its_colours() -> None:
    text = standalone(plots.lines("a", "Loss", {"x": ([0, 1], [1, 2])}, "step", "nat").svg)
    ElementTree.fromstring(text)
    assert "prefers-color-scheme: dark" in text
    assert LIGHT["s1"] in text
    assert DARK["s1"] in text
