"""The sources of a report: run folders, benchmark records, stores, and JSON files of figures (`--json`)."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from repcon.reports.figures import as_mapping
from repcon.runtime.console import warn
from repcon.runtime.errors import UserError
from repcon.runtime.run_dir import MARKER, RESULTS
from repcon.runtime.text import printable
from repcon.runtime.untrusted import MAX_BYTES, UnreadableError, parse_json, parse_toml, read_text, showable

ENVIRONMENT = "env.json"
METRICS = "metrics.jsonl"
STORE = ("manifest.json", "zarr.json")
INSPECT_KEYS = {"heads", "bytes_per_crop", "sampled_crops"}
"""Keys that figures of `repcon inspect --json` have and others lack."""
MOST_SOURCES = 1000
MOST_METRICS_BYTES = 512 * 2**20
"""Of a metrics.jsonl; a run writes about a megabyte."""
MOST_LINE = 2**20
"""Characters of a line of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One run or record, read completely. Its texts are untrusted: bounded and without control characters here, escaped
    where they are shown."""

    path: Path
    name: str
    kind: str
    """The command (`train`, `evaluate`, ...), `benchmark`, `store`, or `figures` for any other JSON file."""
    config: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)
    events: Sequence[Mapping[str, Any]] = ()
    """The lines of metrics.jsonl."""
    figures: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    """Shown with it: that there are no results yet, lines that could not be read, a record's own note."""
    paths: Mapping[str, str] = field(default_factory=dict)
    """`store`, `pack` and `out` of the recipe, unchanged; control characters in all other texts are written out."""

    def events_of(self, event: str) -> list[Mapping[str, Any]]:
        """The events of one name, in order."""
        return [line for line in self.events if line.get("event") == event]


def read_sources(paths: Sequence[str]) -> list[Source]:
    """Read every path, folders of folders one level down, each once; make their names unique.

    A link below a path that leads out of it is not followed. Raises UserError naming a path that does not exist or
    holds nothing to report on, or a file that cannot be read.
    """
    if not paths:
        raise UserError("PATH: name at least one run folder, benchmark record or store")
    found: dict[Path, Source] = {}
    for path in paths:
        sources = list(_sources_at(Path(path)))
        if not sources:
            raise UserError(
                f"{path}: nothing to report on; expected a run folder (with {RESULTS}), a benchmark record, "
                "a label store, or a JSON file of figures"
            )
        for source in sources:
            found.setdefault(source.path.resolve(), source)
    if len(found) > MOST_SOURCES:
        raise UserError(f"PATH: {len(found):,} runs and records; name {MOST_SOURCES:,} at most")
    return _with_unique_names(list(found.values()))


def _sources_at(path: Path) -> Iterator[Source]:
    if not path.exists():
        raise UserError(f"{path}: there is no such file or folder")
    if path.is_file():
        yield replace(_benchmark(path, _json(path)), name=printable(path.stem))
    else:
        source = _folder(path)
        if source is not None:
            yield source
        if source is None or source.kind in ("consolidate", "demo"):  # their folders hold the runs of their steps
            inside = (folder for folder in sorted(path.iterdir()) if folder.is_dir() and _is_below(folder, path))
            inner = (_folder(folder) for folder in itertools.islice(inside, MOST_SOURCES + 1))
            left_out = ("report", "figures", "benchmark") if source is not None else ("report",)
            yield from (found for found in inner if found is not None and found.kind not in left_out)


def _is_below(path: Path, folder: Path) -> bool:
    """False, with a printed note, for a link that leads out of the folder."""
    below = path.resolve().is_relative_to(folder.resolve())
    if not below:
        warn(f"{path} is a link that leads out of {folder}: not followed", "note")
    return below


def _is_own_file(path: Path) -> bool:
    """Whether the path is a file, and no link out of its folder."""
    return path.is_file() and _is_below(path, path.parent)


def _folder(path: Path) -> Source | None:
    if _is_own_file(path / MARKER):
        return _run(path)
    if all((path / name).is_file() for name in STORE):
        return Source(path=path, name=printable(path.name), kind="store")
    files = [file for file in sorted(path.glob("*.json"))[: MOST_SOURCES + 1] if _is_own_file(file)]
    if not files:
        return None
    # A record: one file of figures, or several (the forms of one benchmark), then each under its file's name.
    read_files = {file.stem: _json(file) for file in files if file.name != ENVIRONMENT}
    figures = next(iter(read_files.values())) if len(read_files) == 1 else read_files
    if _is_own_file(path / ENVIRONMENT):
        figures = {**figures, "environment": _json(path / ENVIRONMENT)}
    return _benchmark(path, figures)


def _run(path: Path) -> Source:
    events, unread = _events(path / METRICS)
    ended = _is_own_file(path / RESULTS)
    notes = [] if ended else ["no results yet: the run is going on, or was stopped"]
    if unread:
        notes.append(f"{unread} of {len(events) + unread} lines of {METRICS} could not be read: left out")
    config = _read(path / "config.toml", parse_toml) if _is_own_file(path / "config.toml") else {}
    return Source(
        path=path,
        name=printable(path.name),
        kind=printable(_read(path / MARKER, str.strip, 2**16))[:40],
        config=_showable(path / "config.toml", config),
        environment=_json(path / ENVIRONMENT) if _is_own_file(path / ENVIRONMENT) else {},
        events=events,
        figures=_json(path / RESULTS) if ended else {},
        notes=tuple(notes),
        paths={key: value for key in ("store", "pack", "out") if isinstance(value := config.get(key), str)},
    )


def _benchmark(path: Path, figures: Mapping[str, Any]) -> Source:
    environment = figures.get("environment", {})
    kind = "inspect" if figures.keys() >= INSPECT_KEYS else "benchmark" if environment else "figures"
    facts = dict(as_mapping(environment))
    note = facts.pop("note", None)
    return Source(
        path=path,
        name=printable(path.name),
        kind=kind,
        environment=facts,
        figures={name: value for name, value in figures.items() if name != "environment"},
        notes=(str(note),) if note else (),
    )


def _json(path: Path) -> dict[str, Any]:
    value = _read(path, parse_json)
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected one JSON object of figures")
    return _showable(path, value)


def _read(path: Path, parse: Callable[[str], Any], max_bytes: int = MAX_BYTES) -> Any:
    try:
        return parse(read_text(path, max_bytes))
    except UnreadableError as error:
        raise UserError(f"{path}: cannot be read ({error})") from error


def _showable(path: Path, value: Any) -> Any:
    try:
        return showable(value)
    except UnreadableError as error:
        raise UserError(f"{path}: cannot be reported ({error})") from error


def _events(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The lines that can be read, and how many cannot: a run that was killed may leave the last one torn."""
    events: list[dict[str, Any]] = []
    text = _read(path, str, MOST_METRICS_BYTES).rstrip("\n") if _is_own_file(path) else ""
    lines = text.split("\n") if text else []
    for line in lines:
        try:
            value = showable(parse_json(line)) if len(line) <= MOST_LINE else None
        except UnreadableError:
            continue
        if isinstance(value, dict):
            events.append(value)
    return events, len(lines) - len(events)


def _with_unique_names(sources: list[Source]) -> list[Source]:
    """Each source called by as much of its path's end as no other shares."""
    named: list[Source] = []
    for source in sources:
        parts = source.path.resolve().parts
        others = [other for other in sources if other is not source]
        name, depth = source.name, 1
        while any(_tail(other, depth) == _tail(source, depth) for other in others) and depth < len(parts):
            depth += 1
            name = "/".join(_tail(source, depth))
        named.append(replace(source, name=printable(name)))
    return named


def _tail(source: Source, depth: int) -> tuple[str, ...]:
    path = source.path.resolve()
    last = path.stem if path.is_file() else path.name
    return (*path.parts[:-1], last)[-depth:]
