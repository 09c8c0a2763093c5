"""The report's sections on transfer: accuracies with intervals, and differences to the baseline beyond the noise."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from repcon.evaluation.intervals import plus_minus
from repcon.evaluation.results import METRICS
from repcon.reports import plots
from repcon.reports.figures import Interval, as_interval, as_mapping, format_number, format_value, is_number
from repcon.reports.plot_style import SeriesStyles
from repcon.reports.plots import Plot
from repcon.reports.sources import Source
from repcon.reports.tables import MARKED, Cell, Section, Table, compare, table

_HEAD_COLUMNS = ("teacher_accuracy", "head_accuracy", "difference")
Measured = dict[str, dict[str, Interval]]
"""{backbone: {metric: interval}}."""


def transfer(sources: Sequence[Source], styles: SeriesStyles) -> list[Section]:
    """Of evaluations over several data sets their mean, then one section per data set, accuracies with intervals and
    paired differences to the baseline; then side by side those that tested on the same classes and as many images."""
    evaluated = [source for source in sources if source.kind == "evaluate"]
    found = [one for source in evaluated for one in _by_dataset(source) if measured(one.figures)]
    sections = [
        *(
            _over_sets(source, f"mean{n}", styles, alone=len(evaluated) == 1)
            for n, source in enumerate(evaluated)
            if _sets(source.figures)
        ),
        *(_transfer(source, number, styles, several=len(found) > 1) for number, source in enumerate(found)),
    ]
    if rows := [row for source in evaluated for row in _head_rows(source)]:
        sections.append(_heads(rows))
    tests: dict[str, list[Source]] = {}
    for source in found:
        tests.setdefault(repr([source.figures.get(key) for key in ("class_names", "test_images")]), []).append(source)
    several = [held for held in tests.values() if len({source.path for source in held}) > 1]
    tables = [compared for held in several if (compared := _side_by_side(held))]
    return [*sections, Section(title="Transfer side by side", tables=tuple(tables))] if tables else sections


def verdicts(sources: Sequence[Source]) -> list[str]:
    """The verdict of each evaluation, and of several data sets how each came out; without any, the sentence of a
    consolidation."""
    found: list[str] = []
    for source in sources:
        verdict = as_mapping(source.figures.get("verdict") if source.kind == "evaluate" else None)
        found += [str(verdict[key]) for key in ("sentence", "details") if verdict.get(key)]
    if not found:
        made = (source.figures.get("sentence") for source in sources if source.kind == "consolidate")
        found = [sentence for sentence in made if isinstance(sentence, str)]
    return list(dict.fromkeys(found))


def is_evaluation(figures: Mapping[str, Any]) -> bool:
    """Whether these sections have something to show of the figures."""
    return bool(measured(figures) or _sets(figures) or figures.get("heads"))


def measured(figures: Mapping[str, Any]) -> Measured:
    """The accuracies of each backbone, as far as the figures are of the shape of `repcon evaluate`'s results."""
    backbones = as_mapping(figures.get("backbones")).items()
    found = {str(name): _intervals(as_mapping(backbone).get("metrics")) for name, backbone in backbones}
    return {name: metrics for name, metrics in found.items() if metrics}


def _intervals(values: Any) -> dict[str, Interval]:
    return {str(name): interval for name, value in as_mapping(values).items() if (interval := as_interval(value))}


def _sets(figures: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The results of each data set, of an evaluation over several."""
    sets = as_mapping(figures.get("datasets")).items()
    return {str(name): one for name, one in sets if measured(as_mapping(one))}


def _by_dataset(source: Source) -> list[Source]:
    sets = _sets(source.figures)
    return [replace(source, name=f"{source.name}, {name}", figures=one) for name, one in sets.items()] or [source]


def _over_sets(source: Source, name: str, styles: SeriesStyles, *, alone: bool) -> Section:
    """A row per backbone and a column per data set and for their mean, by the metric of the verdict, which is repeated
    here unless it stands `alone` on top of the report."""
    columns = {name: measured(one) for name, one in _sets(source.figures).items()}
    columns["mean"] = measured(as_mapping(source.figures.get("mean")))
    metric = str(as_mapping(source.figures.get("verdict")).get("metric", "probe"))
    backbones = list(columns["mean"])
    rows = [
        [backbone, *(_with_difference(held.get(backbone, {}).get(metric), None) for held in columns.values())]
        for backbone in backbones
    ]
    note = "Accuracy in per cent with 95 % intervals; the mean counts each data set alike."
    title = f"Transfer to {len(columns) - 1} data sets: {METRICS.get(metric, metric)}"
    lead = "" if alone else " ".join(f"{line}." for line in verdicts([source]))
    groups = {
        column: {backbone: held[backbone][metric] for backbone in backbones if metric in held.get(backbone, {})}
        for column, held in columns.items()
    }
    drawn = [plots.intervals(name, "Accuracy", groups, backbones, "accuracy (%)", styles=styles)] if backbones else []
    return Section(title=title, lead=lead, plots=tuple(drawn), tables=(table("", ("backbone", *columns), rows, note),))


def _transfer(source: Source, number: int, styles: SeriesStyles, *, several: bool) -> Section:
    """One data set: every metric of every backbone; folded away where there are several sets."""
    figures, backbones = source.figures, measured(source.figures)
    metrics = _metrics(backbones)
    baseline = str(figures.get("baseline", ""))
    differences = _differences(figures)
    rows = [
        [name, *(_with_difference(backbones[name].get(m), differences.get(name, {}).get(m)) for m in metrics)]
        for name in backbones
    ]
    titles = [METRICS.get(metric, metric) for metric in metrics]
    note = f"95 % intervals. Below each, the paired difference to {baseline} in points." if differences else ""
    drawn = (accuracy_plot(figures, f"transfer{number}", styles), difference_plot(figures, f"gain{number}", styles))
    return Section(
        title=f"Transfer: {source.name}" if several else "Transfer",
        lead=_transfer_lead(figures),
        plots=tuple(plot for plot in drawn if plot),
        tables=(table("", ("backbone", *titles), rows, note),),
        folded=several,
    )


def accuracy_plot(figures: Mapping[str, Any], name: str, styles: SeriesStyles | None = None) -> Plot | None:
    """The accuracies of one data set, a panel per metric; None where there are none."""
    backbones = measured(figures)
    groups = _by_metric(backbones)
    if not groups:
        return None
    return plots.intervals(name, "Accuracy", groups, list(backbones), "accuracy (%)", styles=styles)


def difference_plot(figures: Mapping[str, Any], name: str, styles: SeriesStyles | None = None) -> Plot | None:
    """The paired differences to the baseline, a panel per metric; None where there are none."""
    backbones, differences = measured(figures), _differences(figures)
    if not any(differences.values()):
        return None
    names = list(dict.fromkeys([*backbones, *differences]))
    groups = _by_metric(differences)
    title = f"Difference to {figures.get('baseline', '')}"
    return plots.intervals(name, title, groups, names, "points", styles=styles, zero=True)


def _differences(figures: Mapping[str, Any]) -> Measured:
    return {str(name): _intervals(values) for name, values in as_mapping(figures.get("differences")).items()}


def _metrics(values: Measured) -> list[str]:
    return list(dict.fromkeys(metric for held in values.values() for metric in held))


def _by_metric(values: Measured) -> dict[str, dict[str, Interval]]:
    """{metric's title: {backbone: interval}}."""
    return {
        METRICS.get(metric, metric): {name: held[metric] for name, held in values.items() if metric in held}
        for metric in _metrics(values)
    }


def _transfer_lead(figures: Mapping[str, Any]) -> str:
    counts = [figures.get(key) for key in ("test_images", "train_images", "classes", "chance")]
    if not all(is_number(count) for count in counts):
        return ""
    test, train, classes, chance = filter(is_number, counts)
    folds = figures.get("folds")
    parts = f" in {folds} folds" if is_number(folds) and folds > 1 else ""
    return (
        f"Accuracy in per cent of {format_number(test)} test images of {format_number(classes)} classes{parts}, with "
        f"probes trained on {format_number(train)} images; chance is {chance:.1f} %. All backbones see the same "
        "images, splits and draws."
    )


def _with_difference(value: Interval | None, difference: Interval | None) -> Cell:
    if value is None:
        return Cell(text="-")
    text = format_interval(value)
    if difference is None:
        return Cell(text=text)
    return Cell(text=text, detail=format_interval(difference, signed=True), mark=_better_or_worse(difference))


def _better_or_worse(difference: Interval) -> str:
    return "better" if difference.low > 0 else "worse" if difference.high < 0 else ""


def format_interval(value: Interval, *, signed: bool = False) -> str:
    """The mean and the larger half of the interval, as in the tables of `repcon evaluate`."""
    return plus_minus(asdict(value), signed=signed)


def _head_rows(source: Source) -> list[Mapping[str, Any]]:
    rows = source.figures.get("heads")
    return [
        row
        for row in (rows if isinstance(rows, list) else ())
        if isinstance(row, Mapping) and all(as_interval(row.get(key)) for key in _HEAD_COLUMNS)
    ]


def _heads(rows: Sequence[Mapping[str, Any]]) -> Section:
    """Students' heads compared with the classifiers of their teachers."""
    cells: list[list[str | Cell]] = []
    for row in rows:
        teacher, head, difference = (as_interval(row[key]) for key in _HEAD_COLUMNS)
        assert teacher and head and difference
        held_out = "held out by its teacher" if row.get("held_out") else "not known to be held out"
        names = [str(row.get(key, "")) for key in ("student", "head", "dataset")]
        images = f"{format_value(row.get('images'))}, {held_out}"
        gain = Cell(text=format_interval(difference, signed=True), mark=_better_or_worse(difference))
        cells.append([*names, images, format_interval(teacher), format_interval(head), gain])
    columns = ("student", "head", "data set", "images", "teacher", "head's accuracy", "difference")
    lead = "Accuracy in per cent of labelled images of the teachers' classes, with 95 % intervals."
    return Section(title="Heads beside their teachers", lead=lead, tables=(table("", columns, cells),))


def _side_by_side(sources: Sequence[Source]) -> Table | None:
    """Accuracies of backbones that several evaluations have under one name; None where there are none."""
    held = {source.name: measured(source.figures) for source in sources}
    rows: list[list[str | Cell]] = []
    pairs = dict.fromkeys((b, m) for backbones in held.values() for b, values in backbones.items() for m in values)
    for backbone, metric in pairs:
        values = [backbones.get(backbone, {}).get(metric) for backbones in held.values()]
        if sum(value is not None for value in values) > 1:
            cells = [
                Cell(text=format_interval(value) if value else "-", mark=compare(value, values[0])) for value in values
            ]
            rows.append([f"{backbone}, {METRICS.get(metric, metric)}", *cells])
    return table("", ("backbone", *held), rows, f"Accuracy in per cent with 95 % intervals. {MARKED}") if rows else None
