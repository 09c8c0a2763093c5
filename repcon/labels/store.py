"""The label store: crops and soft labels of several teachers in one Zarr v3 hierarchy, written unit by unit.

A unit is one shard of every array. Its shards are on disk before its completion record, so a record means that the
labels are there, and readers return nothing that no record lists.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Sequence

from repcon.labels import commit
from repcon.labels.commit import IsHeld, always
from repcon.labels.completion import CompletionIndex
from repcon.labels.layout import HeadInfo, Unit, heads_of, units_of
from repcon.labels.manifest import (
    HASHED_VALUES,
    JOURNAL,
    MANIFEST,
    Manifest,
    Part,
    StoreSpec,
    TeacherMetadata,
    check,
    difference,
    label_identity,
    manifest_of,
    plain,
    read_manifest,
)
from repcon.labels.reader import CropLabels, LabelReader
from repcon.labels.writer import LabelWriter, LostClaimError
from repcon.runtime.errors import UserError
from repcon.runtime.filesystem import FileSystem, open_filesystem

__all__ = ["CropLabels", "HeadInfo", "LabelStore", "LostClaimError", "StoreSpec", "TeacherMetadata", "Unit"]
_OWN_NAMES = ("crops", "heads", "zarr.json", JOURNAL)
"""Files and folders of a store whose manifest is not written yet."""


class LabelStore:
    """An open label store: `manifest` and `heads`, and its `reader`, `writer` and `completion` index.

    Threads may share it; another process opens its own when it is pickled. Changing the store (`append_teachers`,
    `append_crops`, `replace_teacher`) replaces the three parts.
    """

    def __init__(self, files: FileSystem, data: bytes) -> None:
        """`data` are the bytes of the manifest; use `create` or `open`."""
        self.files = files
        self.url = files.root
        self._load(data)

    def _load(self, data: bytes) -> None:
        self._manifest_bytes = data
        self.manifest = read_manifest(data, f"{self.url}/{MANIFEST}")
        self.fingerprint = hashlib.sha256(data).hexdigest()
        self.images, self.crops = self.manifest.images, self.manifest.crops
        self.heads: dict[str, HeadInfo] = heads_of(self.manifest)
        self.completion = CompletionIndex(self.files, self.manifest)
        identity = f"{self.url} {self.fingerprint}"
        self.reader = LabelReader(self.files, self.manifest, self.completion, identity)
        self.writer = LabelWriter(self.files, data, self.manifest, self.completion)

    def __reduce__(self) -> tuple:
        return LabelStore.open, (self.url,)

    @classmethod
    def create(cls, url: str, spec: StoreSpec, is_held: IsHeld = always) -> "LabelStore":
        """Creates a store, or opens the existing one if it was made for the same spec.

        A store that has been extended since is opened too. Raises UserError naming the field in which an existing
        store differs; versions and licences may. `is_held`: see `labels.commit`.
        """
        files = open_filesystem(str(url))
        if files.size(MANIFEST) is None:
            manifest = manifest_of(spec, files.root)
            foreign = _foreign_files(files)
            if files.size(MANIFEST) is None:  # else another process has just created it
                if foreign:
                    raise UserError(f"{files.root} holds other files; name an empty or new folder for the store")
                commit.commit(files, manifest, is_held)
        commit.complete(files, is_held)
        store = cls.open(url)
        commit.require_same(store.manifest, spec, store.url)
        files.remove_abandoned()
        return store

    @classmethod
    def open(cls, url: str) -> "LabelStore":
        """Opens an existing store. Raises UserError on damage, another format version, or no store."""
        files = open_filesystem(str(url))
        while True:
            data = commit.manifest_bytes(files)
            try:
                store = cls(files, data)
                commit.check_metadata(files, store.manifest)
            except UserError:
                if commit.manifest_bytes(files) == data:
                    raise
            else:
                return store
            # Another process changed the store between the two reads: try again.

    def append_teachers(self, teacher_metadata: Sequence[TeacherMetadata], is_held: IsHeld = always) -> None:
        """Adds heads, to be labelled on the stored boxes. Raises UserError where a head of that name differs."""
        for metadata in teacher_metadata:
            if metadata.name in self.heads:
                held, wanted = label_identity(self.heads[metadata.name].metadata), label_identity(metadata)
                if found := difference(held, wanted, f"teachers.{metadata.name}"):
                    raise UserError(f"{self.url}: {found}; a teacher that changed needs another name")
        new = tuple(metadata for metadata in teacher_metadata if metadata.name not in self.heads)
        if new:
            part = Part(heads=tuple(metadata.name for metadata in new), crops=(0, self.crops), boxes=False)
            teachers, parts = (*self.manifest.teachers, *new), (*self.manifest.parts, part)
            self._change(dataclasses.replace(self.manifest, teachers=teachers, parts=parts), is_held)

    def replace_teacher(self, metadata: TeacherMetadata, is_held: IsHeld = always) -> None:
        """Replaces the teacher of a head. Raises UserError where a unit of the head is finished."""
        if any(metadata.name in unit.heads and self.completion.is_done(unit) for unit in units_of(self.manifest)):
            raise UserError(f"{self.url}: {metadata.name} has labels already; give the other teacher another name")
        teachers = tuple(metadata if held.name == metadata.name else held for held in self.manifest.teachers)
        self._change(dataclasses.replace(self.manifest, teachers=teachers), is_held)

    def require_growth(self, crops: int) -> None:
        """Raises UserError where the store cannot grow to `crops` crops per image in all."""
        depth = self.manifest.crops_per_shard
        if crops < self.crops or crops % depth:
            steps = f"crops can grow from {self.crops} in steps of {depth}, the crops of a shard"
            raise UserError(f"{self.url}: {steps}; {crops} is not one of these")

    def append_crops(self, crops: int, is_held: IsHeld = always) -> None:
        """Extends every head to `crops` crops per image in total; does nothing where the store has as many."""
        self.require_growth(crops)
        if crops > self.crops:
            part = Part(heads=tuple(self.heads), crops=(self.crops, crops), boxes=True)
            self._change(dataclasses.replace(self.manifest, crops=crops, parts=(*self.manifest.parts, part)), is_held)

    def _change(self, manifest: Manifest, is_held: IsHeld) -> None:
        check(manifest, self.url)
        commit.complete(self.files, is_held)
        if self.files.read(MANIFEST) != self._manifest_bytes:
            raise UserError(f"{self.url}: another process changed the store meanwhile; run the command again")
        self._load(commit.commit(self.files, manifest, is_held))

    def units(self) -> list[Unit]:
        """All units, finished or not, in the order in which they are best done."""
        return list(units_of(self.manifest))

    def require_pack(self, fingerprint: str, images: int | None = None) -> None:
        """Raises UserError unless the labels belong to the pack of this fingerprint and number of images."""
        if fingerprint != self.manifest.pack_fingerprint:
            raise UserError(f"{self.url}: its labels belong to another pack's images; name the pack it was made from")
        if images not in (None, self.images):
            what = f"its manifest counts {self.images:,} images and the pack has {images:,}"
            raise UserError(f"{self.url}: {what}; restore the manifest from a copy, or make the store again")

    def identity(self, heads: Iterable[str]) -> str:
        """SHA-256 in hex of everything that determines these heads' labels; other heads do not change it."""
        excluded = ("teachers", "parts", "metadata")
        shared = {name: value for name, value in plain(self.manifest).items() if name not in excluded}
        shared["values"] = HASHED_VALUES[self.manifest.values]
        identities = [label_identity(head.metadata) for head in self.reader.choose(heads)]
        return hashlib.sha256(json.dumps([shared, identities], sort_keys=True).encode()).hexdigest()


def _foreign_files(files: FileSystem) -> list[str]:
    """Files that no interrupted `create` leaves behind. Raises UserError where the journal is not a manifest."""
    names = files.list_names("")
    if files.size(JOURNAL) is None:
        return names
    commit.pending_manifest(files)
    return [name for name in names if name not in _OWN_NAMES]
