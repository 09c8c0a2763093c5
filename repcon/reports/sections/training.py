"""The report's sections on training: students and task teachers, over time and side by side."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from repcon.reports import plots
from repcon.reports.figure_names import run_figures
from repcon.reports.figures import as_mapping, is_number
from repcon.reports.plot_style import SeriesStyles
from repcon.reports.sources import Source
from repcon.reports.tables import MARKED, Section, side_by_side

MOST_PLOTS = 40
"""Plots of one kind: of more heads or runs, the first get one."""


def training(sources: Sequence[Source], styles: SeriesStyles) -> list[Section]:
    """Loss per head, throughput, waiting and agreement over time; runs side by side where there are several."""
    runs = {source.name: source for source in sources if source.kind == "train"}
    if not runs:
        return []
    lead = (
        "Losses are in nat, weighted and scaled by the squared temperature as they are trained on; lines are means of "
        "equal parts of the run, the shade is their range. Waiting is the share of a step spent on data; it and the "
        "throughput begin after a run's first line, which holds its start."
    )
    steps = {name: source.events_of("step") for name, source in runs.items()}
    drawn = [*_losses(runs, styles), *over_time(steps, SPEED, styles), *_validation(runs, styles)]
    figures = {name: run_figures(_main_figures(source)) for name, source in runs.items()}
    note = MARKED if len(runs) > 1 else ""
    tables = (side_by_side("", figures, note),) if any(figures.values()) else ()
    return [Section(title="Training", lead=lead, plots=tuple(drawn), tables=tables)]


def _main_figures(source: Source) -> dict[str, Any]:
    """The results that are numbers, losses and validation, with the throughput's quantiles over the logged steps."""
    figures = {
        name: value
        for name, value in source.figures.items()
        if is_number(value) or name in ("loss", "validation", "validation_start")
    }
    rates = [rate for line in source.events_of("step")[1:] if is_number(rate := line.get("images_per_second"))]
    if "images_per_second" in figures and len(rates) >= 5:
        low, median, high = (float(rate) for rate in np.quantile(rates, (0.2, 0.5, 0.8)))
        figures["images_per_second_by_line"] = {"median": median, "q20": low, "q80": high}
    return figures


def _losses(runs: Mapping[str, Source], styles: SeriesStyles) -> list[plots.Plot]:
    """All heads of one run in one plot; of several runs a plot per head."""
    by_head: dict[str, dict[str, plots.Line]] = {}
    for name, source in runs.items():
        steps = source.events_of("step")
        for head in dict.fromkeys(head for line in steps for head in as_mapping(line.get("loss"))):
            points = [(line.get("step"), as_mapping(line["loss"]).get(head)) for line in steps if "loss" in line]
            by_head.setdefault(head, {})[name] = _points(points)
    if len(runs) == 1:
        lines = {head: held[next(iter(held))] for head, held in by_head.items()}
        return [plots.lines("loss", "Loss per head", lines, "step", "loss (nat)", styles=styles)] if lines else []
    return [
        plots.lines(f"loss{number}", f"Loss of head {head}", held, "step", "loss (nat)", styles=styles)
        for number, (head, held) in enumerate(list(by_head.items())[:MOST_PLOTS])
    ]


def over_time(
    runs: Mapping[str, Sequence[Mapping[str, Any]]],
    wanted: Sequence[tuple[str, str, str, Callable[[Mapping[str, Any]], Any]]],
    styles: SeriesStyles,
) -> list[plots.Plot]:
    """A plot for each wanted (name, title, unit, figure of a line) over time, from the runs' second line on."""
    seconds = {name: _seconds(lines) for name, lines in runs.items()}
    longest = max((times[-1] for times in seconds.values() if times), default=0.0)
    x, scale = next((x, scale) for x, scale, least in TIMES if longest >= least)
    drawn: list[plots.Plot] = []
    for key, title, unit, figure in wanted:
        held = {
            name: _points([(at / scale, figure(line)) for at, line in zip(seconds[name], lines, strict=True)][1:])
            for name, lines in runs.items()
        }
        if any(len(xs) > 1 for xs, _ in held.values()):
            reaching = 10.0 if unit.startswith("%") else 0.0
            drawn.append(plots.lines(key, title, held, x, unit, styles=styles, from_zero=True, reaching=reaching))
    return drawn


TIMES = (("hours", 3600, 3 * 3600), ("minutes", 60, 180), ("seconds", 1, -math.inf))
"""Units of the time axis: name, seconds, and the length of run from which each is used."""


def _seconds(lines: Sequence[Mapping[str, Any]]) -> list[float]:
    """Time in the run at each line. A resumed run logs from zero again: its time is added to what came before."""
    times: list[float] = []
    before = last = 0.0
    for line in lines:
        given = line.get("seconds")
        seconds = float(given) if is_number(given) else last
        before += last if seconds < last else 0.0
        last = seconds
        times.append(before + seconds)
    return times


def _waiting(line: Mapping[str, Any]) -> float | None:
    data, step = line.get("data_seconds"), line.get("step_seconds")
    if is_number(data) and is_number(step) and data + step > 0:
        return 100 * data / (data + step)
    return None


def _validation(runs: Mapping[str, Source], styles: SeriesStyles) -> list[plots.Plot]:
    """After each epoch: top-1 agreement with each teacher, a plot per run, and kNN accuracy where it was measured."""
    drawn: list[plots.Plot] = []
    neighbours: dict[str, plots.Line] = {}
    for number, (name, source) in enumerate(list(runs.items())[:MOST_PLOTS]):
        validations = source.events_of("validation")
        heads = dict.fromkeys(head for line in validations for head in as_mapping(line.get("heads")))
        agreement: dict[str, plots.Line] = {}
        for head in heads:
            shares = [as_mapping(as_mapping(line.get("heads")).get(head)).get("agreement") for line in validations]
            epochs = [line.get("epoch") for line in validations]
            agreement[head] = _points(list(zip(epochs, map(percent, shares), strict=True)))
        neighbours[name] = _points([(line.get("epoch"), percent(line.get("knn"))) for line in validations])
        if any(xs for xs, _ in agreement.values()):
            key, of = (f"agreement{number}", f": {name}") if len(runs) > 1 else ("agreement", "")
            title = f"Agreement with the teachers{of}"
            drawn.append(plots.lines(key, title, agreement, "epoch", "same top class (%)", styles=styles, points=True))
    if any(xs for xs, _ in neighbours.values()):
        unit = "accuracy (%)"
        drawn.append(plots.lines("knn", "kNN while training", neighbours, "epoch", unit, styles=styles, points=True))
    return drawn


def percent(share: Any) -> float | None:
    """A fraction in per cent; None for what is no number."""
    return 100 * share if is_number(share) else None


SPEED = (
    ("throughput", "Throughput", "images per second", lambda line: line.get("images_per_second")),
    ("waiting", "Waiting for data", "% of the step", _waiting),
)


def teachers(sources: Sequence[Source]) -> list[Section]:
    """Runs of `repcon teach`: accuracy over epochs, and the chosen epoch."""
    runs = {source.name: source for source in sources if source.kind == "teach"}
    if not runs:
        return []
    drawn: list[plots.Plot] = []
    for number, (name, source) in enumerate(runs.items()):
        lines = source.events_of("epoch")
        held = {
            "training crops": _points([(line.get("epoch"), line.get("accuracy")) for line in lines]),
            "held-out images": _points([(line.get("epoch"), line.get("held_accuracy")) for line in lines]),
        }
        held = {label: line for label, line in held.items() if line[0]}
        if held:
            title = f"Teacher {name}" if len(runs) > 1 else "Accuracy of the teacher"
            drawn.append(plots.lines(f"teacher{number}", title, held, "epoch", "accuracy (%)", points=True))
    figures = {name: run_figures(source.figures) for name, source in runs.items()}
    tables = (side_by_side("", figures),) if any(figures.values()) else ()
    return [Section(title="Task teachers", plots=tuple(drawn), tables=tables)]


def _points(pairs: Sequence[tuple[Any, Any]]) -> plots.Line:
    """Only pairs of figures; x and y apart."""
    kept = [(float(x), float(y)) for x, y in pairs if is_number(x) and is_number(y)]
    return [x for x, _ in kept], [y for _, y in kept]
