"""The label store: crops and soft labels of several teachers in one Zarr v3 hierarchy, written unit by unit.

A unit is one shard of every array: its shards are on disk before its marker is, so a marker means that the labels
are there. Readers decode slabs (one crop of all images) and serve nothing that a marker does not vouch for.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from repcon import gaps
from repcon.errors import UserError
from repcon.store_files import Files, open_files
from repcon.store_format import (
    JOURNAL,
    MANIFEST,
    HeadInfo,
    Layout,
    Manifest,
    Part,
    StoreSpec,
    TeacherSection,
    Unit,
    box_layouts,
    check,
    difference,
    head_layouts,
    heads_of,
    manifest_of,
    read_manifest,
    shard_name,
    units_of,
    write_manifest,
)  # fmt: skip
from repcon.store_markers import Markers, shard_file
from repcon.store_reader import ShardReader, chunk_crcs
from repcon.store_zarr import encode_shard, metadata_of

__all__ = ["HeadInfo", "LabelStore", "Slab", "StoreSpec", "TeacherSection", "Unit"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Slab:
    """One crop of all images, decoded."""

    crop: int
    boxes: np.ndarray
    """(N, 4) uint16: x, y, width, height in the pack's pixels."""
    flips: np.ndarray
    """(N,) uint8."""
    labels: dict[str, tuple[np.ndarray, np.ndarray]]
    """Per head: ids (N, k) uint16 or uint32, log-probabilities and log-tails (N, k + T) float16."""


class LabelStore:
    """A store that is open. Threads may share it; another process gets its own by pickling."""

    def __init__(self, files: Files, manifest: Manifest, data: bytes) -> None:
        self._files = files
        self.url = files.root
        self.manifest = manifest
        self._manifest_bytes = data
        self.fingerprint = hashlib.sha256(data).hexdigest()
        self.images, self.crops = manifest.images, manifest.crops
        self.heads: dict[str, HeadInfo] = heads_of(manifest)
        self._markers = Markers(files, manifest)
        self._reader = ShardReader(files, manifest, self._markers, threads=min(4, os.cpu_count() or 1))

    def __reduce__(self) -> tuple:
        return LabelStore.open, (self.url,)

    @classmethod
    def create(cls, url: str, spec: StoreSpec) -> "LabelStore":
        """A new store, or the one that is there if it was made for the same spec.

        A store to which teachers or crops were added since is opened too. Raises UserError naming the field in
        which an existing store differs; versions and licences may.
        """
        files = open_files(str(url))
        files.sweep()
        if files.size(MANIFEST) is None:
            if files.names("") and files.size(JOURNAL) is None:
                raise UserError(f"{files.root} holds other files; name an empty or new folder for the store")
            _commit(files, manifest_of(spec))
        else:
            _recover(files)
            _require_same(read_manifest(files.read(MANIFEST), f"{files.root}/{MANIFEST}"), spec, files.root)
        return cls.open(url)

    @classmethod
    def open(cls, url: str) -> "LabelStore":
        """An existing store. Raises UserError on damage, another format version, or no store."""
        files = open_files(str(url))
        try:
            data = files.read(MANIFEST)
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(f"{files.root}: no label store here (it has no {MANIFEST}); `repcon precompute` makes "
                            "one") from None  # fmt: skip
        manifest = read_manifest(data, f"{files.root}/{MANIFEST}")
        _check_metadata(files, manifest)
        return cls(files, manifest, data)

    def append_teachers(self, sections: Sequence[TeacherSection]) -> None:
        """Adds heads, to be computed on the stored boxes; those already there must be equal and stay as they are."""
        held = {name: head.section for name, head in self.heads.items()}
        for section in sections:
            if section.name in held:
                _require_same_section(held[section.name], section, self.url)
        new = tuple(section for section in sections if section.name not in held)
        if new:
            part = Part(heads=tuple(section.name for section in new), crops=(0, self.crops), boxes=False)
            parts = (*self.manifest.parts, part)
            self._change(dataclasses.replace(self.manifest, teachers=(*self.manifest.teachers, *new), parts=parts))

    def append_crops(self, crops: int) -> None:
        """Extends the store to `crops` crops per image in all, for every head; asking for what it has changes nothing."""
        depth = self.manifest.crops_per_shard
        if crops < self.crops or crops % depth:
            raise UserError(f"{self.url}: crops can grow from {self.crops} in steps of {depth} (a shard holds {depth}), "
                            f"not to {crops}")  # fmt: skip
        if crops > self.crops:
            part = Part(heads=tuple(self.heads), crops=(self.crops, crops), boxes=True)
            parts = (*self.manifest.parts, part)
            self._change(dataclasses.replace(self.manifest, crops=crops, parts=parts))

    def _change(self, manifest: Manifest) -> None:
        check(manifest, self.url)
        if self._files.read(MANIFEST) != self._manifest_bytes:
            raise UserError(f"{self.url}: another process changed the store meanwhile; run the command again")
        self._reader.close()
        data = _commit(self._files, manifest)
        self.__init__(self._files, read_manifest(data, self.url), data)

    def units(self) -> list[Unit]:
        """All work, finished or not, in the order in which it is best done."""
        return list(units_of(self.manifest))

    def is_done(self, unit: Unit) -> bool:
        """Whether the unit has its marker and every shard that it lists, at full length."""
        return self._markers.is_done(unit)

    def unfinished(self) -> list[Unit]:
        """The units still to do, as the files say now."""
        self._markers.forget()
        return [unit for unit in units_of(self.manifest) if not self.is_done(unit)]

    @cached_property
    def missing(self) -> np.ndarray:
        """Rows (int64, sorted) whose image could not be decoded when some finished unit was written."""
        done = [unit for unit in units_of(self.manifest) if self.is_done(unit)]
        rows = {row for unit in done for row in self._markers.get(unit).missing}
        return np.array(sorted(rows), np.int64)

    def write(
        self,
        unit: Unit,
        boxes: np.ndarray,
        flips: np.ndarray,
        labels: Mapping[str, tuple[np.ndarray, np.ndarray]],
        missing: Sequence[int] = (),
    ) -> None:
        """Writes a unit of m crops by r images: shards, fsync, then the marker.

        boxes (m, r, 4) uint16, flips (m, r) uint8, labels per head: ids (m, r, k) integers and logp (m, r, k + T)
        float16. `missing` are store rows whose image could not be decoded: their labels become poison.
        Raises UserError on labels that no reader could trust (NaN, ids out of range, wrong shapes).
        """
        absent = np.isin(np.arange(unit.rows.start, unit.rows.stop), np.asarray(missing, np.int64))
        blocks: list[tuple[Layout, np.ndarray]] = []
        if unit.writes_boxes:
            shape = (len(unit.crops), len(unit.rows))
            if boxes.shape != (*shape, 4) or flips.shape != shape:
                raise UserError(f"unit {unit.name}: boxes {boxes.shape} and flips {flips.shape} do not fit {shape}")
            blocks += zip(box_layouts(), (boxes, flips), strict=True)
        if set(labels) != set(unit.heads):
            raise UserError(f"unit {unit.name}: labels of {sorted(labels)}, but it is made of {sorted(unit.heads)}")
        for name in unit.heads:
            blocks += self._label_blocks(unit, self.heads[name], *labels[name], absent)
        written = {}
        for layout, block in blocks:
            place = shard_name(self.manifest, layout, unit.crops.start, unit.rows.start)
            key = place.removeprefix(f"{layout.path}/")
            data = encode_shard(self._array_metadata[layout.path], key, unit.crops.start, unit.rows.start, block)
            self._files.write(place, data)
            written[place] = shard_file(data, chunk_crcs(data, self.manifest.crops_per_shard))
        self._markers.put(unit, tuple(int(row) for row in np.flatnonzero(absent) + unit.rows.start), written)

    @cached_property
    def _array_metadata(self) -> dict[str, bytes]:
        names = [name for name in self.manifest.metadata if name.count("/") and name not in ("crops/zarr.json",)]
        return {name.removesuffix("/zarr.json"): self._files.read(name) for name in names}

    def _label_blocks(
        self, unit: Unit, head: HeadInfo, ids: np.ndarray, logp: np.ndarray, absent: np.ndarray
    ) -> list[tuple[Layout, np.ndarray]]:
        """Ids and values as they are stored, after checks."""
        shape = (len(unit.crops), len(unit.rows))
        id_layout, value_layout = head_layouts(self.manifest, head)
        wanted = (*shape, head.k), (*shape, head.k + len(head.temperatures))
        if (ids.shape, logp.shape) != wanted:
            raise UserError(
                f"unit {unit.name}, head {head.name}: ids {ids.shape} and logp {logp.shape} instead of {wanted}"
            )
        present = ~absent
        _check_labels(unit, head, ids[:, present], logp[:, present])
        ids = np.where(absent[:, None], id_layout.fill, ids).astype(id_layout.dtype)
        values = np.where(absent[:, None], np.nan, logp.astype(np.float16)).astype(np.float16)
        if self.manifest.values == "gaps8":
            values = gaps.encode(values, head.k, head.temperatures)
        return [(id_layout, ids), (value_layout, values)]

    def boxes(self, crops: range, rows: range) -> tuple[np.ndarray, np.ndarray]:
        """Stored boxes (m, r, 4) uint16 and flips (m, r) uint8."""
        boxes = np.empty((len(crops), len(rows), 4), np.uint16)
        flips = np.empty((len(crops), len(rows)), np.uint8)
        for place, crop in enumerate(crops):
            self._reader.read_boxes(crop, rows, boxes[place], flips[place])
        return boxes, flips

    def empty_slab(self, heads: Iterable[str] | None = None) -> Slab:
        """Memory for a slab, for `slab(out=...)`."""
        labels = {}
        for head in self._chosen(heads):
            ids = np.empty((self.images, head.k), head_layouts(self.manifest, head)[0].dtype)
            labels[head.name] = (ids, np.empty((self.images, head.k + len(head.temperatures)), np.float16))
        boxes, flips = np.empty((self.images, 4), np.uint16), np.empty(self.images, np.uint8)
        return Slab(crop=-1, boxes=boxes, flips=flips, labels=labels)

    def slab_bytes(self, heads: Iterable[str] | None = None) -> int:
        """Memory that one slab takes."""
        widths = [head.k * head_layouts(self.manifest, head)[0].dtype.itemsize
                  + 2 * (head.k + len(head.temperatures)) for head in self._chosen(heads)]  # fmt: skip
        return self.images * (9 + sum(widths))

    def slab(self, crop: int, heads: Iterable[str] | None = None, out: Slab | None = None) -> Slab:
        """Decodes one crop of all images, into `out` where given. Raises UserError with the place of any damage."""
        chosen = self._chosen(heads)
        for name in (None, *(head.name for head in chosen)):
            self._reader.require(name, crop)
        target = out or self.empty_slab(heads)
        rows = range(self.images)
        self._reader.read_boxes(crop, rows, target.boxes, target.flips)
        for head in chosen:
            self._reader.read_head(head, crop, rows, *target.labels[head.name])
        return dataclasses.replace(target, crop=crop)

    def slabs(self, crops: Iterable[int], heads: Iterable[str] | None = None) -> Iterator[Slab]:
        """Slabs in the order of `crops`; the next one is decoded by a thread while the last is in use."""
        names = [head.name for head in self._chosen(heads)]
        with ThreadPoolExecutor(1, thread_name_prefix="repcon-slabs") as pool:
            ahead = None
            for crop in crops:
                following = pool.submit(self.slab, crop, names)
                if ahead is not None:
                    yield ahead.result()
                ahead = following
            if ahead is not None:
                yield ahead.result()

    def _chosen(self, heads: Iterable[str] | None) -> list[HeadInfo]:
        names = list(self.heads) if heads is None else list(heads)
        unknown = [name for name in names if name not in self.heads]
        if unknown:
            raise UserError(f"{self.url}: no head {', '.join(unknown)}; it holds {', '.join(self.heads)}")
        return [self.heads[name] for name in names]


def _check_labels(unit: Unit, head: HeadInfo, ids: np.ndarray, logp: np.ndarray) -> None:
    """Refuses what must not be stored: NaN, infinite or rising log-probabilities, ids out of range."""
    place = f"unit {unit.name}, head {head.name}"
    if ids.size == 0:
        return
    if not np.issubdtype(ids.dtype, np.integer) or ids.min() < 0 or ids.max() >= head.classes:
        raise UserError(f"{place}: ids must be integers from 0 to {head.classes - 1}, not {ids.min()} to {ids.max()}")
    values = logp.astype(np.float32)
    if np.isnan(values).any() or not np.isfinite(values[..., : head.k]).all():
        raise UserError(
            f"{place}: NaN or infinite log-probabilities; the teacher overflows (try precision fp32 or bf16)"
        )
    if (np.diff(values[..., : head.k]) > 0).any():
        raise UserError(f"{place}: log-probabilities must fall from the first to the last")


def _commit(files: Files, manifest: Manifest) -> bytes:
    """Makes the manifest the store's: journal, metadata, manifest. A kill in between is mended by `_recover`."""
    metadata = dict(metadata_of(manifest))
    hashes = {name: hashlib.sha256(data).hexdigest() for name, data in metadata.items()}
    # What zarr wrote before stays as it is, unless its shape changed: another zarr version may print it otherwise.
    for name in metadata:
        held = files.read(name) if files.size(name) is not None else None
        if held is not None and _same_metadata(held, metadata[name]):
            hashes[name] = hashlib.sha256(held).hexdigest()
            metadata[name] = held
    data = write_manifest(dataclasses.replace(manifest, metadata=hashes))
    files.write(JOURNAL, data)
    for name, content in metadata.items():
        files.write(name, content)
    files.write(MANIFEST, data)
    files.delete(JOURNAL)
    return data


def _same_metadata(held: bytes, wanted: bytes) -> bool:
    try:
        return json.loads(held) == json.loads(wanted)
    except ValueError:
        return False


def _recover(files: Files) -> None:
    """Completes a change of the manifest that was cut short."""
    if files.size(JOURNAL) is not None:
        _commit(files, read_manifest(files.read(JOURNAL), f"{files.root}/{JOURNAL}"))


def _check_metadata(files: Files, manifest: Manifest) -> None:
    """Compares every `zarr.json` with its hash; during a change of the manifest the coming one is right too."""
    accepted = [manifest.metadata]
    if files.size(JOURNAL) is not None:
        accepted.append(read_manifest(files.read(JOURNAL), f"{files.root}/{JOURNAL}").metadata)

    def problem(name: str) -> str | None:
        try:
            digest = hashlib.sha256(files.read(name, 0, 2**20)).hexdigest()
        except OSError:
            return f"{files.root}/{name}: missing; restore it from a copy"
        if digest in [hashes.get(name) for hashes in accepted]:
            return None
        return f"{files.root}/{name}: damaged (its sha256 is not the manifest's); restore it from a copy"

    names = {
        f"{layout.path}/zarr.json" for head in heads_of(manifest).values() for layout in head_layouts(manifest, head)
    }
    if not names <= manifest.metadata.keys():
        raise UserError(f"{files.root}/{MANIFEST}: lists no hash for {sorted(names - manifest.metadata.keys())[0]}")
    with ThreadPoolExecutor(8) as pool:
        if problems := [found for found in pool.map(problem, manifest.metadata) if found]:
            raise UserError("; ".join(problems[:3]))


def _require_same(held: Manifest, spec: StoreSpec, root: str) -> None:
    """Refuses a spec that the store was not made for, naming the field."""
    asked = json.loads(json.dumps(dataclasses.asdict(manifest_of(spec))))
    have = json.loads(json.dumps(dataclasses.asdict(held)))
    if not spec.rows_per_shard:
        asked["rows_per_shard"] = have["rows_per_shard"]
    first = held.parts[0]
    have["crops"] = held.crops if spec.crops == held.crops else first.crops[1]
    sections = {teacher["name"]: teacher for teacher in have["teachers"]}
    have["teachers"] = [sections.get(t["name"]) for t in asked["teachers"]]
    for values in (asked, have):
        for name in ("parts", "metadata", "crops_per_shard"):
            values.pop(name)
        values["teachers"] = {t["name"]: _identity(t) for t in values["teachers"] if t}
    if found := difference(have, asked):
        raise UserError(f"{root} was made for something else: {found}; name another folder, or use what the store has")


def _require_same_section(held: TeacherSection, asked: TeacherSection, root: str) -> None:
    pair = [_identity(json.loads(json.dumps(dataclasses.asdict(section)))) for section in (held, asked)]
    if found := difference(pair[0], pair[1], f"teachers.{held.name}"):
        raise UserError(f"{root}: {found}; a teacher that changed needs another name")


def _identity(section: dict) -> dict:
    """What decides a teacher's answers; its licence, versions and where it was loaded from do not."""
    return {key: value for key, value in section.items() if key not in ("versions", "licence", "model")}
