"""The store that a recipe writes to: created, resumed, or extended by teachers or crops."""

import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from repcon.config import CropConfig, PrecomputeConfig, parse
from repcon.images.pack import ImagePack
from repcon.labels.commit import complete, manifest_bytes, take_over
from repcon.labels.layout import layouts_of
from repcon.labels.manifest import MANIFEST, label_identity, manifest_of, read_manifest
from repcon.labels.store import LabelStore, StoreSpec, TeacherMetadata, Unit
from repcon.precompute.work_queue import Claim, Leases
from repcon.runtime.console import print_plain
from repcon.runtime.disk_space import require_disk_space
from repcon.runtime.errors import UserError
from repcon.runtime.filesystem import open_filesystem

NEW_STORE: dict[str, Any] = {"crops": 8, "k": 16, "temperatures": (1.0,), "codec": "zstd", "values": "float16"}
"""What a recipe that leaves these settings open gets in a new store."""
SMALLEST_SHARE = 3
"""Labels are taken to compress to no less than this part (a third) of their raw bytes."""


def run_folder(out: str) -> Path:
    """Folder of the command's own records: `labels.zarr.run` next to the store; in the working folder for a URL."""
    plain = out.rstrip("/")
    return Path(plain.rsplit("/", 1)[-1] + ".run" if "://" in plain else plain + ".run")


def lease_folder(out: str) -> str:
    """Folder of the claims on the store's units: next to the store, so that every machine that writes it sees them."""
    return out.rstrip("/") + ".leases"


def with_store_settings(config: PrecomputeConfig) -> PrecomputeConfig:
    """The recipe with the settings that it leaves open taken from the store at `out`, or those of a new store."""
    if "://" not in config.out and Path(config.out).is_file():
        raise UserError(f"{config.out} is a file; name a folder for the store")
    settings = NEW_STORE
    files = open_filesystem(config.out)
    if files.size(MANIFEST) is not None:
        manifest = read_manifest(manifest_bytes(files), f"{files.root}/{MANIFEST}")
        settings = {name: getattr(manifest, name) for name in NEW_STORE}
        if config.crop == CropConfig():
            recipe = parse(CropConfig, manifest.crop_recipe, f"{files.root}/{MANIFEST}: crop_recipe")
            config = dataclasses.replace(config, crop=recipe)
    is_open = [name for name in NEW_STORE if getattr(config, name) in (0, (), "auto")]
    return dataclasses.replace(config, **{name: settings[name] for name in is_open})


def open_or_create_store(
    config: PrecomputeConfig, pack: ImagePack, teacher_metadata: Sequence[TeacherMetadata]
) -> LabelStore:
    """Opens or creates the store, and appends what it lacks; one process at a time.

    Raises UserError naming the field in which the recipe differs from what the store was made for.
    """
    on_wait = partial(print_plain, style="yellow")
    with Leases(lease_folder(config.out), on_wait=on_wait) as leases, leases.hold("store") as claim:
        if claim.inherited:
            take_over(open_filesystem(config.out))
        if open_filesystem(config.out).size(MANIFEST) is None:
            spec = spec_of(config, pack, teacher_metadata)
            _require_space(config.out, spec)
            return LabelStore.create(config.out, spec, claim.is_held)
        return _extended(config, pack, teacher_metadata, leases, claim)


def _require_space(out: str, spec: StoreSpec) -> None:
    """Raises UserError where the disk cannot hold even a third of the labels' raw bytes; URLs are not asked."""
    if "://" in out:
        return
    raw = sum(layout.bytes_per_row for layout in layouts_of(manifest_of(spec, out))) * spec.images * spec.crops
    require_disk_space(out, raw / SMALLEST_SHARE, hint=", or lower k or crops")


def spec_of(config: PrecomputeConfig, pack: ImagePack, teacher_metadata: Sequence[TeacherMetadata]) -> StoreSpec:
    """The store that a recipe without open settings asks for."""
    return StoreSpec(
        pack_fingerprint=pack.fingerprint,
        images=len(pack),
        crops=config.crops,
        crop_recipe=dataclasses.asdict(config.crop),
        k=config.k,
        temperatures=config.temperatures,
        teachers=tuple(teacher_metadata),
        rows_per_shard=config.rows_per_shard,
        codec=config.codec,  # pyright: ignore[reportArgumentType]
        values=config.values,  # pyright: ignore[reportArgumentType]
    )


def unlabelled_crops(config: PrecomputeConfig, spec: StoreSpec) -> dict[str, int]:
    """Crops, all images together, that each teacher of the spec still has to answer."""
    everything = {teacher.name: spec.images * spec.crops for teacher in spec.teachers}
    if open_filesystem(config.out).size(MANIFEST) is None:
        return everything
    store = LabelStore.open(config.out)
    unfinished = store.completion.unfinished()
    more = spec.images * max(spec.crops - store.crops, 0)
    left = {name: sum(crops_of(unit) for unit in unfinished if name in unit.heads) + more for name in store.heads}
    return {name: left.get(name, crops) for name, crops in everything.items()}


def crops_of(unit: Unit) -> int:
    """Crops in a unit, all images together."""
    return len(unit.crops) * len(unit.rows)


def _extended(
    config: PrecomputeConfig, pack: ImagePack, teacher_metadata: Sequence[TeacherMetadata], leases: Leases, claim: Claim
) -> LabelStore:
    """The existing store, checked against the recipe and extended by the recipe's further teachers and crops."""
    # An interrupted change is completed first: it may add teachers or crops.
    complete(open_filesystem(config.out), claim.is_held)
    held = LabelStore.open(config.out)
    held.require_pack(pack.fingerprint, len(pack))
    for metadata in teacher_metadata:
        _replace_unfinished(held, metadata, leases, claim)
    named = {metadata.name: metadata for metadata in teacher_metadata}
    more_crops = config.crops > held.crops
    spec = dataclasses.replace(
        spec_of(config, pack, [named.get(name, head.metadata) for name, head in held.heads.items()]),
        crops=held.crops if more_crops else config.crops,
    )
    store = LabelStore.create(config.out, spec, claim.is_held)
    unnamed = [name for name in store.heads if name not in named]
    if more_crops and unnamed:
        grown = f"it has {held.crops} crops of each image, the recipe asks for {config.crops}"
        hint = f"name them all, or crops = {held.crops}"
        raise UserError(f"{config.out}: {grown}; that takes every teacher, also {', '.join(unnamed)}; {hint}")
    if more_crops:
        store.require_growth(config.crops)
    store.append_teachers(teacher_metadata, claim.is_held)
    if more_crops:
        store.append_crops(config.crops, claim.is_held)
    return store


def _replace_unfinished(store: LabelStore, metadata: TeacherMetadata, leases: Leases, claim: Claim) -> None:
    """Replaces a teacher of this name whose run failed before it finished a unit."""
    head = store.heads.get(metadata.name)
    if head is None or label_identity(head.metadata) == label_identity(metadata):
        return
    units = [unit for unit in store.units() if metadata.name in unit.heads]
    if len(store.completion.unfinished(units)) == len(units) and all(leases.is_free(unit.name) for unit in units):
        store.replace_teacher(metadata, claim.is_held)
