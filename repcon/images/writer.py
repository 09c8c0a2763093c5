"""Writes a pack: reads and re-encodes in threads, writes shards in order, and goes on where it was killed.

Each finished shard leaves a record in `parts/` (its rows, what was left out, where the source goes on), written
after the shard is on disk. A killed run starts again at the first shard without one and ends with the same bytes.
Threads rather than processes: reading, decoding, encoding and hashing all run outside Python's lock.
"""

import errno
import fcntl
import json
import os
import shutil
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, TextIO

from rich.markup import escape

from repcon.config import PackConfig
from repcon.images import format as pack_format
from repcon.images import sources
from repcon.images.format import Manifest
from repcon.images.jpeg import Encoded, InvalidImageError, encode
from repcon.images.names import bytes_of, readable
from repcon.images.parquet import RowReader
from repcon.images.several import paths, read_all, told
from repcon.images.shards import Part, Shard, assemble, write_file
from repcon.images.sources import Item, Listing
from repcon.runtime.console import console, progress
from repcon.runtime.errors import UserError
from repcon.runtime.open_files import lock, open_own, read_file, reason_of
from repcon.runtime.system import cores

PARTS = "parts"
BATCH = 8
"""Images that a thread takes at a time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is to be packed, where and how."""

    config: PackConfig
    out: Path
    listing: Listing
    settings: dict[str, Any]
    """What the pack's bytes depend on; kept with the pack."""


def plan(config: PackConfig) -> Plan:
    """Lists the source; writes nothing.

    Raises UserError for settings that make no sense, for a source without images, and where `out` holds a pack of
    another source or of other settings.
    """
    _check(config)
    with console.status(f"listing {escape(told(config.source))}"):
        listing = read_all(config.source, config.limit)
    names = ("max_side", "jpeg_quality", "shard_megabytes")
    settings = {"source": listing.identity, **{name: getattr(config, name) for name in names}}
    _compare(Path(config.out), settings)
    return Plan(config=config, out=Path(config.out), listing=listing, settings=settings)


def write(plan: Plan) -> Manifest:
    """Packs, or goes on with a pack that was begun; a finished one is left as it is.

    Raises UserError where `out` cannot be written, for example because the disk is full.
    """
    out = plan.out
    try:
        with exclusive_writer(out):
            _compare(out, plan.settings)
            if not (out / pack_format.MANIFEST).is_file():
                write_file(out / PARTS / "settings.json", json.dumps(plan.settings).encode())
                _finish(plan, *_shards(plan))
        return pack_format.load_manifest(_held(out / pack_format.MANIFEST), str(out))
    except OSError as error:
        full = "the disk is full: " if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        raise UserError(
            f"{error.filename or out}: cannot write the pack ({full}{reason_of(error)}); mend that and run the same "
            "command again, it goes on after the last finished shard"
        ) from error
    except RuntimeError as error:
        if "new thread" not in str(error):
            raise
        raise UserError(f"{out}: {error}: give fewer --num-workers, and run the same command again") from error


def _check(config: PackConfig) -> None:
    bounds = {
        "limit": (0, 1 << 31),
        "max_side": (0, 1 << 30),
        "num_workers": (0, 1024),
        "shard_megabytes": (1, 1 << 20),
        "jpeg_quality": (1, 100),
    }
    for name, (low, high) in bounds.items():
        if not low <= getattr(config, name) <= high:
            raise UserError(f"{name} = {getattr(config, name)}: must lie between {low} and {high:,}")
    out = Path(config.out).resolve()
    for name in paths(config.source):
        source = Path(name).resolve()
        if source == out or source in out.parents:
            raise UserError(f"{config.out} lies inside {name}, which it would become a part of; name another OUT")


def _compare(out: Path, settings: dict[str, Any]) -> None:
    """Refuses to go on with, or to take for finished, a pack of something else. Raises UserError."""
    manifest, started = out / pack_format.MANIFEST, out / PARTS / "settings.json"
    if manifest.is_file():
        held = pack_format.load_manifest(_held(manifest), str(out)).settings
    elif started.is_file():
        held = _begun(started)
    else:
        return
    for name, value in settings.items():
        if held.get(name) != value:
            what = "files" if name == "source" else f"{name} = {held.get(name)}, not {value}"
            raise UserError(f"{out} holds a pack made of other {what}; remove it or name another OUT")


def _held(file: Path) -> bytes:
    """A file of an earlier run, of which no more is read than a whole one may have."""
    return read_file(file, pack_format.MAX_MANIFEST_BYTES + 1)


def _begun(started: Path) -> dict[str, Any]:
    """The settings of a pack that was begun."""
    try:
        held = json.loads(_held(started))
    except (ValueError, RecursionError):
        held = None
    if not isinstance(held, dict):
        raise UserError(f"{started}: damaged, so nobody knows what was begun there; remove {started.parent.parent}")
    return held


@contextmanager
def exclusive_writer(out: Path) -> Iterator[None]:
    """Waits while another process writes into the pack; once the block is through, `parts/` is gone. Raises OSError.

    On a file system without locks it does not wait: there two processes must not be started at once.
    """
    parts = out / PARTS
    with _lock_file(parts) as file:
        if lock(file.fileno()) is False:
            console.print(f"waiting for another process that packs into {escape(str(parts.parent))}")
            fcntl.flock(file, fcntl.LOCK_EX)
        with suppress(FileExistsError):  # it is being removed: the other process has finished, nothing will be written
            parts.mkdir(exist_ok=True)
        yield
    shutil.rmtree(parts, ignore_errors=True)


def _lock_file(parts: Path) -> TextIO:
    """Opens the lock in `parts`, again where a process that has finished removes the folder meanwhile."""
    while True:
        try:
            parts.mkdir(parents=True, exist_ok=True)
            return open_own(parts / "lock", "w", encoding="ascii")
        except (FileExistsError, FileNotFoundError):
            if any(os.path.lexists(path) and not path.is_dir() for path in (parts, parts.parent)):
                raise


def _shards(plan: Plan) -> tuple[list[Part], list[tuple[str, str]]]:
    """Writes what is missing; gives all shards' records, and what was left out after the last shard."""
    parts, items = _finished(plan.out), plan.listing.items
    start, full = parts[-1].next if parts else 0, plan.config.shard_megabytes * 1_000_000
    seen = _seen(parts)
    shard = Shard(plan.out, len(parts), start)
    try:
        with warnings.catch_warnings(), progress() as bar:
            warnings.simplefilter("ignore")  # of damaged files; each ends up in the pack or in the list
            task = bar.add_task("pack", total=len(items), completed=start, unit="images", note="")
            for item, result in _encoded(items[start:], plan.config):
                _take(shard, item, result, seen)
                bar.advance(task)
                if shard.bytes >= full:
                    parts.append(_close(plan.out, shard))
                    shard = Shard(plan.out, len(parts), parts[-1].next)
        if not len(shard):
            return parts, shard.part.left_out
        return [*parts, _close(plan.out, shard)], []
    finally:
        shard.discard()


def _finished(out: Path) -> list[Part]:
    """The records of the finished shards, from the first one on without a gap."""
    parts: list[Part] = []
    while True:
        shard = out / pack_format.shard_name(len(parts))
        try:
            part = Part.load(out / PARTS, len(parts))
            whole = shard.stat().st_size == part.bytes
        except FileNotFoundError:
            return parts
        except (KeyError, TypeError, ValueError, RecursionError, UserError):  # damaged: the shard is made again
            return parts
        if not whole:
            return parts
        parts.append(part)


def _seen(parts: list[Part]) -> dict[bytes, tuple[str, int]]:
    """Content hash -> key and label of the images packed so far."""
    seen: dict[bytes, tuple[str, int]] = {}
    for part in parts:
        hashes, labels = part.columns["hash"], part.columns["label"].tolist()
        names = pack_format.Keys(part.columns)
        seen.update((hashes[row].tobytes(), (key, labels[row])) for row, key in enumerate(names))
    return seen


def _take(shard: Shard, item: Item, result: Encoded | str, seen: dict[bytes, tuple[str, int]]) -> None:
    """Adds one image to the shard, or to what is left out of it.

    Of equal images the first stays: one that is there twice would be learnt from in one place and tested on in another.
    """
    shard.part.next += 1
    if isinstance(result, str):
        shard.part.left_out.append((item.name, result))
    elif result.digest in seen:
        key, label = seen[result.digest]
        kind = "duplicate" if label == item.label else "duplicate with another label"
        shard.part.left_out.append((item.name, f"{kind}: of {key}"))
    else:
        seen[result.digest] = item.key, item.label
        shard.add(item, result)


def _close(out: Path, shard: Shard) -> Part:
    """The shard first, then the record that it is finished."""
    part = shard.close()
    part.save(out / PARTS, shard.number)
    return part


def _encoded(items: list[Item], config: PackConfig) -> Iterator[tuple[Item, Encoded | str]]:
    """Each item, in order, with its JPEG or the reason why there is none; a few batches are worked on ahead."""
    num_workers = config.num_workers or cores()
    batches = (items[start : start + BATCH] for start in range(0, len(items), BATCH))
    rows = RowReader()
    waiting: deque[tuple[list[Item], Future[list[Encoded | str]]]] = deque()
    pool = ThreadPoolExecutor(num_workers, thread_name_prefix="pack")
    try:
        for batch in batches:
            images = [_image(item, rows) for item in batch]
            waiting.append((batch, pool.submit(_encode, batch, images, config)))
            if len(waiting) > 2 * num_workers:
                done, future = waiting.popleft()
                yield from zip(done, future.result(), strict=True)
        for done, future in waiting:
            yield from zip(done, future.result(), strict=True)
    finally:
        pool.shutdown(cancel_futures=True)


def _image(item: Item, rows: RowReader) -> Callable[[], bytes]:
    """What gives the item's bytes, in any thread; a Parquet file's are read here, in order."""
    if not item.column:
        return partial(sources.contents, item)
    try:
        data = rows.read(item.container, item.column, item.offset)
    except InvalidImageError as error:
        return partial(_refuse, str(error))
    except MemoryError as error:
        raise _stopped(item, "memory is too short to read it") from error
    return lambda: data


def _refuse(reason: str) -> bytes:
    raise InvalidImageError(reason)


def _encode(batch: list[Item], images: list[Callable[[], bytes]], config: PackConfig) -> list[Encoded | str]:
    results: list[Encoded | str] = []
    for item, image in zip(batch, images, strict=True):
        try:
            results.append(encode(image(), config.max_side, config.jpeg_quality))
        except InvalidImageError as error:
            results.append(str(error))
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EPERM):
                raise _stopped(item, f"cannot be read ({reason_of(error)})") from error
            results.append(f"cannot be read: {error.strerror}")
        except MemoryError as error:
            raise _stopped(item, "memory is too short to decode it") from error
    return results


def _stopped(item: Item, why: str) -> UserError:
    """The error for what says nothing of the image: to leave it out for that would be for good."""
    where = readable(bytes_of(item.container)) + (f": {item.name}" if item.offset else "")
    return UserError(
        f"{where}: {why}; no image is left out for that: mend it, or move the file away, and run the same command "
        "again, it goes on after the last finished shard"
    )


def _finish(plan: Plan, parts: list[Part], rest: list[tuple[str, str]]) -> None:
    """Writes the list of what was left out, the index, and last of all the manifest."""
    out = plan.out
    left_out = [*plan.listing.left_out, *(entry for part in parts for entry in part.left_out), *rest]
    lines = [json.dumps({"name": name, "reason": reason}, ensure_ascii=False) for name, reason in left_out]
    write_file(out / pack_format.LEFT_OUT, "".join(line + "\n" for line in lines).encode())
    if not parts:
        raise UserError(f"{out}: not one image could be packed; {out / pack_format.LEFT_OUT} gives the reasons")
    columns = assemble(parts)
    index = pack_format.dump_index(columns)
    write_file(out / pack_format.INDEX, index)
    changes = sum((part.changes for part in parts), Counter())
    manifest = Manifest(
        images=len(columns["shard"]),
        classes=plan.listing.classes,
        shard_bytes=tuple(part.bytes for part in parts),
        index_sha256=sha256(index).hexdigest(),
        fingerprint=pack_format.fingerprint(columns["hash"], columns["size"]),
        settings=plan.settings,
        summary={"re_encoded": dict(sorted(changes.items())), "left_out": _by_reason(left_out)},
    )
    write_file(out / pack_format.MANIFEST, manifest.dump().encode())


def _by_reason(left_out: list[tuple[str, str]]) -> dict[str, int]:
    """How many were left out for each kind of reason, without the details."""
    return dict(sorted(Counter(reason.split(":")[0] for _, reason in left_out).items()))
