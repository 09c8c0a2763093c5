"""Completion records: the files that say which units are finished, and what exactly was written for each."""

import contextlib
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import zip_longest

import numpy as np

from repcon import config
from repcon.labels.layout import Unit, shards_of, units_of
from repcon.labels.manifest import (
    COMPLETION_RECORDS,
    HASHED_VALUES,
    Manifest,
    check_values,
    label_identity,
    seal,
    unseal,
)
from repcon.runtime.errors import UserError
from repcon.runtime.filesystem import FileSystem

_MAX_BYTES, _MAX_BYTES_PER_ROW = 2**22, 2**12
_MAX_REASON_CHARACTERS = 1000
_SCAN_THREADS = 32
"""Concurrent requests while the units of a store behind a URL are checked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardFile:
    """One finished shard: its length, its hash, and the crc32c of its chunk for each crop."""

    bytes: int
    sha256: str
    crc32c: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionRecord:
    """A finished unit. Labels of the `missing` rows are fill values: their images could not be decoded."""

    unit: str
    missing: tuple[int, ...]
    files: dict[str, ShardFile]
    reasons: tuple[str, ...] = ()
    """One per missing row; empty in stores that were made before reasons were kept."""
    source: str = ""
    """`source_of` the unit when it was written; "" in stores that were made before it was kept."""


def record_name(unit: Unit) -> str:
    """The file name of the unit's completion record."""
    return f"{COMPLETION_RECORDS}/{unit.name}.json"


def shard_file(data: bytes, crc32c: tuple[int, ...]) -> ShardFile:
    """The entry of a completion record for these bytes."""
    return ShardFile(bytes=len(data), sha256=hashlib.sha256(data).hexdigest(), crc32c=crc32c)


def source_of(manifest: Manifest, unit: Unit) -> str:
    """SHA-256 in hex of everything that determines a unit's labels besides its place: pack, crops, teachers, encoding.

    A unit's name gives only its place. In a store whose manifest was restored from an older copy and then grown
    differently, the same name may stand for other labels.
    """
    teachers = [label_identity(teacher) for teacher in manifest.teachers if teacher.name in unit.heads]
    shared = [manifest.pack_fingerprint, manifest.crop_recipe, manifest.k, manifest.temperatures]
    return hashlib.sha256(
        json.dumps([*shared, HASHED_VALUES[manifest.values], teachers], sort_keys=True).encode()
    ).hexdigest()


class CompletionIndex:
    """The completion records of one store, each read once. Thread-safe."""

    def __init__(self, files: FileSystem, manifest: Manifest) -> None:
        self._files = files
        self._manifest = manifest
        self._records: dict[str, CompletionRecord] = {}
        self._sources: dict[tuple[str, ...], str] = {}

    def get(self, unit: Unit) -> CompletionRecord:
        """The unit's record. Raises UserError when it is missing or damaged."""
        if unit.name not in self._records:
            path = f"{self._files.root}/{record_name(unit)}"
            try:
                # Bounded by the number of rows: a record from an untrusted store must not exhaust the memory.
                data = self._files.read(record_name(unit), 0, _MAX_BYTES + _MAX_BYTES_PER_ROW * len(unit.rows))
            except FileNotFoundError:
                reason = "no such completion record: this unit was never finished"
                raise UserError(f"{path}: {reason}; run `repcon precompute` again to complete the store") from None
            try:
                record = config.parse(CompletionRecord, unseal(data, path), path)
            except RecursionError as error:
                raise UserError(f"{path}: its values are nested too deeply for a completion record") from error
            check_values(asdict(record), path)
            self._check(record, unit, path)
            self._records[unit.name] = record
        return self._records[unit.name]

    def reload(self, unit: Unit) -> CompletionRecord:
        """As `get`, read from the file again."""
        self._records.pop(unit.name, None)
        return self.get(unit)

    def is_done(self, unit: Unit) -> bool:
        """Whether the record is intact and lists the unit's shards, each of which has its full length."""
        try:
            record = self.get(unit)
        except UserError:
            return False
        return record.files.keys() == set(shards_of(self._manifest, unit)) and all(
            self._files.size(name) == shard.bytes for name, shard in record.files.items()
        )

    def recorded_units(self) -> set[str]:
        """Names of the units that have a record file, whatever it contains."""
        return {name.removesuffix(".json") for name in self._files.list_names(COMPLETION_RECORDS)}

    def unfinished(self, units: Sequence[Unit] | None = None) -> list[Unit]:
        """Those of the units (None for all) that are still to do, according to the files now."""
        units = list(units_of(self._manifest)) if units is None else units
        # A separate index, dropped afterwards: a scan of all records must not stay in memory.
        done = {unit.name for unit in CompletionIndex(self._files, self._manifest).finished(units)}
        return [unit for unit in units if unit.name not in done]

    def finished(self, units: Sequence[Unit] | None = None) -> list[Unit]:
        """Those of the units (None for all) that are done; their records are kept in memory."""
        units = list(units_of(self._manifest)) if units is None else units
        recorded = self.recorded_units()  # one listing: a request for each of a million absent records takes minutes
        begun = [unit for unit in units if unit.name in recorded]
        with ThreadPoolExecutor(_SCAN_THREADS if "://" in self._files.root else 1) as pool:
            return [unit for unit, done in zip(begun, pool.map(self.is_done, begun), strict=True) if done]

    def missing_rows(self, heads: Iterable[str] | None = None) -> np.ndarray:
        """Rows (int64, sorted) whose image could not be decoded when a finished unit of these heads was written.

        None stands for all heads. Units of other heads do not count, so that what a run on some heads learns from
        stays the same while others are added.
        """
        names = {teacher.name for teacher in self._manifest.teachers} if heads is None else set(heads)
        units = self.finished([unit for unit in units_of(self._manifest) if names & set(unit.heads)])
        return np.array(list(self.missing_reasons(units)), np.int64)

    def missing_reasons(self, finished: Iterable[Unit]) -> dict[int, str]:
        """The missing rows of these finished units, rising, with the reason; "" where the store has kept none."""
        records = [self.get(unit) for unit in finished]
        pairs = [pair for record in records for pair in zip_longest(record.missing, record.reasons, fillvalue="")]
        return {int(row): reason for row, reason in sorted(pairs)}

    def recorded_missing_rows(self, units: Iterable[Unit]) -> np.ndarray:
        """Rows (int64, sorted) that the records of these units list as missing; a damaged record lists none."""
        rows: set[int] = set()
        for unit in units:
            with contextlib.suppress(UserError, OSError):
                rows.update(self.get(unit).missing)
        return np.array(sorted(rows), np.int64)

    def shard_bytes(self, finished: Iterable[Unit]) -> dict[str, int]:
        """Bytes of the shards of these finished units, by the path of their array."""
        sizes: dict[str, int] = {}
        for unit in finished:
            for name, shard in self.get(unit).files.items():
                array = "/".join(name.split("/")[: 3 if name.startswith("heads/") else 2])
                sizes[array] = sizes.get(array, 0) + shard.bytes
        return sizes

    def remove(self, unit: Unit) -> None:
        """Marks the unit as unfinished."""
        self._records.pop(unit.name, None)
        if self._files.size(record_name(unit)) is not None:
            self._files.delete(record_name(unit))

    def put(self, unit: Unit, missing: Mapping[int, str], files: Mapping[str, ShardFile]) -> None:
        """Marks the unit as finished; its shards must be on disk already. missing: the reason by row."""
        rows = tuple(sorted(missing))
        # As valid Unicode, which the file names in a reason need not be.
        reasons = tuple(
            missing[row][:_MAX_REASON_CHARACTERS].encode("utf-8", "backslashreplace").decode() for row in rows
        )
        source = self._source(unit)
        record = CompletionRecord(unit=unit.name, missing=rows, reasons=reasons, files=dict(files), source=source)
        self._files.write(record_name(unit), seal(asdict(record)))
        self._records[unit.name] = record

    def _check(self, record: CompletionRecord, unit: Unit, path: str) -> None:
        if record.unit != unit.name:
            raise UserError(f"{path}: the completion record is that of unit {record.unit}; restore the right one")
        if any(row not in unit.rows for row in record.missing):
            raise UserError(f"{path}: lists missing rows outside {unit.rows.start} to {unit.rows.stop - 1}")
        if record.source not in ("", self._source(unit)):
            reason = "its labels are of other teachers or crops than the manifest's"
            raise UserError(f"{path}: {reason}; run `repcon precompute` again to complete the store")

    def _source(self, unit: Unit) -> str:
        if unit.heads not in self._sources:
            self._sources[unit.heads] = source_of(self._manifest, unit)
        return self._sources[unit.heads]
