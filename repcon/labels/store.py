"""The label store: crops and soft labels of several teachers in one Zarr v3 hierarchy, written unit by unit.

A unit is one shard of every array: its shards are on disk before its marker is, so a marker means that the labels
are there. Readers decode slabs (one crop of all images) and serve nothing that a marker does not vouch for.
"""

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import zip_longest

import numpy as np

from repcon.labels.blocks import box_blocks, label_blocks
from repcon.labels.commit import (
    IsHeld,
    always,
    check_metadata,
    coming,
    commit,
    complete,
    require_same,
    require_same_section,
)
from repcon.labels.completion import CompletionRecords, shard_file
from repcon.labels.layout import HeadInfo, Unit, heads_of, layouts_of, shard_name, units_of
from repcon.labels.manifest import (
    JOURNAL,
    MANIFEST,
    MARKERS,
    MOST_BYTES,
    Manifest,
    Part,
    StoreSpec,
    TeacherMetadata,
    check,
    label_identity,
    manifest_of,
    plain,
    read_manifest,
)
from repcon.labels.reader import ShardReader
from repcon.labels.shared_memory import shared_tables
from repcon.labels.tables import (
    CropLabels,
    LabelTable,
    Window,
    ahead,
    empty_tables,
    memory_available,
    ranges,
    table_bytes,
    window_plan,
)
from repcon.labels.writer import LostClaimError, UnitClaim, UnitWriter
from repcon.labels.zarr_encoding import METADATA_NAMES, encode_shard, metadata_problems
from repcon.runtime.errors import UserError
from repcon.runtime.filesystem import FileSystem, is_safe_name, open_filesystem

_OWN_NAMES = ("crops", "heads", "zarr.json", JOURNAL)
"""What a store may hold before its manifest is there."""
_SCAN_THREADS = 32
"""Requests at a time while the units of a store behind a URL are looked at."""

__all__ = [
    "CropLabels",
    "HeadInfo",
    "LabelStore",
    "LabelTable",
    "LostClaimError",
    "StoreSpec",
    "TeacherMetadata",
    "Unit",
    "Window",
]


class LabelStore:
    """A store that is open. Threads may share it; another process gets its own by pickling."""

    def __init__(self, files: FileSystem, data: bytes) -> None:
        """`data` are the bytes of the manifest; use `create` or `open`."""
        self._files = files
        self.url = files.root
        self._load(data)

    def _load(self, data: bytes) -> None:
        self._manifest_bytes = data
        self.manifest = read_manifest(data, f"{self.url}/{MANIFEST}")
        self.fingerprint = hashlib.sha256(data).hexdigest()
        self.images, self.crops = self.manifest.images, self.manifest.crops
        self.heads: dict[str, HeadInfo] = heads_of(self.manifest)
        self._records = CompletionRecords(self._files, self.manifest)
        self._reader = ShardReader(self._files, self.manifest, self._records)

    def __reduce__(self) -> tuple:
        return LabelStore.open, (self.url,)

    @classmethod
    def create(cls, url: str, spec: StoreSpec, is_held: IsHeld = always) -> "LabelStore":
        """A new store, or the one that is there if it was made for the same spec.

        A store to which teachers or crops were added since is opened too. Raises UserError naming the field in
        which an existing store differs; versions and licences may. `is_held`: see `storage.commit`.
        """
        files = open_filesystem(str(url))
        if files.size(MANIFEST) is None:
            manifest = manifest_of(spec, files.root)
            others = _others(files)
            if files.size(MANIFEST) is None:  # else another process has just finished making it
                if others:
                    raise UserError(f"{files.root} holds other files; name an empty or new folder for the store")
                commit(files, manifest, is_held)
        complete(files, is_held)
        store = cls.open(url)
        require_same(store.manifest, spec, store.url)
        files.remove_abandoned()
        return store

    @classmethod
    def open(cls, url: str) -> "LabelStore":
        """An existing store. Raises UserError on damage, another format version, or no store."""
        files = open_filesystem(str(url))
        while True:
            data = _manifest(files)
            try:
                store = cls(files, data)
                check_metadata(files, store.manifest)
            except UserError:
                if _manifest(files) == data:
                    raise
            else:
                return store  # Else another process changed the store between the two looks.

    def append_teachers(self, sections: Sequence[TeacherMetadata], is_held: IsHeld = always) -> None:
        """Adds heads, to be computed on the stored boxes; those of a name that is there must be equal to it."""
        for section in sections:
            if section.name in self.heads:
                require_same_section(self.heads[section.name].section, section, self.url)
        new = tuple(section for section in sections if section.name not in self.heads)
        if new:
            part = Part(heads=tuple(section.name for section in new), crops=(0, self.crops), boxes=False)
            teachers, parts = (*self.manifest.teachers, *new), (*self.manifest.parts, part)
            self._change(dataclasses.replace(self.manifest, teachers=teachers, parts=parts), is_held)

    def replace_teacher(self, section: TeacherMetadata, is_held: IsHeld = always) -> None:
        """Puts another teacher under a head's name. Raises UserError where a unit of it is finished."""
        if any(section.name in unit.heads and self.is_done(unit) for unit in units_of(self.manifest)):
            raise UserError(f"{self.url}: {section.name} has labels already; give the other teacher another name")
        teachers = tuple(section if held.name == section.name else held for held in self.manifest.teachers)
        self._change(dataclasses.replace(self.manifest, teachers=teachers), is_held)

    def require_growth(self, crops: int) -> None:
        """Raises UserError where the store cannot grow to `crops` crops per image in all."""
        depth = self.manifest.crops_per_shard
        if crops < self.crops or crops % depth:
            steps = f"crops can grow from {self.crops} in steps of {depth}, the crops of a shard"
            raise UserError(f"{self.url}: {steps}; {crops} is not one of these")

    def append_crops(self, crops: int, is_held: IsHeld = always) -> None:
        """Extends every head to `crops` crops per image IN ALL; asking for what is there changes nothing."""
        self.require_growth(crops)
        if crops > self.crops:
            part = Part(heads=tuple(self.heads), crops=(self.crops, crops), boxes=True)
            self._change(dataclasses.replace(self.manifest, crops=crops, parts=(*self.manifest.parts, part)), is_held)

    def _change(self, manifest: Manifest, is_held: IsHeld) -> None:
        check(manifest, self.url)
        complete(self._files, is_held)
        if self._files.read(MANIFEST) != self._manifest_bytes:
            raise UserError(f"{self.url}: another process changed the store meanwhile; run the command again")
        self._load(commit(self._files, manifest, is_held))

    def _require_teachers(self, unit: Unit) -> None:
        """Raises UserError where another run has put another teacher under the name of one of the unit's heads."""
        data = _manifest(self._files)
        if data != self._manifest_bytes:  # appending changes it too
            now = heads_of(read_manifest(data, f"{self.url}/{MANIFEST}"))
            for name in unit.heads:
                if label_identity(now[name].section) != label_identity(self.heads[name].section):
                    raise UserError(f"{self.url}: another run has put another teacher in the place of {name}; stop one")

    def units(self) -> list[Unit]:
        """All work, finished or not, in the order in which it is best done."""
        return list(units_of(self.manifest))

    def is_done(self, unit: Unit) -> bool:
        """Whether the unit has its marker and every shard that it lists, at full length."""
        return self._records.is_done(unit)

    def unfinished(self, units: Sequence[Unit] | None = None) -> list[Unit]:
        """Those of the units (None for all) that are still to do, as the files say now."""
        units = self.units() if units is None else units
        # Markers of its own, and let go: those of all units are read once, and not kept for as long as the store.
        done = {unit.name for unit in self._done(CompletionRecords(self._files, self.manifest), units)}
        return [unit for unit in units if unit.name not in done]

    def finished(self, units: Sequence[Unit] | None = None) -> list[Unit]:
        """Those of the units (None for all) that are done; their markers are kept."""
        return self._done(self._records, self.units() if units is None else units)

    def _done(self, records: CompletionRecords, units: Sequence[Unit]) -> list[Unit]:
        marked = self.marked()  # one listing: to ask for each of a million markers that are not there takes minutes
        begun = [unit for unit in units if unit.name in marked]
        with ThreadPoolExecutor(_SCAN_THREADS if "://" in self.url else 1) as pool:
            return [unit for unit, done in zip(begun, pool.map(records.is_done, begun), strict=True) if done]

    def require_pack(self, fingerprint: str, images: int | None = None) -> None:
        """Raises UserError where the labels are not those of the images of the pack of this fingerprint, and of so
        many images."""
        if fingerprint != self.manifest.pack_fingerprint:
            raise UserError(f"{self.url}: its labels belong to another pack's images; name the pack it was made from")
        if images not in (None, self.images):
            what = f"its manifest counts {self.images:,} images and the pack has {images:,}"
            raise UserError(f"{self.url}: {what}; restore the manifest from a copy, or make the store again")

    @property
    def missing(self) -> np.ndarray:
        """`missing_of` all heads."""
        return self.missing_of(self.heads)

    def missing_of(self, heads: Iterable[str]) -> np.ndarray:
        """Rows (int64, sorted) whose image could not be decoded when some finished unit of these heads was written.

        Units of other heads do not matter: what a run on some heads learns from stays the same while others are added.
        """
        names = set(heads)
        units = self.finished([unit for unit in units_of(self.manifest) if names & set(unit.heads)])
        return np.array(list(self.missing_reasons(units)), np.int64)

    def missing_reasons(self, finished: Iterable[Unit]) -> dict[int, str]:
        """The missing rows of these finished units, rising, and why each image could not be decoded; "" where the store
        was made before that was kept."""
        records = [self._records.get(unit) for unit in finished]
        pairs = [pair for record in records for pair in zip_longest(record.missing, record.reasons, fillvalue="")]
        return {int(row): reason for row, reason in sorted(pairs)}

    def marked(self) -> set[str]:
        """The names of the units for which there is a marker, whatever it says."""
        return {name.removesuffix(".json") for name in self._files.list_names(MARKERS)}

    def missing_of_units(self, units: Iterable[Unit]) -> np.ndarray:
        """Rows (int64, sorted) that the markers of these units list as missing; a damaged marker lists none."""
        rows: set[int] = set()
        for unit in units:
            with contextlib.suppress(UserError, OSError):
                rows.update(self._records.get(unit).missing)
        return np.array(sorted(rows), np.int64)

    def write(
        self,
        unit: Unit,
        boxes: np.ndarray,
        flips: np.ndarray,
        labels: Mapping[str, tuple[np.ndarray, np.ndarray]],
        missing: Mapping[int, str] | None = None,
        claim: UnitClaim | None = None,
    ) -> int:
        """Writes a unit of m crops by r images: shards, fsync, then the marker; gives the shards' bytes.

        boxes (m, r, 4) uint16, flips (m, r) uint8, labels per head: ids (m, r, k) integers and logp (m, r, k + T)
        float16. `missing` are rows of the store whose image could not be decoded, with the reason: their labels become
        poison. With a `claim`, nothing is put in place once another process has taken it over: raises LostClaimError.
        Raises UserError on labels that no reader could trust (NaN, ids out of range, wrong shapes or dtypes) and on a
        full disk.
        """
        missing = missing or {}
        if outside := missing.keys() - set(unit.rows):
            rows = f"{unit.rows.start} to {unit.rows.stop - 1}"
            raise UserError(f"unit {unit.name}: missing row {min(outside)} is not one of its rows, {rows}")
        absent = np.isin(np.arange(unit.rows.start, unit.rows.stop), list(missing))
        if set(labels) != set(unit.heads):
            raise UserError(f"unit {unit.name}: labels of {sorted(labels)}, but it is made of {sorted(unit.heads)}")
        blocks = box_blocks(unit, boxes, flips) if unit.writes_boxes else []
        for name in unit.heads:
            blocks += label_blocks(self.manifest, unit, self.heads[name], *labels[name], absent)
        shards = []
        for layout, block in blocks:
            place = shard_name(self.manifest, layout, unit.crops.start, unit.rows.start)
            shards.append((place, encode_shard(self.manifest, layout, place, unit.crops.start, unit.rows.start, block)))
        writer = UnitWriter(self._files, self.manifest, self._records, unit, claim)
        return writer.write(shards, missing, lambda: self._require_teachers(unit))

    def boxes(self, crops: range, rows: range) -> tuple[np.ndarray, np.ndarray]:
        """Stored boxes (m, r, 4) uint16 and flips (m, r) uint8."""
        boxes = np.empty((len(crops), len(rows), 4), np.uint16)
        flips = np.empty((len(crops), len(rows)), np.uint8)
        for place, crop in enumerate(crops):
            self._reader.read(
                crop, [rows], CropLabels(crop=crop, boxes=boxes[place], flips=flips[place], labels={}), []
            )
        return boxes, flips

    def read_rows(self, crop: int, rows: range, heads: Iterable[str] | None = None) -> CropLabels:
        """Some neighbouring rows of one crop; those of whole shards cost least. Needs no more than these finished."""
        chosen = self._chosen(heads)
        return self._filled(empty_tables(chosen, [crop], len(rows)), [rows], chosen).crop_labels(0)

    def shard_bytes(self, finished: Iterable[Unit]) -> dict[str, int]:
        """Bytes of the shards of these finished units, by their array's path."""
        sizes: dict[str, int] = {}
        for unit in finished:
            for name, shard in self._records.get(unit).files.items():
                array = "/".join(name.split("/")[: 3 if name.startswith("heads/") else 2])
                sizes[array] = sizes.get(array, 0) + shard.bytes
        return sizes

    def identity(self, heads: Iterable[str]) -> str:
        """SHA-256 in hex of all that decides about these heads' labels; the same after other teachers were appended."""
        beside = ("teachers", "parts", "metadata")
        shared = {name: value for name, value in plain(self.manifest).items() if name not in beside}
        sections = [label_identity(head.section) for head in self._chosen(heads)]
        return hashlib.sha256(json.dumps([shared, sections], sort_keys=True).encode()).hexdigest()

    def disagreements(self) -> list[str]:
        """Where plain zarr would read something else than this store's readers do, or find arrays that they do not."""
        found = [f"{self.url}/{what}" for what in metadata_problems(self.manifest, self._files.read)]
        if self._files.size(JOURNAL) is not None:
            hint = "run `repcon precompute` with its recipe, which completes it"
            found.append(f"{self.url}/{JOURNAL}: a change of this store is under way, or was cut short; {hint}")
        known = {name.removesuffix("/zarr.json") for name in self.manifest.metadata}
        for folder in ("", "crops", "heads", *(f"heads/{name}" for name in self.heads)):
            for name in filter(is_safe_name, self._files.list_names(folder)):
                place = f"{folder}/{name}".lstrip("/")
                if place not in known and self._files.size(f"{place}/zarr.json") is not None:
                    found.append(f"{self.url}/{place}: an array or group that the manifest does not know; remove it")
        for folder in ("", *(name.removesuffix("zarr.json").rstrip("/") for name in self.manifest.metadata)):
            for name in self._files.list_unsafe_names(folder):
                if name.rpartition("/")[2] in METADATA_NAMES:
                    what = "metadata of another version of zarr, or of an array that the manifest does not know"
                    found.append(f"{self.url}/{f'{folder}/{name}'.lstrip('/')}: {what}; remove it")
        return list(dict.fromkeys(found))

    def damage(self, unit: Unit) -> list[str]:
        """What is wrong with the unit's marker and files, each by its sha256; empty for a finished, intact unit."""
        try:
            record = self._records.get(unit)
        except UserError as error:
            return [str(error)]
        except OSError as error:
            return [f"{error.filename or self.url}: cannot be read ({error.strerror or error})"]
        wanted = {
            shard_name(self.manifest, layout, unit.crops.start, unit.rows.start): layout
            for layout in layouts_of(self.manifest, unit)
        }
        wrong = [
            f"{self.url}/{ascii(name)[1:-1][:200]}: the marker of {unit.name} and the layout do not agree on it"
            for name in sorted(set(record.files) ^ set(wanted))
        ]
        for name in sorted(set(record.files) & set(wanted)):
            shard = record.files[name]
            if shard.bytes > wanted[name].most_bytes(self.manifest.crops_per_shard, self.manifest.rows_per_shard):
                wrong.append(f"{self.url}/{name}: the marker of {unit.name} says {shard.bytes} bytes, too many for it")
                continue
            try:
                data = self._files.read(name) if self._files.size(name) == shard.bytes else b""
            except OSError:
                data = b""
            if shard_file(data, ()).sha256 != shard.sha256:
                wrong.append(
                    f"{self.url}/{name}: not what was written (its sha256 is not that in done/{unit.name}.json)"
                )
        return wrong

    def crop_labels_bytes(self, heads: Iterable[str] | None = None) -> int:
        """Memory that one slab takes."""
        return table_bytes(self._chosen(heads), self.images)

    def crop_labels(self, crop: int, heads: Iterable[str] | None = None, out: CropLabels | None = None) -> CropLabels:
        """Decodes one crop of all images, into `out` where given. A UserError names the place of any damage."""
        chosen = self._chosen(heads)
        self._reader.require(crop, chosen)
        target = out or empty_tables(chosen, [crop], self.images).crop_labels(0)
        return self._reader.read(crop, [range(self.images)], target, chosen)

    def iter_crop_labels(self, crops: Iterable[int], heads: Iterable[str] | None = None) -> Iterator[CropLabels]:
        """Slabs in the order of `crops`; the next one is decoded by a thread while the last is in use."""
        names = [head.name for head in self._chosen(heads)]
        return ahead(lambda crop: self.crop_labels(crop, names), crops)

    def tables(self, crops: Sequence[int], heads: Iterable[str] | None = None, *, shared: bool = False) -> LabelTable:
        """Several crops of all images, decoded one after the other into one array per kind.

        With `shared` the processes of a node that ask for the same crops and heads hold one copy, in shared memory;
        it is given back when the last of them has let go of its `LabelTable`.
        """
        chosen = self._chosen(heads)
        for crop in crops:
            self._reader.require(crop, chosen)

        def decode(tables: LabelTable) -> LabelTable:
            return self._filled(tables, [range(self.images)], chosen)

        if shared:
            return shared_tables(chosen, crops, self.images, f"{self.url} {self.fingerprint}", decode)
        return decode(empty_tables(chosen, crops, self.images))

    def windows(
        self, crop: int, heads: Iterable[str] | None = None, *, seed: int, memory_bytes: int = 0
    ) -> Iterator[Window]:
        """A crop in windows that fit the memory, shards shuffled by `seed`; one window where two slabs fit.

        `memory_bytes` is what labels may take in all, 0 half of what is free now. Shuffle rows within each window.
        """
        names = [head.name for head in self._chosen(heads)]
        plan = self.window_plan([crop], names, seed=seed, memory_bytes=memory_bytes or memory_available() // 2)
        return ahead(lambda rows: Window(rows=rows, crop_labels=self.window([crop], rows, names).crop_labels(0)), plan)

    def window_plan(
        self,
        crops: Sequence[int],
        heads: Iterable[str] | None = None,
        *,
        seed: int | Sequence[int],
        memory_bytes: int,
    ) -> Iterator[np.ndarray]:
        """The rows of each window, (n,) rising, where these crops are read together; as `slabs.window_plan`.

        Raises UserError where one of the crops is not finished.
        """
        chosen = self._chosen(heads)
        for crop in crops:
            self._reader.require(crop, chosen)
        per_image = table_bytes(chosen, len(crops))
        return window_plan(self.images, self.manifest.rows_per_shard, per_image, memory_bytes, seed)

    def window(self, crops: Sequence[int], rows: np.ndarray, heads: Iterable[str] | None = None) -> LabelTable:
        """Some rising rows of several crops: image rows[i] of crop crops[j] is row j * n + i of every table.

        Needs no more than these rows finished.
        """
        chosen = self._chosen(heads)
        return self._filled(empty_tables(chosen, crops, len(rows)), ranges(rows), chosen)

    def _filled(self, tables: LabelTable, rows: Sequence[range], heads: Sequence[HeadInfo]) -> LabelTable:
        """The tables, with these rows of each of their crops decoded into them."""
        for place, crop in enumerate(tables.crops):
            self._reader.read(crop, rows, tables.crop_labels(place), heads)
        return tables

    def _chosen(self, heads: Iterable[str] | None) -> list[HeadInfo]:
        names = list(self.heads) if heads is None else list(heads)
        unknown = [name for name in names if name not in self.heads]
        if unknown:
            raise UserError(f"{self.url}: no head {', '.join(unknown)}; it holds {', '.join(self.heads)}")
        return [self.heads[name] for name in names]


def _others(files: FileSystem) -> list[str]:
    """Files that are not of a store whose making was cut short. Raises UserError where the journal is no store's."""
    names = files.list_names("")
    if files.size(JOURNAL) is None:
        return names
    coming(files)
    return [name for name in names if name not in _OWN_NAMES]


def _manifest(files: FileSystem) -> bytes:
    """The manifest's bytes. Raises UserError where there is no store."""
    try:
        return files.read(MANIFEST, 0, MOST_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError):
        hint = f"no label store here (it has no {MANIFEST}); `repcon precompute` makes one"
        raise UserError(f"{files.root}: {hint}") from None
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{files.root}/{MANIFEST}: cannot be read ({reason}); mend that and try again") from error
