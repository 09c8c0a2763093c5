"""The store that a recipe writes to: a new one, one to be resumed, or one that gets more teachers or crops."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from repcon.config import PrecomputeConfig
from repcon.images.pack import ImagePack
from repcon.labels.commit import complete, take_over
from repcon.labels.manifest import MANIFEST, label_identity
from repcon.labels.store import LabelStore, StoreSpec, TeacherMetadata
from repcon.precompute.work_queue import Claim, Leases
from repcon.runtime.console import console
from repcon.runtime.errors import UserError
from repcon.runtime.filesystem import open_filesystem


def run_folder(out: str) -> Path:
    """Where the command's own records lie: `labels.zarr.run` beside the store; in the working folder for a URL."""
    plain = out.rstrip("/")
    return Path(plain.rsplit("/", 1)[-1] + ".run" if "://" in plain else plain + ".run")


def lease_folder(out: str) -> str:
    """Where the claims on the store's units lie: beside the store, so that every machine that writes it sees them."""
    return out.rstrip("/") + ".leases"


def open_or_create_store(config: PrecomputeConfig, pack: ImagePack, sections: Sequence[TeacherMetadata]) -> LabelStore:
    """Opens or makes the store, and appends what it does not hold yet; one process at a time.

    Raises UserError naming the field in which the recipe differs from what the store was made for.
    """
    if "://" not in config.out and Path(config.out).is_file():
        raise UserError(f"{config.out} is a file; name a folder for the store")
    with Leases(lease_folder(config.out), on_wait=_on_warning) as leases, leases.hold("store") as claim:
        if claim.inherited:
            take_over(open_filesystem(config.out))
        if open_filesystem(config.out).size(MANIFEST) is None:
            return LabelStore.create(config.out, spec_of(config, pack, sections), claim.is_held)
        return _grown(config, pack, sections, leases, claim)


def _on_warning(message: str) -> None:
    console.print(message, style="yellow", markup=False, highlight=False, soft_wrap=True)


def spec_of(config: PrecomputeConfig, pack: ImagePack, sections: Sequence[TeacherMetadata]) -> StoreSpec:
    """What a recipe asks of its store."""
    return StoreSpec(
        pack_fingerprint=pack.fingerprint,
        images=len(pack),
        crops=config.crops,
        crop_recipe=dataclasses.asdict(config.crop),
        k=config.k,
        temperatures=config.temperatures,
        teachers=tuple(sections),
        rows_per_shard=config.rows_per_shard,
        codec=config.codec,
        values=config.values,
    )


def _grown(
    config: PrecomputeConfig, pack: ImagePack, sections: Sequence[TeacherMetadata], leases: Leases, claim: Claim
) -> LabelStore:
    """The store that is there, compared in all that both have, with the recipe's further teachers and crops added."""
    # A change that was cut short: what the store holds is known after it only.
    complete(open_filesystem(config.out), claim.is_held)
    held = LabelStore.open(config.out)
    held.require_pack(pack.fingerprint, len(pack))
    for section in sections:
        _replace(held, section, leases, claim)
    named = {section.name: section for section in sections}
    more_crops = config.crops > held.crops
    spec = dataclasses.replace(
        spec_of(config, pack, [named.get(name, head.section) for name, head in held.heads.items()]),
        crops=held.crops if more_crops else config.crops,
    )
    store = LabelStore.create(config.out, spec, claim.is_held)
    absent = [name for name in store.heads if name not in named]
    if more_crops and absent:
        grown = f"it has {held.crops} crops of each image, the recipe asks for {config.crops}"
        hint = f"name them all, or crops = {held.crops}"
        raise UserError(f"{config.out}: {grown}; that takes every teacher, also {', '.join(absent)}; {hint}")
    if more_crops:
        store.require_growth(config.crops)
    store.append_teachers(sections, claim.is_held)
    if more_crops:
        store.append_crops(config.crops, claim.is_held)
    return store


def _replace(store: LabelStore, section: TeacherMetadata, leases: Leases, claim: Claim) -> None:
    """A teacher whose first run failed before it finished anything gives its name to the mended one."""
    head = store.heads.get(section.name)
    if head is None or label_identity(head.section) == label_identity(section):
        return
    units = [unit for unit in store.units() if section.name in unit.heads]
    if len(store.unfinished(units)) == len(units) and all(leases.is_free(unit.name) for unit in units):
        store.replace_teacher(section, claim.is_held)
