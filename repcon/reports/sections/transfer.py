"""The report's section on transfer: accuracies with intervals, and what differs from the baseline beyond noise."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from repcon.evaluation.intervals import show
from repcon.reports import plots
from repcon.reports.plots import Interval, Plot
from repcon.reports.section import Section
from repcon.reports.sources import Source
from repcon.reports.tables import MARKED, Cell, Table, as_interval, is_number, mark, table, words

METRICS = {
    "knn_1": "kNN, k = 1", "knn_5": "kNN, k = 5", "knn_20": "kNN, k = 20", "probe": "linear probe",
    "shot_1": "1-shot", "shot_5": "5-shot", "shot_10": "10-shot", "finetune": "fine-tuned",
}  # fmt: skip

HEAD_COLUMNS = ("teacher_accuracy", "head_accuracy", "difference")


def transfer(sources: Sequence[Source]) -> list[Section]:
    """Of evaluations over several data sets their mean, then one section per data set, accuracies with intervals and
    paired differences to the baseline; then side by side those that tested on the same classes and as many images."""
    evaluated = [source for source in sources if source.kind == "evaluate"]
    means = [_over_sets(source) for source in evaluated if _sets(source.figures)]
    found = [one for source in evaluated for one in _apart(source) if measured(one.figures)]
    sections = [*means, *(_transfer(source, number, several=len(found) > 1) for number, source in enumerate(found))]
    if rows := [(source, row) for source in evaluated for row in source.figures.get("heads", ()) if _is_row(row)]:
        sections.append(_heads(rows))
    tests: dict[str, list[Source]] = {}
    for source in found:
        tests.setdefault(repr([source.figures.get(key) for key in ("class_names", "test_images")]), []).append(source)
    tables = [compared for held in tests.values() if (compared := _side_by_side(held))]
    return [*sections, Section(title="Transfer side by side", tables=tuple(tables))] if tables else sections


def verdicts(sources: Sequence[Source]) -> list[str]:
    """What each evaluation says in one sentence, and of several data sets how each came out; without one, what a
    consolidation made."""
    found: list[str] = []
    for source in sources:
        verdict = source.figures.get("verdict") if source.kind == "evaluate" else None
        if isinstance(verdict, Mapping):
            found += [str(verdict[key]) for key in ("sentence", "details") if verdict.get(key)]
    if not found:
        made = (source.figures.get("sentence") for source in sources if source.kind == "consolidate")
        found = [sentence for sentence in made if isinstance(sentence, str)]
    return list(dict.fromkeys(found))


def evaluation(figures: Mapping[str, Any]) -> bool:
    """Whether there is anything to show of an evaluation's figures."""
    return bool(measured(figures) or _sets(figures) or figures.get("heads"))


def _sets(figures: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The results of each data set, of an evaluation over several."""
    sets = figures.get("datasets")
    pairs = sets.items() if isinstance(sets, Mapping) else ()
    return {str(name): one for name, one in pairs if isinstance(one, Mapping) and measured(one)}


def _apart(source: Source) -> list[Source]:
    """The evaluation as one of each of its data sets."""
    sets = _sets(source.figures)
    return [replace(source, name=f"{source.name}, {name}", figures=one) for name, one in sets.items()] or [source]


def _over_sets(source: Source) -> Section:
    """A row per backbone and a column per data set and for their mean, by the metric of the verdict."""
    columns = {name: measured(one) for name, one in _sets(source.figures).items()}
    columns["mean"] = measured(source.figures.get("mean", {}))
    verdict = source.figures.get("verdict")
    metric = str(verdict.get("metric")) if isinstance(verdict, Mapping) else "probe"
    rows = [
        [backbone, *(_with_difference(held.get(backbone, {}).get(metric), None) for held in columns.values())]
        for backbone in columns["mean"]
    ]
    note = "Accuracy in per cent with 95 % intervals; the mean counts each data set alike."
    title = f"Transfer to {len(columns) - 1} data sets: {METRICS.get(metric, metric)}"
    lead = " ".join(f"{line}." for line in verdicts([source]))
    return Section(title=title, lead=lead, tables=(table("", ("backbone", *columns), rows, note),))


def _is_row(row: Any) -> bool:
    return isinstance(row, Mapping) and all(as_interval(row.get(key)) for key in HEAD_COLUMNS)


def _heads(rows: Sequence[tuple[Source, Mapping[str, Any]]]) -> Section:
    """Students' heads beside the classifiers of their teachers."""
    cells: list[list[str | Cell]] = []
    for _, row in rows:
        teacher, head, difference = (as_interval(row[key]) for key in HEAD_COLUMNS)
        held = "held out by its teacher" if row.get("held_out") else "not known to be held out"
        about = [str(row.get(key, "")) for key in ("student", "head", "dataset")]
        images = f"{words('', row.get('images'))}, {held}"
        assert teacher and head and difference
        sure = "better" if difference.low > 0 else "worse" if difference.high < 0 else ""
        apart = Cell(text=with_half(difference, signed=True), mark=sure)
        cells.append([*about, images, with_half(teacher), with_half(head), apart])
    columns = ("student", "head", "data set", "images", "teacher", "head's accuracy", "difference")
    lead = "Accuracy in per cent of labelled images of the teachers' classes, with 95 % intervals."
    return Section(title="Heads beside their teachers", lead=lead, tables=(table("", columns, cells),))


def _side_by_side(sources: Sequence[Source]) -> Table | None:
    """Accuracies of backbones that several evaluations have under one name; None where there are none."""
    held = {source.name: measured(source.figures) for source in sources}
    rows: list[list[str | Cell]] = []
    pairs = dict.fromkeys((t, m) for backbones in held.values() for t, values in backbones.items() for m in values)
    for backbone, metric in pairs:
        values = [backbones.get(backbone, {}).get(metric) for backbones in held.values()]
        if sum(value is not None for value in values) > 1:
            cells = [Cell(text=with_half(value) if value else "-", mark=mark(value, values[0])) for value in values]
            rows.append([f"{backbone}, {METRICS.get(metric, metric)}", *cells])
    return table("", ("backbone", *held), rows, f"Accuracy in per cent with 95 % intervals. {MARKED}") if rows else None


def measured(figures: Mapping[str, Any]) -> dict[str, dict[str, Interval]]:
    """backbone -> metric -> interval, as far as the figures are of that shape."""
    backbones = figures.get("backbones")
    found: dict[str, dict[str, Interval]] = {}
    for name, backbone in backbones.items() if isinstance(backbones, Mapping) else ():
        metrics = backbone.get("metrics", {}) if isinstance(backbone, Mapping) else {}
        found[name] = _intervals(metrics)
    return {name: metrics for name, metrics in found.items() if metrics}


def _intervals(values: Any) -> dict[str, Interval]:
    pairs = values.items() if isinstance(values, Mapping) else ()
    return {str(name): interval for name, value in pairs if (interval := as_interval(value))}


def _transfer(source: Source, number: int, *, several: bool) -> Section:
    figures, backbones = source.figures, measured(source.figures)
    metrics = list(dict.fromkeys(metric for values in backbones.values() for metric in values))
    baseline = str(figures.get("baseline", ""))
    differences = figures.get("differences")
    differences = {
        str(name): _intervals(values)
        for name, values in (differences.items() if isinstance(differences, Mapping) else ())
    }
    rows = [
        [name, *(_with_difference(backbones[name].get(m), differences.get(name, {}).get(m)) for m in metrics)]
        for name in backbones
    ]
    titles = [METRICS.get(metric, metric) for metric in metrics]
    note = f"95 % intervals. Below each, the paired difference to {baseline} in points." if differences else ""
    drawn = [_dots(f"transfer{number}", "Accuracy", backbones, metrics, "accuracy (%)")]
    if any(differences.values()):
        title = f"Difference to {baseline}"
        drawn.append(_dots(f"gain{number}", title, {baseline: {}} | differences, metrics, "points", zero=True))
    name = f": {source.name}" if several else ""
    return Section(
        title=f"Transfer{name}",
        lead=_transfer_lead(figures),
        plots=tuple(drawn),
        tables=(table("", ("backbone", *titles), rows, note),),
    )


def _transfer_lead(figures: Mapping[str, Any]) -> str:
    counts = [figures.get(key) for key in ("test_images", "train_images", "classes", "chance")]
    if not all(is_number(count) for count in counts):
        return ""
    test, train, classes, chance = counts
    return (
        f"Accuracy in per cent of {words('', test)} test images of {words('', classes)} classes, with probes trained "
        f"on {words('', train)} images; chance is {chance:.1f} %. All backbones see the same images, splits and draws."
    )


def _with_difference(value: Interval | None, difference: Interval | None) -> Cell:
    if value is None:
        return Cell(text="-")
    text = with_half(value)
    if difference is None:
        return Cell(text=text)
    sure = "better" if difference.low > 0 else "worse" if difference.high < 0 else ""
    return Cell(text=text, detail=with_half(difference, signed=True), mark=sure)


def with_half(value: Interval, *, signed: bool = False) -> str:
    """As the tables of `repcon evaluate` have it: the mean and the larger half of the interval."""
    return show(asdict(value), signed=signed)


def _dots(
    name: str, title: str, backbones: Mapping[str, Mapping[str, Interval]], metrics: Sequence[str], x: str, *,
    zero: bool = False,
) -> Plot:  # fmt: skip
    """A row per metric, a point per backbone; a backbone without values still takes its colour."""
    groups = {
        METRICS.get(metric, metric): {
            backbone: values[metric] for backbone, values in backbones.items() if metric in values
        }
        for metric in metrics
    }
    return plots.intervals(name, title, groups, list(backbones), x, zero=zero)
