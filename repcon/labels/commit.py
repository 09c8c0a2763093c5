"""Atomic changes of a store's manifest: a journal, and recovery from it.

Order on disk: the new manifest as a journal, array metadata, the manifest; then the journal is deleted. A reader
sees the old manifest or the new one. A kill in between leaves the journal, from which the next writer completes.
"""

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from repcon.labels.layout import layouts_of
from repcon.labels.manifest import (
    JOURNAL,
    MANIFEST,
    MAX_BYTES,
    Manifest,
    StoreSpec,
    difference,
    label_identity,
    manifest_of,
    plain,
    read_manifest,
    write_manifest,
)
from repcon.labels.zarr_encoding import metadata_of
from repcon.runtime.errors import UserError
from repcon.runtime.filesystem import FileSystem

IsHeld = Callable[[], bool]
"""Whether this process may still change the store: no other process has taken over its claim."""


def always() -> bool:
    """`is_held` of a process that is known to be the only writer."""
    return True


def commit(files: FileSystem, manifest: Manifest, is_held: IsHeld = always) -> bytes:
    """Writes the manifest and the metadata of its arrays; returns the manifest's bytes.

    Raises UserError once `is_held` is False: another process may change the store then.
    """
    metadata = dict(metadata_of(manifest))
    for name, content in metadata.items():
        existing = files.read(name) if files.size(name) is not None else b""
        # Equal metadata stays as it is: another version of zarr may format it differently.
        if _same_json(existing, content):
            metadata[name] = existing
    hashes = {name: hashlib.sha256(data).hexdigest() for name, data in metadata.items()}
    data = write_manifest(dataclasses.replace(manifest, metadata=hashes))
    read_manifest(data, f"{files.root}/{MANIFEST}")  # a manifest that could not be read back must not be written
    for name, content in ((JOURNAL, data), *metadata.items(), (MANIFEST, data)):
        files.write(name, content, partial(_require_held, files, is_held))
    _require_held(files, is_held)
    files.delete(JOURNAL)
    return data


def take_over(files: FileSystem) -> None:
    """For the heir of a process that stood still while it changed the store: what that one was about to put in place
    when it lost its claim comes too late. To be called before anything is read."""
    files.cancel_writes((JOURNAL, MANIFEST, "zarr.json"))


def _require_held(files: FileSystem, is_held: IsHeld) -> None:
    if not is_held():
        what = "another process took over the change of this store while this one stood still"
        raise UserError(f"{files.root}: {what}; run the command again")


def _same_json(left: bytes, right: bytes) -> bool:
    try:
        return json.loads(left) == json.loads(right)
    except ValueError:
        return False


def complete(files: FileSystem, is_held: IsHeld = always) -> None:
    """Completes an interrupted change, if there is one."""
    if files.size(JOURNAL) is not None:
        commit(files, pending_manifest(files), is_held)


def pending_manifest(files: FileSystem) -> Manifest:
    """The manifest of an unfinished change. Raises UserError where the journal is no manifest."""
    return read_manifest(_read(files, JOURNAL), f"{files.root}/{JOURNAL}")


def manifest_bytes(files: FileSystem) -> bytes:
    """Content of `manifest.json`. Raises UserError where there is no store."""
    try:
        return _read(files, MANIFEST)
    except (FileNotFoundError, NotADirectoryError):
        hint = f"no label store here (it has no {MANIFEST}); `repcon precompute` makes one"
        raise UserError(f"{files.root}: {hint}") from None


def _read(files: FileSystem, name: str) -> bytes:
    """The file, up to one byte more than a manifest may have. Raises UserError for errors other than its absence."""
    try:
        return files.read(name, 0, MAX_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError):
        raise
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{files.root}/{name}: cannot be read ({reason}); fix that and try again") from error


def check_metadata(files: FileSystem, manifest: Manifest) -> None:
    """Compares every `zarr.json` with its hash; during a change that of the new manifest is accepted too."""
    accepted = [manifest.metadata]
    with contextlib.suppress(FileNotFoundError):  # no journal, or not any more
        accepted.append(pending_manifest(files).metadata)

    def problem(name: str) -> str | None:
        try:
            digest = hashlib.sha256(files.read(name, 0, 2**20)).hexdigest()
        except FileNotFoundError:
            return f"{files.root}/{name}: missing; restore it from a copy"
        except OSError as error:
            return f"{files.root}/{name}: cannot be read ({error.strerror or error}); fix that and try again"
        if digest in [hashes.get(name) for hashes in accepted]:
            return None
        return f"{files.root}/{name}: damaged (its sha256 is not the manifest's); restore it from a copy"

    unlisted = {f"{layout.path}/zarr.json" for layout in layouts_of(manifest)} - manifest.metadata.keys()
    if unlisted:
        raise UserError(f"{files.root}/{MANIFEST}: lists no hash for {min(unlisted)}; restore it from a copy")
    with ThreadPoolExecutor(8) as pool:
        problems = [found for found in pool.map(problem, manifest.metadata) if found]
    if problems:
        raise UserError("; ".join(problems[:3]))


def require_same(held: Manifest, spec: StoreSpec, root: str) -> None:
    """Raises UserError naming the field in which a spec differs from the store's first run; additions do not count."""
    wanted, stored = plain(manifest_of(spec, root)), plain(held)
    stored["crops"] = held.parts[0].crops[1] if spec.crops == held.parts[0].crops[1] else held.crops
    if not spec.rows_per_shard:
        wanted["rows_per_shard"] = stored["rows_per_shard"]
    identities = {teacher.name: label_identity(teacher) for teacher in held.teachers}
    stored["teachers"] = {teacher.name: identities.get(teacher.name) for teacher in spec.teachers}
    wanted["teachers"] = {teacher.name: label_identity(teacher) for teacher in spec.teachers}
    for derived in ("parts", "metadata", "crops_per_shard"):
        del wanted[derived], stored[derived]
    if found := difference(stored, wanted):
        raise UserError(f"{root} was made for something else: {found}; name another folder, or use what the store has")
