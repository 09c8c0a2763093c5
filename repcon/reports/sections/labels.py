"""The report's sections on labels: what a store holds, what its truncation costs, and a sheet of crops."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from repcon.labels.statistics import figures
from repcon.labels.store import LabelStore
from repcon.reports import crop_sheet
from repcon.reports.figure_names import run_figures
from repcon.reports.plot_style import SeriesStyles
from repcon.reports.sections.store import store_sections
from repcon.reports.sections.training import over_time, percent
from repcon.reports.sources import Source
from repcon.reports.tables import Section, side_by_side
from repcon.runtime.errors import UserError
from repcon.runtime.text import printable


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreLocation:
    """A store that a run wrote or read, and the pack that its labels belong to, where that is known."""

    store: str
    pack: str = ""
    fingerprint: str = ""
    """Of the store, where the run recorded it."""


def find_stores(sources: Sequence[Source]) -> list[StoreLocation]:
    """The stores of the sources, each once."""
    found: dict[str, StoreLocation] = {}
    for location in (location for source in sources for location in _stores_of(source)):
        key = str(Path(location.store).resolve())
        if key not in found or not found[key].pack:
            found[key] = location
    return list(found.values())


def _stores_of(source: Source) -> Iterator[StoreLocation]:
    if source.kind == "store":
        yield StoreLocation(store=str(source.path))
    key = {"train": "store", "precompute": "out"}.get(source.kind)
    if key and (store := _local_path(source, key)):
        fingerprint = str(source.figures.get("store_fingerprint", ""))
        yield StoreLocation(store=store, pack=_local_path(source, "pack"), fingerprint=fingerprint)


def _local_path(source: Source, key: str) -> str:
    """The configured local path as seen from a folder above the run, or from here; empty where nothing is there.

    URLs are not opened: a report of untrusted runs must not send requests.
    """
    value = source.paths.get(key, "")
    if not value or "://" in value:
        return ""
    above = (folder / value for folder in source.path.resolve().parents)
    return next((str(path) for path in (*above, Path(value)) if os.path.exists(path)), "")


def _missing_inputs(source: Source) -> Iterator[str]:
    """Notes on the store and pack of a training run that the report cannot show, with the reason."""
    for key, value in source.paths.items() if source.kind == "train" else ():
        if key == "out" or not value or _local_path(source, key):
            continue
        reason = (
            "is behind a URL, which a report does not open: not shown; copy it here and name the copy as well"
            if "://" in value
            else "is not there any more, and not shown"
        )
        yield f"{source.name}: its {key} {value} {reason}"


def labels(sources: Sequence[Source], styles: SeriesStyles) -> tuple[list[Section], list[str]]:
    """The sections, and notes on stores that could not be shown (moved, unfinished, of another pack)."""
    sections: list[Section] = []
    notes: list[str] = []
    if runs := {source.name: source for source in sources if source.kind == "precompute"}:
        sections.append(_precompute(runs, styles))
    notes += [printable(note) for source in sources for note in _missing_inputs(source)]
    found = find_stores(sources)
    for number, location in enumerate(found):
        name = f": {_store_name(location, found)}" if len(found) > 1 else ""
        if location.fingerprint and not _is_unchanged(location):
            notes.append(f"{location.store}: is not the store that the run learnt from, or has grown since: not shown")
            continue
        parts = {
            "A sheet of crops": partial(_sheet, location, name),
            "What a store holds": partial(_store, location, name, styles, f"store{number}"),
        }
        for what, part in parts.items():
            try:
                sections += part()
            except Exception as error:  # an untrusted store may be damaged in any way; the rest is still reported
                reason = str(error) if isinstance(error, UserError) else repr(error)
                notes.append(printable(f"{what} of {location.store} could not be shown: {reason}"))
    for number, source in enumerate(source for source in sources if source.kind == "inspect"):
        try:
            sections += _titled(store_sections(source.figures, styles, f"inspect{number}"), f": {source.name}")
        except (ArithmeticError, LookupError, TypeError, ValueError, AttributeError) as error:
            notes.append(f"{source.name}: not the figures of this version's `repcon inspect` ({error!r})")
    return sections, notes


def _store_name(location: StoreLocation, locations: Sequence[StoreLocation]) -> str:
    """The store's name, with its folder's where another has the same."""
    name = Path(location.store).name
    alone = [Path(other.store).name for other in locations].count(name) == 1
    return name if alone else f"{Path(location.store).resolve().parent.name}/{name}"


def _precompute(runs: Mapping[str, Source], styles: SeriesStyles) -> Section:
    lines = {
        name: [line for line in source.events if line.get("event") in ("progress", "unit")]
        for name, source in runs.items()
    }
    drawn = over_time(
        lines,
        [
            ("crops", "Throughput of precompute", "crops per second", lambda line: line.get("crops_per_second")),
            ("teachers-waited", "Teachers waiting", "% of the time", lambda line: percent(line.get("waited_share"))),
        ],
        styles,
    )
    ended = {name: run_figures(source.figures) for name, source in runs.items() if source.figures}
    tables = (side_by_side("", ended),) if ended else ()
    return Section(title="Precomputing the labels", plots=tuple(drawn), tables=tables)


def _is_unchanged(location: StoreLocation) -> bool:
    """Whether the store is still the one that the run read. A store that cannot be opened counts as unchanged: the
    sections on it name the reason."""
    try:
        return LabelStore.open(location.store).fingerprint == location.fingerprint
    except Exception:
        return True


def _sheet(location: StoreLocation, name: str) -> list[Section]:
    if not location.pack:
        return []
    images = tuple(crop_sheet.sheet(location.pack, location.store))
    lead = (
        "Stored crops, cut by the reference loader, beside what is stored for them: each teacher's three most probable "
        "classes. The frames on the left show where the crops lie in the image. Nothing here is computed anew."
    )
    return [Section(title=f"Crops and their labels{name}", lead=lead, sheet=images)] if images else []


def _store(location: StoreLocation, name: str, styles: SeriesStyles, prefix: str) -> list[Section]:
    return _titled(store_sections(figures(LabelStore.open(location.store)), styles, prefix), name)


def _titled(sections: Sequence[Section], name: str) -> list[Section]:
    return [replace(section, title=f"{section.title}{name}") for section in sections]
