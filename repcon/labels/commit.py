"""Changes of a store's manifest: making one, completing one that was cut short, refusing one that does not fit.

Order on disk: the coming manifest as a journal, array metadata, the manifest, and the journal is deleted. A reader
meets the old manifest or the new one; a kill in between leaves the journal, from which the next writer completes.
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
    MOST_BYTES,
    Manifest,
    StoreSpec,
    TeacherMetadata,
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
"""Whether this process may still change the store: nobody has taken over its claim."""


def always() -> bool:
    """For a process that is known to be alone with the store."""
    return True


def commit(files: FileSystem, manifest: Manifest, is_held: IsHeld = always) -> bytes:
    """Makes this the store's manifest, together with the metadata of its arrays; gives the manifest's bytes.

    Raises UserError where `is_held` says that another process may change the store by now.
    """
    metadata = dict(metadata_of(manifest))
    for name, wanted in metadata.items():
        held = files.read(name) if files.size(name) is not None else b""
        # Metadata that says the same is left as it is: another version of zarr may print it otherwise.
        if _same_json(held, wanted):
            metadata[name] = held
    hashes = {name: hashlib.sha256(data).hexdigest() for name, data in metadata.items()}
    data = write_manifest(dataclasses.replace(manifest, metadata=hashes))
    read_manifest(data, f"{files.root}/{MANIFEST}")  # one that could not be read back must not be written
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


def _same_json(held: bytes, wanted: bytes) -> bool:
    try:
        return json.loads(held) == json.loads(wanted)
    except ValueError:
        return False


def complete(files: FileSystem, is_held: IsHeld = always) -> None:
    """Completes a change that was cut short, if there is one."""
    if files.size(JOURNAL) is not None:
        commit(files, coming(files), is_held)


def coming(files: FileSystem) -> Manifest:
    """The manifest of a change that is under way. Raises UserError where the journal is none of this program's."""
    try:
        data = files.read(JOURNAL, 0, MOST_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError):
        raise
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{files.root}/{JOURNAL}: cannot be read ({reason}); mend that and try again") from error
    return read_manifest(data, f"{files.root}/{JOURNAL}")


def check_metadata(files: FileSystem, manifest: Manifest) -> None:
    """Compares every `zarr.json` with its hash; while a change is under way the coming one is right too."""
    accepted = [manifest.metadata]
    with contextlib.suppress(FileNotFoundError):  # no journal, or not any more
        accepted.append(coming(files).metadata)

    def problem(name: str) -> str | None:
        try:
            digest = hashlib.sha256(files.read(name, 0, 2**20)).hexdigest()
        except FileNotFoundError:
            return f"{files.root}/{name}: missing; restore it from a copy"
        except OSError as error:
            return f"{files.root}/{name}: cannot be read ({error.strerror or error}); mend that and try again"
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
    """Refuses a spec that the store was not made for, naming the field; what was added since does not matter."""
    asked, have = plain(manifest_of(spec, root)), plain(held)
    have["crops"] = held.parts[0].crops[1] if spec.crops == held.parts[0].crops[1] else held.crops
    if not spec.rows_per_shard:
        asked["rows_per_shard"] = have["rows_per_shard"]
    sections = {teacher.name: label_identity(teacher) for teacher in held.teachers}
    have["teachers"] = {teacher.name: sections.get(teacher.name) for teacher in spec.teachers}
    asked["teachers"] = {teacher.name: label_identity(teacher) for teacher in spec.teachers}
    for derived in ("parts", "metadata", "crops_per_shard"):
        del asked[derived], have[derived]
    if found := difference(have, asked):
        raise UserError(f"{root} was made for something else: {found}; name another folder, or use what the store has")


def require_same_section(held: TeacherMetadata, asked: TeacherMetadata, root: str) -> None:
    """Refuses a teacher that differs from the one of its name."""
    if found := difference(label_identity(held), label_identity(asked), f"teachers.{held.name}"):
        raise UserError(f"{root}: {found}; a teacher that changed needs another name")
