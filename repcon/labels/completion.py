"""Markers: the files that say which units are finished, and what exactly was written for each."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from repcon import config
from repcon.labels.layout import Unit, shards_of
from repcon.labels.manifest import MARKERS, Manifest, check_values, label_identity, seal, unseal
from repcon.runtime.errors import UserError
from repcon.runtime.filesystem import FileSystem

_MOST_BYTES, _MOST_ROW_BYTES = 2**22, 2**12
_MOST_REASON = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardFile:
    """One finished shard: its length, its hash, and the crc32c of its chunk for each crop."""

    bytes: int
    sha256: str
    crc32c: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionRecord:
    """A finished unit. `missing` are the rows that could not be decoded, and `reasons` say why: their labels are
    poison."""

    unit: str
    missing: tuple[int, ...]
    files: dict[str, ShardFile]
    reasons: tuple[str, ...] = ()
    """One for each missing row; none in stores that were made before they were kept."""
    source: str = ""
    """`source_of` the unit when it was written; "" in stores that were made before it was kept."""


def record_name(unit: Unit) -> str:
    """The marker's file name."""
    return f"{MARKERS}/{unit.name}.json"


def shard_file(data: bytes, crc32c: tuple[int, ...]) -> ShardFile:
    """What the marker holds about these bytes."""
    return ShardFile(bytes=len(data), sha256=hashlib.sha256(data).hexdigest(), crc32c=crc32c)


def _shown(reason: str) -> str:
    """As it can be written anywhere: file names need not be Unicode."""
    return reason[:_MOST_REASON].encode("utf-8", "backslashreplace").decode()


def source_of(manifest: Manifest, unit: Unit) -> str:
    """SHA-256 in hex of all that decides what a unit's files hold but its place: pack, crops, teachers, encoding.

    A unit's name says only where it lies: in a store whose manifest was restored from an older copy and then grown in
    another way, it may be the name of other labels.
    """
    teachers = [label_identity(teacher) for teacher in manifest.teachers if teacher.name in unit.heads]
    rest = [manifest.pack_fingerprint, manifest.crop_recipe, manifest.k, manifest.temperatures, manifest.values]
    return hashlib.sha256(json.dumps([*rest, teachers], sort_keys=True).encode()).hexdigest()


class CompletionRecords:
    """The markers of one store, each read once."""

    def __init__(self, files: FileSystem, manifest: Manifest) -> None:
        self._files = files
        self._manifest = manifest
        self._known: dict[str, CompletionRecord] = {}
        self._sources: dict[tuple[str, ...], str] = {}

    def get(self, unit: Unit) -> CompletionRecord:
        """The unit's marker. Raises UserError when it is missing or damaged."""
        if unit.name not in self._known:
            place = f"{self._files.root}/{record_name(unit)}"
            try:
                # Of so many rows: a stranger's marker must not take all memory.
                data = self._files.read(record_name(unit), 0, _MOST_BYTES + _MOST_ROW_BYTES * len(unit.rows))
            except FileNotFoundError:
                reason = "no such marker: this unit was never finished"
                raise UserError(f"{place}: {reason}; run `repcon precompute` again to complete the store") from None
            try:
                record = config.parse(CompletionRecord, unseal(data, place), place)
            except RecursionError as error:
                raise UserError(f"{place}: its values are nested too deeply for a marker") from error
            check_values(asdict(record), place)
            self._check(record, unit, place)
            self._known[unit.name] = record
        return self._known[unit.name]

    def get_anew(self, unit: Unit) -> CompletionRecord:
        """As `get`, as the file says now."""
        self._known.pop(unit.name, None)
        return self.get(unit)

    def _check(self, record: CompletionRecord, unit: Unit, place: str) -> None:
        if record.unit != unit.name:
            raise UserError(f"{place}: the marker is that of unit {record.unit}; restore the right one")
        if any(row not in unit.rows for row in record.missing):
            raise UserError(f"{place}: lists missing rows outside {unit.rows.start} to {unit.rows.stop - 1}")
        if record.source not in ("", self._source(unit)):
            reason = "its labels are of other teachers or crops than the manifest's"
            raise UserError(f"{place}: {reason}; run `repcon precompute` again to complete the store")

    def _source(self, unit: Unit) -> str:
        if unit.heads not in self._sources:
            self._sources[unit.heads] = source_of(self._manifest, unit)
        return self._sources[unit.heads]

    def is_done(self, unit: Unit) -> bool:
        """Whether the marker is whole and lists the unit's shards, each of which has its length."""
        try:
            record = self.get(unit)
        except UserError:
            return False
        return record.files.keys() == set(shards_of(self._manifest, unit)) and all(
            self._files.size(name) == shard.bytes for name, shard in record.files.items()
        )

    def remove(self, unit: Unit) -> None:
        """Declares the unit unfinished, if it was not."""
        self._known.pop(unit.name, None)
        if self._files.size(record_name(unit)) is not None:
            self._files.delete(record_name(unit))

    def put(self, unit: Unit, missing: Mapping[int, str], files: Mapping[str, ShardFile]) -> None:
        """Declares the unit finished; its shards must be on disk by now. missing: the reason by row."""
        rows = tuple(sorted(missing))
        record = CompletionRecord(
            unit=unit.name, missing=rows, reasons=tuple(map(_shown, map(missing.__getitem__, rows))), files=dict(files),
            source=self._source(unit),
        )  # fmt: skip
        self._files.write(record_name(unit), seal(asdict(record)))
        self._known[unit.name] = record
