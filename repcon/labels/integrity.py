"""Checks of a store's files: metadata that plain zarr reads differently, units whose files are not as written."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from zarr.core.metadata.v3 import ArrayV3Metadata

from repcon.labels.completion import shard_file
from repcon.labels.layout import Unit, layouts_of, shard_name
from repcon.labels.manifest import JOURNAL
from repcon.labels.store import LabelStore
from repcon.labels.zarr_encoding import metadata_of
from repcon.runtime.errors import UserError
from repcon.runtime.filesystem import is_safe_name

_METADATA_NAMES = ("zarr.json", ".zarray", ".zgroup", ".zattrs", ".zmetadata")
"""Files by which a reader of zarr 3 or 2 knows an array or a group."""
_NO_OPS = {"attributes": {}, "storage_transformers": [], "consolidated_metadata": None}
"""Fields that some versions of zarr write and others leave out."""


def hierarchy_problems(store: LabelStore) -> list[str]:
    """Arrays and groups that plain zarr would read differently than repcon, or that the manifest does not list."""
    found = [f"{store.url}/{what}" for what in _metadata_problems(store)]
    if store.files.size(JOURNAL) is not None:
        hint = "run `repcon precompute` with its recipe, which completes it"
        found.append(f"{store.url}/{JOURNAL}: a change of this store is under way, or was cut short; {hint}")
    known = {name.removesuffix("/zarr.json") for name in store.manifest.metadata}
    for folder in ("", "crops", "heads", *(f"heads/{name}" for name in store.heads)):
        for name in filter(is_safe_name, store.files.list_names(folder)):
            path = f"{folder}/{name}".lstrip("/")
            if path not in known and store.files.size(f"{path}/zarr.json") is not None:
                found.append(f"{store.url}/{path}: an array or group that the manifest does not know; remove it")
    for folder in ("", *(name.removesuffix("zarr.json").rstrip("/") for name in store.manifest.metadata)):
        try:
            unsafe = store.files.list_unsafe_names(folder)
        except OSError as error:
            found.append(f"{store.url}/{folder}: cannot be listed ({error.strerror or error})")
            continue
        for name in unsafe:
            if name.rpartition("/")[2] in _METADATA_NAMES:
                what = "metadata of another version of zarr, or of an array that the manifest does not know"
                found.append(f"{store.url}/{f'{folder}/{name}'.lstrip('/')}: {what}; remove it")
    return list(dict.fromkeys(found))


def _metadata_problems(store: LabelStore) -> Iterator[str]:
    """Every `zarr.json` that plain zarr would read differently than the manifest says."""
    contents, listed = dict(metadata_of(store.manifest)), store.manifest.metadata.keys()
    for name in sorted(listed - contents.keys()):
        yield f"{name}: the manifest lists it, and has no such array or group"
    for name in sorted(contents.keys() - listed):
        yield f"{name}: the manifest lists no hash for it"
    for name, content in contents.items():
        wanted = json.loads(content)
        try:
            held = _parse_strict_json(store.files.read(name))
        except (OSError, ValueError, RecursionError) as error:
            yield f"{name}: cannot be read by every zarr ({getattr(error, 'strerror', None) or f'not JSON: {error}'})"
            continue
        if not _is_equivalent(held, wanted):
            fields = _differing_fields(held, wanted)
            yield f"{name}: plain zarr would read it otherwise than the manifest says ({fields})"


def _parse_strict_json(data: bytes) -> Any:
    """Parses JSON that every parser reads alike. Raises ValueError for a byte order mark, repeated keys, NaN."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(found := dict(pairs)) < len(pairs):
            raise ValueError("a key is there twice")
        return found

    def no_constant(name: str) -> None:
        raise ValueError(f"{name} is no number of JSON's")

    return json.loads(data.decode("utf-8"), object_pairs_hook=once, parse_constant=no_constant)


def _is_equivalent(held: Any, wanted: Mapping[str, Any]) -> bool:
    if not isinstance(held, Mapping):
        return False
    reduced = [
        {key: value for key, value in each.items() if _NO_OPS.get(key, value) != value or key not in _NO_OPS}
        for each in (held, wanted)
    ]
    if _same(*reduced):
        return True
    if held.get("node_type") != "array" or wanted["node_type"] != "array":
        return False
    try:  # as another version of zarr prints it
        return _same(*(ArrayV3Metadata.from_dict(dict(each)).to_dict() for each in reduced))
    except Exception:  # zarr raises many things for what is no metadata
        return False


def _same(one: Any, other: Any) -> bool:
    """Whether both are equal and of the same types; in Python 1, 1.0 and True are equal."""
    return json.dumps(one, sort_keys=True, default=str) == json.dumps(other, sort_keys=True, default=str)


def _differing_fields(held: Any, wanted: Mapping[str, Any]) -> str:
    if not isinstance(held, Mapping):
        return "it is no object"
    return (
        ", ".join(ascii(key)[1:-1][:80] for key in sorted({*held, *wanted}) if held.get(key) != wanted.get(key))
        or "types"
    )


def unit_problems(store: LabelStore, unit: Unit) -> list[str]:
    """What is wrong with the unit's completion record and files, by their sha256; empty for an intact finished unit."""
    try:
        record = store.completion.get(unit)
    except UserError as error:
        return [str(error)]
    except OSError as error:
        return [f"{error.filename or store.url}: cannot be read ({error.strerror or error})"]
    manifest = store.manifest
    layouts = {
        shard_name(manifest, layout, unit.crops.start, unit.rows.start): layout for layout in layouts_of(manifest, unit)
    }
    found = [
        f"{store.url}/{ascii(name)[1:-1][:200]}: the completion record of {unit.name} and the layout do not agree on it"
        for name in sorted(set(record.files) ^ set(layouts))
    ]
    for name in sorted(set(record.files) & set(layouts)):
        size = record.files[name].bytes
        if size > layouts[name].max_shard_bytes(manifest.crops_per_shard, manifest.rows_per_shard):
            what = f"the completion record of {unit.name} says {size} bytes, too many for it"
            found.append(f"{store.url}/{name}: {what}")
            continue
        try:
            data = store.files.read(name) if store.files.size(name) == size else b""
        except OSError:
            data = b""
        if shard_file(data, ()).sha256 != record.files[name].sha256:
            what = f"its sha256 is not that in done/{unit.name}.json"
            found.append(f"{store.url}/{name}: not what was written ({what})")
    return found
