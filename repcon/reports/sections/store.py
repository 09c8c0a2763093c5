"""A store's figures as sections of a page: tables and plots."""

from collections.abc import Mapping
from typing import Any

from repcon.labels.statistics import MUTUAL_INFORMATION, UNCOMPRESSED, known, why_no_labels
from repcon.reports import plots
from repcon.reports.figure_names import plain_label
from repcon.reports.figures import Figure, Unit, format_loss, format_value
from repcon.reports.plot_style import SeriesStyles
from repcon.reports.plots import Bar
from repcon.reports.tables import Section, label_cell, table

_BYTES = ("bytes", "bytes_per_crop", "box_bytes_per_crop")
_TEACHER_COLUMNS = {
    "architecture": Unit.NONE, "precision": Unit.NONE, "licence": Unit.NONE, "classes": Unit.NONE, "k": Unit.NONE,
    "bytes_per_crop": Unit.BYTES, "weight_hash": Unit.NONE,
}  # fmt: skip
_CLASS_COLUMNS = {
    "top1_probability": Unit.NONE, "entropy_nat": Unit.NAT, "classes_on_top": Unit.NONE, "classes": Unit.NONE
}  # fmt: skip


def store_sections(found: Mapping[str, Any], styles: SeriesStyles, prefix: str) -> list[Section]:
    """The figures of `labels.statistics`: the store, its truncation, its classes. Plots are called `prefix`-..."""
    found = known(found)
    heads = {name: head for name, head in found["heads"].items() if "mass" in head}
    store = _store(found, prefix)
    return [store, _truncation(found, heads, styles, prefix), _classes(found, heads, prefix)] if heads else [store]


def _store(found: Mapping[str, Any], prefix: str) -> Section:
    single = [_fact(name, value) for name, value in found.items() if isinstance(value, int | float | str)]
    facts = table("Contents", ("figure", "value"), [(label_cell(figure), figure.text) for figure in single])
    rows = [
        [name, *(format_value(head[key], unit) for key, unit in _TEACHER_COLUMNS.items())]
        for name, head in found["heads"].items()
    ]
    teachers = table("Teachers", ("teacher", *map(plain_label, _TEACHER_COLUMNS)), rows)
    sizes = {name: head["bytes_per_crop"] for name, head in found["heads"].items()}
    sizes["boxes and flips"] = found["box_bytes_per_crop"]
    bars = [Bar(label=name, value=size) for name, size in sizes.items() if size is not None]
    drawn = [plots.bars(f"{prefix}-bytes", "Size", bars, "bytes per crop")] if bars else []
    if by_k := _sizes_by_k(found):
        title = "Size of the store against k"
        drawn.append(plots.lines(f"{prefix}-size", title, by_k, "k", "bytes per crop", points=True, from_zero=True))
    reason = why_no_labels(found)
    lead = f"No labels to look at: {reason}." if reason else ""
    return Section(title="The store", lead=lead, plots=tuple(drawn), tables=(teachers, facts))


def _fact(name: str, value: Any) -> Figure:
    if name == "compression":
        return Figure(name=name, label=name, value=f"{value:.2f} times smaller than {UNCOMPRESSED}")
    label = plain_label(name) if name != "bytes" else "size"
    return Figure(name=name, label=label, value=value, unit=Unit.BYTES if name in _BYTES else Unit.NONE)


def _sizes_by_k(found: Mapping[str, Any]) -> dict[str, plots.Line]:
    """Bytes per crop of the whole store, boxes and flips included, against k for each encoding of the values.

    A head of fewer classes than k is stored whole. The rows that were looked at fill less than a shard, so they
    compress a little worse or better than the store's own.
    """
    heads = [head["bytes_by_k"] for head in found["heads"].values() if head.get("bytes_by_k")]
    every = sorted({k for sizes in heads for k in sizes["k"]})
    ks = [k for k in every if all(k in sizes["k"] or k > sizes["k"][-1] for sizes in heads)]

    def total(k: int, values: str) -> float:
        parts = (sizes[values][sizes["k"].index(min(k, sizes["k"][-1]))] for sizes in heads)
        return found["box_bytes_per_crop"] + sum(parts)

    return {
        values + (" (here)" if values == found["values"] else ""): (ks, [total(k, values) for k in ks])
        for values in ("float16", "quantized8")
    } if len(ks) > 1 else {}  # fmt: skip


def _truncation(found: Mapping[str, Any], heads: Mapping[str, Any], styles: SeriesStyles, prefix: str) -> Section:
    lost = {name: (range(1, head["k"] + 1), head["kl_by_k"]) for name, head in heads.items()}
    mass = {name: (range(1, head["k"] + 1), head["mass_by_k"]) for name, head in heads.items()}
    drawn = (
        plots.lines(f"{prefix}-kl", "KL lost by a smaller k", lost, "k", "nat", styles=styles, points=True, log=True),
        plots.lines(f"{prefix}-mass", "Mass in the top k", mass, "k", "probability", styles=styles, points=True),
    )
    columns = ("teacher", "values", "bytes per crop", "mean KL (nat)", "worst KL (nat)", "saturated")
    lead = (
        "KL in nat at temperature 1 between stored rows and the same rows cut to a smaller k, the rest spread evenly; "
        f"crops looked at: {found['sampled_crops']:,}."
    )
    return Section(
        title="Truncation", lead=lead, plots=drawn, tables=(table("Encodings", columns, encoding_rows(found)),)
    )


def encoding_rows(found: Mapping[str, Any]) -> list[list[str]]:
    """Teacher, encoding of the values, bytes per crop, mean and worst KL in nat, saturated share."""
    return [
        [name, values + (" (here)" if values == found["values"] else ""), f"{held['bytes_per_crop']:.1f}",
         *(format_loss(held[key]) for key in ("kl", "kl_worst")), f"{100 * held['saturated']:.1f} %"]
        for name, head in found["heads"].items() for values, held in head.get("encodings", {}).items()
    ]  # fmt: skip


def _classes(found: Mapping[str, Any], heads: Mapping[str, Any], prefix: str) -> Section:
    drawn = []
    for number, (name, head) in enumerate(heads.items()):
        bars = [Bar(label=str(label), value=100 * share) for label, share in head["most_on_top"]]
        drawn.append(plots.bars(f"{prefix}-top{number}", f"{name}: most often on top", bars, "% of crops"))
    rows = [
        [name, *(format_value(head[key], unit) for key, unit in _CLASS_COLUMNS.items())] for name, head in heads.items()
    ]
    columns = ("teacher", "top-1 probability", "entropy", "classes ever on top", "classes")
    tables = [table("", columns, rows)]
    if found["agreement"]:
        pairs = [
            [pair, f"{values['mutual_information']:.2f}", format_value(values.get("same_class"), Unit.FRACTION)]
            for pair, values in found["agreement"].items()
        ]
        note = f"Mutual information of top classes, {MUTUAL_INFORMATION}."
        tables.append(table("Agreement", ("teachers", "mutual information", "same class"), pairs, note))
    return Section(title="Classes", plots=tuple(drawn), tables=tuple(tables))
