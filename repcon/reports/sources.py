"""What a report is made of: run folders, benchmark records, stores, and files that `--json` wrote."""

import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from repcon.runtime.errors import UserError
from repcon.runtime.run_dir import MARKER, RESULTS

ENVIRONMENT = "env.json"
METRICS = "metrics.jsonl"
STORE = ("manifest.json", "zarr.json")
INSPECTED = {"heads", "bytes_per_crop", "sampled_crops"}
"""What tells the figures of `repcon inspect --json` from others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One run or record, read whole. Everything in it is somebody else's text: it is escaped where it is shown."""

    path: Path
    name: str
    kind: str
    """The command (`train`, `evaluate`, ...), `benchmark`, `store`, or `figures` for a JSON file of unknown ones."""
    config: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)
    events: Sequence[Mapping[str, Any]] = ()
    """The lines of metrics.jsonl."""
    figures: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    """What a reader must know: no results yet, lines that could not be read."""

    def of(self, event: str) -> list[Mapping[str, Any]]:
        """The events of one name, in order."""
        return [line for line in self.events if line.get("event") == event]


def read(paths: Sequence[str]) -> list[Source]:
    """Reads every path, folders of folders one level down, each once; names are made unique.

    Raises UserError naming a path that is not there or holds nothing to report on.
    """
    if not paths:
        raise UserError("PATH: name at least one run folder, benchmark record or store")
    found: dict[Path, Source] = {}
    for path in paths:
        sources = list(_sources(Path(path)))
        if not sources:
            raise UserError(
                f"{path}: nothing to report on; expected a run folder (with {RESULTS}), a benchmark record, "
                "a label store, or a JSON file of figures"
            )
        for source in sources:
            found.setdefault(source.path.resolve(), source)
    return _named(list(found.values()))


def _sources(path: Path) -> Iterator[Source]:
    if not path.exists():
        raise UserError(f"{path}: there is no such file or folder")
    if path.is_file():
        yield _json_file(path)
    else:
        source = _folder(path)
        if source is not None:
            yield source
        if source is None or source.kind == "demo":  # The demo keeps the runs that it is made of inside its own.
            inner = (_folder(folder) for folder in sorted(path.iterdir()) if folder.is_dir())
            left_out = ("report", "figures", "benchmark") if source is not None else ("report",)
            yield from (found for found in inner if found is not None and found.kind not in left_out)


def _folder(path: Path) -> Source | None:
    if (path / MARKER).is_file():
        return _run(path)
    if all((path / name).is_file() for name in STORE):
        return Source(path=path, name=path.name, kind="store")
    files = sorted(path.glob("*.json"))
    if not files:
        return None
    # A record: one file of figures, or several (the forms of one benchmark), then each under its file's name.
    read_files = {file.stem: _json(file) for file in files if file.name != ENVIRONMENT}
    figures = next(iter(read_files.values())) if len(read_files) == 1 else read_files
    if (path / ENVIRONMENT).is_file():
        figures = {**figures, "environment": _json(path / ENVIRONMENT)}
    return _benchmark(path, figures)


def _run(path: Path) -> Source:
    events, unread = _events(path / METRICS)
    notes = [] if (path / RESULTS).is_file() else ["no results yet: the run is going on, or was stopped"]
    if unread:
        notes.append(f"{unread} of {len(events) + unread} lines of {METRICS} could not be read: left out")
    return Source(
        path=path,
        name=path.name,
        kind=(path / MARKER).read_text().strip(),
        config=_toml(path / "config.toml"),
        environment=_json(path / ENVIRONMENT) if (path / ENVIRONMENT).is_file() else {},
        events=events,
        figures=_json(path / RESULTS) if (path / RESULTS).is_file() else {},
        notes=tuple(notes),
    )


def _json_file(path: Path) -> Source:
    return replace(_benchmark(path, _json(path)), name=path.stem)


def _benchmark(path: Path, figures: Mapping[str, Any]) -> Source:
    environment = figures.get("environment", {})
    kind = "inspect" if figures.keys() >= INSPECTED else "benchmark" if environment else "figures"
    facts = dict(environment) if isinstance(environment, Mapping) else {}
    note = facts.pop("note", None)
    return Source(
        path=path,
        name=path.name,
        kind=kind,
        environment=facts,
        figures={name: value for name, value in figures.items() if name != "environment"},
        notes=(str(note),) if note else (),
    )


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected one JSON object of figures")
    return value


def _toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text()) if path.is_file() else {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as TOML ({error})") from error


def _events(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The lines that are whole; a run that was killed may leave the last one torn."""
    events: list[dict[str, Any]] = []
    lines = path.read_text(errors="replace").splitlines() if path.is_file() else []
    for line in lines:
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            events.append(value)
    return events, len(lines) - len(events)


def _named(sources: list[Source]) -> list[Source]:
    """As much of the path's end as tells two sources apart."""
    named: list[Source] = []
    for source in sources:
        parts = source.path.resolve().parts
        others = [other for other in sources if other is not source]
        name, depth = source.name, 1
        while any(_tail(other, depth) == _tail(source, depth) for other in others) and depth < len(parts):
            depth += 1
            name = "/".join(_tail(source, depth))
        named.append(replace(source, name=name))
    return named


def _tail(source: Source, depth: int) -> tuple[str, ...]:
    path = source.path.resolve()
    last = path.stem if path.is_file() else path.name
    return (*path.parts[:-1], last)[-depth:]
