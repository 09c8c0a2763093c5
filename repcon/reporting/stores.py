"""A store's figures as sections of a page: tables and plots."""

from collections.abc import Mapping
from typing import Any

from repcon.reporting import plots
from repcon.reporting.plots import Bar
from repcon.reporting.sections import Plot, Section
from repcon.reporting.tables import table, words


def sections(found: Mapping[str, Any]) -> list[Section]:
    """What `store_figures.figures` found: the store, its truncation, its classes."""
    heads = {name: head for name, head in found["heads"].items() if "mass" in head}
    shown = [_store(found)]
    if heads:
        shown += [_truncation(found, heads), _classes(heads)]
    return shown


def _store(found: Mapping[str, Any]) -> Section:
    single = {name: value for name, value in found.items() if isinstance(value, int | float | str)}
    facts = table("", ("", ""), [(name.replace("_", " "), words(name, value)) for name, value in single.items()])
    keys = ("architecture", "precision", "licence", "classes", "k", "bytes_per_crop", "weight_hash")
    rows = [[name, *(words(key, head[key]) for key in keys)] for name, head in found["heads"].items()]
    teachers = table("Teachers", ("teacher", *(key.replace("_", " ") for key in keys)), rows)
    bars = [Bar(label=name, value=head["bytes_per_crop"]) for name, head in found["heads"].items()]
    bars.append(Bar(label="boxes and flips", value=found["box_bytes_per_crop"]))
    drawn = plots.bars("store-bytes", "Size", bars, "bytes per crop")
    return Section(
        title="The store", plots=(Plot(name="store-bytes", title="Size", svg=drawn),), tables=(teachers, facts)
    )


def _truncation(found: Mapping[str, Any], heads: Mapping[str, Any]) -> Section:
    lost = {name: (range(1, head["k"] + 1), head["kl_by_k"]) for name, head in heads.items()}
    mass = {name: (range(1, head["k"] + 1), head["mass_by_k"]) for name, head in heads.items()}
    drawn = (
        Plot(
            name="store-kl", title="KL lost",
            svg=plots.lines("store-kl", "KL lost by a smaller k", lost, "k", "nat", points=True, from_zero=True),
        ),
        Plot(
            name="store-mass", title="Mass",
            svg=plots.lines("store-mass", "Mass in the top k", mass, "k", "probability", points=True),
        ),
    )  # fmt: skip
    rows = [
        [name, values + (" (here)" if values == found["values"] else ""), f"{held['bytes_per_crop']:.1f}",
         *("unknown" if held[key] is None else f"{held[key]:.1e}" for key in ("kl", "kl_worst")),
         f"{held['saturated']:.1%}"]
        for name, head in heads.items() for values, held in head["encodings"].items()
    ]  # fmt: skip
    columns = ("teacher", "values", "bytes per crop", "mean KL", "worst KL", "saturated")
    lead = (
        "KL in nat at temperature 1 between stored rows and the same rows cut to a smaller k, the rest spread evenly; "
        f"{found['sampled_crops']:,} crops were looked at."
    )
    return Section(title="Truncation", lead=lead, plots=drawn, tables=(table("Encodings", columns, rows),))


def _classes(heads: Mapping[str, Any]) -> Section:
    drawn = []
    for number, (name, head) in enumerate(heads.items()):
        bars = [Bar(label=str(label), value=100 * share) for label, share in head["most_on_top"]]
        title = f"{name}: most often on top"
        drawn.append(Plot(name=f"store-top-{number}", title=title,
                          svg=plots.bars(f"store-top-{number}", title, bars, "% of crops")))  # fmt: skip
    keys = ("top1_probability", "entropy_nat", "classes_on_top", "classes")
    rows = [[name, *(words(key, head[key]) for key in keys)] for name, head in heads.items()]
    columns = ("teacher", "top-1 probability", "entropy in nat", "classes ever on top", "classes")
    return Section(title="Classes", plots=tuple(drawn), tables=(table("", columns, rows),))
