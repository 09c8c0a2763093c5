"""Write units: check and encode their arrays, and let no process that has lost its claim change the result.

A process that is suspended (a paused virtual machine, a stalled network disk) for longer than its claim lives continues
as if nothing had happened, after another process has finished its unit. So the claim is checked before every file and
once more at the end. Only the file that was being written during the loss can overwrite the other process's file: it is
deleted unless the other's completion record lists it. The worst outcome is a unit that counts as unfinished.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from repcon.labels import quantize
from repcon.labels.commit import manifest_bytes
from repcon.labels.completion import CompletionIndex, ShardFile, record_name, shard_file
from repcon.labels.layout import BOX, FLIP, HeadInfo, Layout, Unit, head_layouts, heads_of, shard_name
from repcon.labels.manifest import MANIFEST, Manifest, label_identity, read_manifest
from repcon.labels.shard_reader import chunk_crcs
from repcon.labels.zarr_encoding import encode_shard
from repcon.runtime.errors import UserError
from repcon.runtime.filesystem import FileSystem

_MAX_ATTEMPTS = 3
_Block = tuple[Layout, np.ndarray]
"""An array of a unit, as it is stored."""


class UnitClaim(Protocol):
    """A process's claim on a unit."""

    inherited: bool
    """Whether it was taken over from a process that may resume."""

    def is_held(self) -> bool:
        """Whether this process still holds it."""
        ...


class LostClaimError(Exception):
    """Another process has taken over the unit that was being written; this process's labels are not needed."""


class LabelWriter:
    """Writes the units of a store."""

    def __init__(self, files: FileSystem, data: bytes, manifest: Manifest, completion: CompletionIndex) -> None:
        """`data` are the bytes of the manifest."""
        self._files, self._manifest_bytes, self._manifest = files, data, manifest
        self._heads, self._completion = heads_of(manifest), completion

    def write(
        self,
        unit: Unit,
        boxes: np.ndarray,
        flips: np.ndarray,
        labels: Mapping[str, tuple[np.ndarray, np.ndarray]],
        missing: Mapping[int, str] | None = None,
        claim: UnitClaim | None = None,
    ) -> int:
        """Writes a unit of m crops by r images: shards, fsync, then the completion record; returns the shards' bytes.

        boxes (m, r, 4) uint16, flips (m, r) uint8, labels per head: ids (m, r, k) integers and logp (m, r, k + T)
        float16. `missing` are rows of the store whose image could not be decoded, with the reason: their labels become
        fill values. With a `claim`, nothing is written once another process has taken it over: raises LostClaimError.
        Raises UserError on labels that no reader could trust (NaN, ids out of range, wrong shapes or dtypes) and on a
        full disk.
        """
        missing = missing or {}
        if outside := missing.keys() - set(unit.rows):
            rows = f"{unit.rows.start} to {unit.rows.stop - 1}"
            raise UserError(f"unit {unit.name}: missing row {min(outside)} is not one of its rows, {rows}")
        is_missing = np.isin(np.arange(unit.rows.start, unit.rows.stop), list(missing))
        if set(labels) != set(unit.heads):
            raise UserError(f"unit {unit.name}: labels of {sorted(labels)}, but it is made of {sorted(unit.heads)}")
        blocks = _box_blocks(unit, boxes, flips) if unit.writes_boxes else []
        for name in unit.heads:
            blocks += _label_blocks(self._manifest, unit, self._heads[name], *labels[name], is_missing)
        shards, crop, row = [], unit.crops.start, unit.rows.start
        for layout, block in blocks:
            path = shard_name(self._manifest, layout, crop, row)
            shards.append((path, encode_shard(self._manifest, layout, path, crop, row, block)))
        writer = _UnitWriter(self._files, self._manifest, self._completion, unit, claim)
        return writer.write(shards, missing, lambda: self._require_teachers(unit))

    def _require_teachers(self, unit: Unit) -> None:
        """Raises UserError where another run has replaced the teacher of one of the unit's heads."""
        data = manifest_bytes(self._files)
        if data != self._manifest_bytes:  # appending changes it too
            heads = heads_of(read_manifest(data, f"{self._files.root}/{MANIFEST}"))
            for name in unit.heads:
                if label_identity(heads[name].metadata) != label_identity(self._heads[name].metadata):
                    what = f"another run has put another teacher in the place of {name}; stop one"
                    raise UserError(f"{self._files.root}: {what}")


def _box_blocks(unit: Unit, boxes: np.ndarray, flips: np.ndarray) -> list[_Block]:
    """A unit's boxes (m, r, 4) and flips (m, r) as they are stored, after checks."""
    shape = (len(unit.crops), len(unit.rows))
    _check_shapes(f"unit {unit.name}", {"boxes": (boxes, (*shape, 4)), "flips": (flips, shape)})
    for name, array, wanted in (("boxes", boxes, BOX.dtype), ("flips", flips, FLIP.dtype)):
        if array.dtype != wanted:
            raise UserError(f"unit {unit.name}: {name} are {array.dtype} instead of {np.dtype(wanted)}")
    if not boxes[..., 2:].all():
        raise UserError(f"unit {unit.name}: holds boxes without an area")
    if (flips > 1).any():
        raise UserError(f"unit {unit.name}: flips must be 0 or 1")
    return [(BOX, boxes), (FLIP, flips)]


def _label_blocks(
    manifest: Manifest, unit: Unit, head: HeadInfo, ids: np.ndarray, logp: np.ndarray, is_missing: np.ndarray
) -> list[_Block]:
    """One head's ids and values as they are stored, after checks; missing rows (r,) become fill values."""
    shape, place = (len(unit.crops), len(unit.rows)), f"unit {unit.name}, head {head.name}"
    columns = head.k + len(head.temperatures)
    _check_shapes(place, {"ids": (ids, (*shape, head.k)), "logp": (logp, (*shape, columns))})
    present = ~is_missing if is_missing.any() else slice(None)  # a slice copies nothing
    _check_labels(place, head, ids[:, present], logp[:, present])
    id_layout, value_layout = head_layouts(head, manifest.values)
    ids, values = ids.astype(id_layout.dtype), logp.astype(np.float16)
    ids[:, is_missing], values[:, is_missing] = id_layout.fill, np.nan
    if manifest.values == "quantized8":
        values = quantize.encode(values, head.k, head.temperatures)
    return [(id_layout, ids), (value_layout, values)]


def _check_shapes(place: str, arrays: Mapping[str, tuple[np.ndarray, tuple[int, ...]]]) -> None:
    for name, (array, wanted) in arrays.items():
        if array.shape != wanted:
            raise UserError(f"{place}: {name} has shape {array.shape} instead of {wanted}")


def _check_labels(place: str, head: HeadInfo, ids: np.ndarray, logp: np.ndarray) -> None:
    """Raises UserError for NaN, infinite or rising log-probabilities and for ids out of range."""
    if ids.size == 0:
        return
    if not np.issubdtype(ids.dtype, np.integer) or ids.min() < 0 or ids.max() >= head.classes:
        raise UserError(f"{place}: ids must be integers from 0 to {head.classes - 1}, not {ids.min()} to {ids.max()}")
    values = logp.astype(np.float32)
    if np.isnan(values).any() or not np.isfinite(values[..., : head.k]).all():
        raise UserError(f"{place}: NaN or infinite log-probabilities: the teacher overflows; try precision fp32")
    if (values[..., 1 : head.k] > values[..., : head.k - 1]).any():
        raise UserError(f"{place}: log-probabilities must fall from the first to the last")


@dataclass(frozen=True, slots=True)
class _UnitWriter:
    """Writes the files of one unit."""

    files: FileSystem
    manifest: Manifest
    completion: CompletionIndex
    unit: Unit
    claim: UnitClaim | None
    """None: no other process writes this unit."""

    def write(
        self, shards: Sequence[tuple[str, bytes]], missing: Mapping[int, str], before_record: Callable[[], object]
    ) -> int:
        """Writes shards (name, bytes) and then the completion record; returns the shards' bytes.

        `before_record` is called in between, and may raise. Raises LostClaimError, UserError.
        """
        depth = self.manifest.crops_per_shard
        written = {name: shard_file(data, chunk_crcs(data, depth)) for name, data in shards}
        for _ in range(_MAX_ATTEMPTS):
            # An earlier record must not vouch for a mixture of its shards and these.
            self._guarded("", lambda: self.completion.remove(self.unit))
            for name, data in shards:
                self._guarded(name, lambda name=name, data=data: self.files.write(name, data), written[name])
            before_record()
            self._guarded(record_name(self.unit), lambda: self.completion.put(self.unit, missing, written))
            if self._is_complete(written):
                return sum(shard.bytes for shard in written.values())
        what = f"unit {self.unit.name}: its files change while they are written"
        raise UserError(f"{self.files.root}: {what}; end other processes that write to this store, and run it again")

    def _is_complete(self, written: Mapping[str, ShardFile]) -> bool:
        """Whether all files are as written; their content is read back where the former owner may have written too."""
        if self.claim is None or not self.claim.inherited:
            return all(self.files.size(name) == shard.bytes for name, shard in written.items())
        return all(self._is_intact(name, shard) for name, shard in written.items())

    def _guarded(self, name: str, put: Callable[[], object], shard: ShardFile | None = None) -> None:
        """Calls `put` between two checks of the claim."""
        if self.claim is None:
            put()
            return
        if not self.claim.is_held():
            raise LostClaimError(self.unit.name)
        put()
        if not self.claim.is_held():
            self._roll_back(name, shard)
            raise LostClaimError(self.unit.name)

    def _roll_back(self, name: str, shard: ShardFile | None) -> None:
        """Deletes what was written after the loss unless a record lists it: it may have replaced the owner's file."""
        try:
            record = self.completion.reload(self.unit)
        except UserError:
            record = None
        if shard is not None:
            vouched = record is not None and record.files.get(name) == shard
            if not vouched and self._is_intact(name, shard):
                self.files.delete(name)
        elif record is not None and not all(self._is_intact(*pair) for pair in record.files.items()):
            self.completion.remove(self.unit)

    def _is_intact(self, name: str, shard: ShardFile) -> bool:
        """Whether the file has the content that was written."""
        if self.files.size(name) != shard.bytes:
            return False
        try:
            return shard_file(self.files.read(name), ()).sha256 == shard.sha256
        except OSError:
            return False
