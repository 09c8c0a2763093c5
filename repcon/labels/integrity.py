"""Checks of a store's files: metadata that plain zarr reads differently, units whose files are not as written."""

from repcon.labels.completion import shard_file
from repcon.labels.layout import Unit, layouts_of, shard_name
from repcon.labels.manifest import JOURNAL
from repcon.labels.store import LabelStore
from repcon.labels.zarr_encoding import METADATA_NAMES, metadata_problems
from repcon.runtime.errors import UserError
from repcon.runtime.filesystem import is_safe_name


def hierarchy_problems(store: LabelStore) -> list[str]:
    """Arrays and groups that plain zarr would read differently than repcon, or that the manifest does not list."""
    found = [f"{store.url}/{what}" for what in metadata_problems(store.manifest, store.files.read)]
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
        for name in store.files.list_unsafe_names(folder):
            if name.rpartition("/")[2] in METADATA_NAMES:
                what = "metadata of another version of zarr, or of an array that the manifest does not know"
                found.append(f"{store.url}/{f'{folder}/{name}'.lstrip('/')}: {what}; remove it")
    return list(dict.fromkeys(found))


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
