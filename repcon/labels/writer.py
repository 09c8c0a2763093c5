"""Puts a unit's shards and its marker in place, so that nobody who has lost the claim on the unit changes the result.

A process that is stopped (a paused virtual machine, a stalled network disk) for longer than its claim lives goes on as
if nothing had happened, while another has finished its unit. So the claim is looked at before every file and once more
at the end. Only the file that was being put in place during the loss can lie over the other's: it is taken back unless
the other's marker vouches for it. The order of all that leaves, at worst, a unit that counts as unfinished.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from repcon.labels.completion import CompletionRecords, ShardFile, record_name, shard_file
from repcon.labels.layout import Unit
from repcon.labels.manifest import Manifest
from repcon.labels.reader import chunk_crcs
from repcon.runtime.errors import UserError
from repcon.runtime.filesystem import FileSystem

_TRIES = 3


class UnitClaim(Protocol):
    """A process's claim on a unit."""

    inherited: bool
    """Whether it was taken over from a process that may come to life again."""

    def is_held(self) -> bool:
        """Whether it is still this process's."""
        ...


class LostClaimError(Exception):
    """Another process has taken over the unit that was being written; what this one made of it is not needed."""


class UnitWriter:
    """Writes one unit. `claim` None: the caller is known to be alone with it."""

    def __init__(
        self,
        files: FileSystem,
        manifest: Manifest,
        records: CompletionRecords,
        unit: Unit,
        claim: UnitClaim | None = None,
    ) -> None:
        self._files, self._manifest, self._records, self._unit, self._claim = files, manifest, records, unit, claim

    def write(
        self, shards: Sequence[tuple[str, bytes]], missing: Mapping[int, str], before_record: Callable[[], object]
    ) -> int:
        """Writes shards (name, bytes) and then the marker; gives the shards' bytes.

        `before_record` is called in between, and may raise. Raises LostClaimError, UserError.
        """
        depth = self._manifest.crops_per_shard
        written = {name: shard_file(data, chunk_crcs(data, depth)) for name, data in shards}
        for _ in range(_TRIES):
            # An earlier marker must not vouch for a mixture of its shards and these.
            self._guarded("", lambda: self._records.remove(self._unit))
            for name, data in shards:
                self._guarded(name, lambda name=name, data=data: self._files.write(name, data), written[name])
            before_record()
            self._guarded(record_name(self._unit), lambda: self._records.put(self._unit, missing, written))
            if self._is_whole(written):
                return sum(shard.bytes for shard in written.values())
        what = f"unit {self._unit.name}: its files change while they are written"
        raise UserError(f"{self._files.root}: {what}; end other processes that write to this store, and run it again")

    def _is_whole(self, written: Mapping[str, ShardFile]) -> bool:
        """Whether all is in place; read back where the claim's former owner may have written meanwhile."""
        if self._claim is None or not self._claim.inherited:
            return all(self._files.size(name) == shard.bytes for name, shard in written.items())
        return all(self._is_in_place(name, shard) for name, shard in written.items())

    def _guarded(self, name: str, put: Callable[[], object], shard: ShardFile | None = None) -> None:
        """Puts a file in place between two looks at the claim."""
        if self._claim is None:
            put()
            return
        if not self._claim.is_held():
            raise LostClaimError(self._unit.name)
        put()
        if not self._claim.is_held():
            self._take_back(name, shard)
            raise LostClaimError(self._unit.name)

    def _take_back(self, name: str, shard: ShardFile | None) -> None:
        """Leaves nothing that no marker vouches for: `name` may have been put over the file of the unit's new owner."""
        try:
            record = self._records.get_anew(self._unit)
        except UserError:
            record = None
        if shard is not None:
            vouched = record is not None and record.files.get(name) == shard
            if not vouched and self._is_in_place(name, shard):
                self._files.delete(name)
        elif record is not None and not all(self._is_in_place(*pair) for pair in record.files.items()):
            self._records.remove(self._unit)

    def _is_in_place(self, name: str, shard: ShardFile) -> bool:
        """Whether the file holds what was written."""
        if self._files.size(name) != shard.bytes:
            return False
        try:
            return shard_file(self._files.read(name), ()).sha256 == shard.sha256
        except OSError:
            return False
