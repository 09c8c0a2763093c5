"""Write a pack: encode in threads, write shards in order, resume after the last finished shard.

Each finished shard has a record in `parts/` (its rows, the images left out, the next image of the source), written
after the shard is on disk. A killed run resumes at the first shard without a record and ends with the same bytes.
Threads rather than processes: reading, decoding, encoding and hashing all release the interpreter's lock.
"""

import errno
import json
import os
import shutil
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, TextIO

from rich.markup import escape

from repcon.config import PackConfig, check_minimum
from repcon.images import format as pack_format
from repcon.images.archives import ParquetColumns
from repcon.images.encode import Encoded
from repcon.images.encode_items import encode_items
from repcon.images.format import Manifest
from repcon.images.shards import ShardRecord, ShardWriter, join_columns
from repcon.images.sources import SourceItem, SourceListing, format_sources, list_sources, source_paths
from repcon.runtime.atomic_files import lock, remove_abandoned, write_atomic
from repcon.runtime.console import console, progress
from repcon.runtime.errors import UserError
from repcon.runtime.local_files import error_reason, open_regular, read_file

PARTS = "parts"


@dataclass(frozen=True, slots=True, kw_only=True)
class PackPlan:
    """A source that is listed and checked, ready to be packed."""

    config: PackConfig
    out: Path
    listing: SourceListing
    settings: dict[str, Any]
    """Settings on which the pack's bytes depend; stored with the pack."""


def plan(config: PackConfig) -> PackPlan:
    """Checks the settings and lists the source; writes nothing.

    Raises UserError for invalid settings, for a source without images, and where `out` holds a pack of another source
    or of other settings.
    """
    _check(config)
    with console.status(f"listing {escape(format_sources(config.source))}"):
        listing = list_sources(config.source, config.limit, ParquetColumns(config.image_column, config.label_column))
    names = ("max_side", "jpeg_quality", "shard_megabytes")
    settings = {"source": listing.identity, **{name: getattr(config, name) for name in names}}
    _require_same_settings(Path(config.out), settings)
    return PackPlan(config=config, out=Path(config.out), listing=listing, settings=settings)


def write(plan: PackPlan) -> Manifest:
    """Writes the pack, or resumes an unfinished one; a finished pack is left as it is.

    Raises UserError where `out` cannot be written, for example because the disk is full.
    """
    out = plan.out
    try:
        with exclusive_writer(out):
            _require_same_settings(out, plan.settings)
            if not (out / pack_format.MANIFEST).is_file():
                remove_abandoned(out)
                write_atomic(out / PARTS / "settings.json", json.dumps(plan.settings).encode())
                _finish(plan, *_shards(plan))
        return pack_format.load_manifest(_read_bounded(out / pack_format.MANIFEST), str(out))
    except OSError as error:
        full = "the disk is full: " if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        raise UserError(
            f"{error.filename or out}: cannot write the pack ({full}{error_reason(error)}); fix that and run the same "
            "command again, it goes on after the last finished shard"
        ) from error
    except RuntimeError as error:
        if "new thread" not in str(error):
            raise
        raise UserError(f"{out}: {error}: give fewer --num-workers, and run the same command again") from error


def _check(config: PackConfig) -> None:
    check_minimum(config, limit=0, max_side=0, num_workers=0, shard_megabytes=1, jpeg_quality=1)
    out = Path(config.out).resolve()
    for name in source_paths(config.source):
        source = Path(name).resolve()
        if source == out or source in out.parents:
            raise UserError(f"{config.out} lies inside {name}, which it would become a part of; name another OUT")


def _require_same_settings(out: Path, settings: dict[str, Any]) -> None:
    """Raises UserError where `out` holds a pack, finished or not, of another source or of other settings."""
    manifest, started = out / pack_format.MANIFEST, out / PARTS / "settings.json"
    if manifest.is_file():
        held = pack_format.load_manifest(_read_bounded(manifest), str(out)).settings
    elif started.is_file():
        held = _read_settings(started)
    else:
        return
    for name, value in settings.items():
        if held.get(name) != value:
            what = "files" if name == "source" else f"{name} = {held.get(name)}, not {value}"
            raise UserError(f"{out} holds a pack made of other {what}; remove it or name another OUT")


def _read_bounded(file: Path) -> bytes:
    """Reads at most one byte more than a valid file of an earlier run has."""
    return read_file(file, pack_format.MAX_MANIFEST_BYTES + 1)


def _read_settings(started: Path) -> dict[str, Any]:
    """The settings of an unfinished pack."""
    try:
        held = json.loads(_read_bounded(started))
    except (ValueError, RecursionError):
        held = None
    if not isinstance(held, dict):
        raise UserError(f"{started}: damaged, so it is unknown what was begun there; remove {started.parent.parent}")
    return held


@contextmanager
def exclusive_writer(out: Path) -> Iterator[None]:
    """Waits until no other process writes into the pack; after the block, deletes `parts/`. Raises OSError.

    On a file system without locks it does not wait: there two processes must not be started at once.
    """
    parts = out / PARTS
    with _lock_file(parts) as file:
        if lock(file.fileno()) is False:
            console.print(f"waiting for another process that packs into {escape(str(parts.parent))}")
            lock(file.fileno(), wait=True)
        with suppress(FileExistsError):  # the other process is deleting it: it has finished, nothing will be written
            parts.mkdir(exist_ok=True)
        yield
    shutil.rmtree(parts, ignore_errors=True)


def _lock_file(parts: Path) -> TextIO:
    """Opens the lock file in `parts`; again if a process that has finished deletes the folder meanwhile."""
    while True:
        try:
            parts.mkdir(parents=True, exist_ok=True)
            return open_regular(parts / "lock", "w", follow_links=False, encoding="ascii")
        except (FileExistsError, FileNotFoundError):
            if any(os.path.lexists(path) and not path.is_dir() for path in (parts, parts.parent)):
                raise


def _shards(plan: PackPlan) -> tuple[list[ShardRecord], list[tuple[str, str]]]:
    """Writes the missing shards; gives all shards' records, and the images left out after the last shard."""
    records, items = _finished_shards(plan.out), plan.listing.items
    start, full = records[-1].next if records else 0, plan.config.shard_megabytes * 1_000_000
    seen = _packed_hashes(records)
    shard = ShardWriter(plan.out, len(records), start)
    try:
        with warnings.catch_warnings(), progress() as bar:
            warnings.simplefilter("ignore")  # about damaged files: each is in the pack or among those left out
            task = bar.add_task("pack", total=len(items), completed=start, unit="images", note="")
            for item, result in encode_items(items[start:], plan.config):
                _add(shard, item, result, seen)
                bar.advance(task)
                if shard.bytes >= full:
                    records.append(_close(plan.out, shard))
                    shard = ShardWriter(plan.out, len(records), records[-1].next)
        if not len(shard):
            return records, shard.record.left_out
        return [*records, _close(plan.out, shard)], []
    finally:
        shard.discard()


def _finished_shards(out: Path) -> list[ShardRecord]:
    """The records of the finished shards, up to the first gap."""
    records: list[ShardRecord] = []
    while True:
        shard = out / pack_format.shard_name(len(records))
        try:
            record = ShardRecord.load(out / PARTS, len(records))
            complete = shard.stat().st_size == record.bytes
        except FileNotFoundError:
            return records
        except (KeyError, TypeError, ValueError, RecursionError, UserError):  # damaged: the shard is made again
            return records
        if not complete:
            return records
        records.append(record)


def _packed_hashes(records: list[ShardRecord]) -> dict[bytes, tuple[str, int]]:
    """Content hash -> key and label of the images packed so far."""
    seen: dict[bytes, tuple[str, int]] = {}
    for record in records:
        hashes, labels = record.columns["hash"], record.columns["label"].tolist()
        names = pack_format.Keys(record.columns)
        seen.update((hashes[row].tobytes(), (key, labels[row])) for row, key in enumerate(names))
    return seen


def _add(shard: ShardWriter, item: SourceItem, result: Encoded | str, seen: dict[bytes, tuple[str, int]]) -> None:
    """Adds an image to the shard, or to the images left out.

    Of equal images only the first is packed: a duplicate could be in the training and the test images at once.
    """
    shard.record.next += 1
    if isinstance(result, str):
        shard.record.left_out.append((item.name, result))
    elif result.digest in seen:
        key, label = seen[result.digest]
        kind = "duplicate" if label == item.label else "duplicate with another label"
        shard.record.left_out.append((item.name, f"{kind}: of {key}"))
    else:
        seen[result.digest] = item.key, item.label
        shard.add(item, result)


def _close(out: Path, shard: ShardWriter) -> ShardRecord:
    """Finishes the shard, then writes its record."""
    record = shard.close()
    record.save(out / PARTS, shard.number)
    return record


def _finish(plan: PackPlan, records: list[ShardRecord], rest: list[tuple[str, str]]) -> None:
    """Writes the list of images left out, the index, and last the manifest."""
    out = plan.out
    left_out = [*plan.listing.left_out, *(entry for record in records for entry in record.left_out), *rest]
    lines = [json.dumps({"name": name, "reason": reason}, ensure_ascii=False) for name, reason in left_out]
    write_atomic(out / pack_format.LEFT_OUT, "".join(line + "\n" for line in lines).encode())
    if not records:
        raise UserError(f"{out}: not one image could be packed; {out / pack_format.LEFT_OUT} gives the reasons")
    columns = join_columns(records)
    index = pack_format.dump_index(columns)
    write_atomic(out / pack_format.INDEX, index)
    changes = sum((record.changes for record in records), Counter())
    kinds = Counter(reason.split(":")[0] for _, reason in left_out)  # the reasons without their details
    manifest = Manifest(
        images=len(columns["shard"]),
        classes=plan.listing.classes,
        shard_bytes=tuple(record.bytes for record in records),
        index_sha256=sha256(index).hexdigest(),
        fingerprint=pack_format.fingerprint(columns["hash"], columns["size"]),
        settings=plan.settings,
        summary={"re_encoded": dict(sorted(changes.items())), "left_out": dict(sorted(kinds.items()))},
    )
    write_atomic(out / pack_format.MANIFEST, manifest.dump().encode())
