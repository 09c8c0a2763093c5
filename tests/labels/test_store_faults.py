"""What may happen to a store, with a fixed seed: kills, flipped bytes, races, full disks, lost and swapped files."""

import json
import multiprocessing
import os
import pickle
import random
import shutil
import subprocess
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from store_builder import create_and_fill, expected, fill, snapshot, spec, teacher_metadata

from repcon.labels.integrity import unit_problems
from repcon.labels.manifest import seal, unseal
from repcon.labels.store import LabelStore
from repcon.runtime.errors import UserError
from repcon.runtime.filesystem import LocalFileSystem

# One server imports everything once; each writer is a fork of it, so that kills land in the writing.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["repcon.labels.store"])


@pytest.fixture
def store(tmp_path) -> LabelStore:
    return fill(LabelStore.create(str(tmp_path / "labels.zarr"), spec()))


def read_everything(url: str, heads: list[str] | None = None, crops: int = 4) -> None:
    store = LabelStore.open(url)
    for crop_labels in store.reader.iter_crop_labels(range(crops), heads):
        for name, (ids, logp) in crop_labels.labels.items():
            wanted_ids, wanted_logp = expected(store, crop_labels.crops[0], name)
            np.testing.assert_array_equal(ids, wanted_ids)
            np.testing.assert_array_equal(logp, wanted_logp)


def test_racing_writers_of_the_same_units_lose_nothing(tmp_path):
    create_and_fill(str(tmp_path / "alone"))
    writers = [CONTEXT.Process(target=create_and_fill, args=(str(tmp_path / "raced"),)) for _ in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    assert snapshot(tmp_path / "raced") == snapshot(tmp_path / "alone")


KINDS = {
    "shard data": ("heads/wide/logp/c/0/1/0", 0.3),
    "ids data": ("heads/small/ids/c/0/0/0", 0.3),
    "boxes": ("crops/box/c/0/2/0", 0.3),
    "shard index": ("heads/wide/ids/c/0/1/0", 0.999),
    "zarr.json": ("heads/wide/ids/zarr.json", 0.5),
    "group's zarr.json": ("zarr.json", 0.5),
    "manifest": ("manifest.json", 0.5),
    "completion record": ("done/part-0-crop-0-row-40.json", 0.5),
}


@pytest.mark.parametrize("kind", KINDS)
def test_one_flipped_byte_is_found_and_its_place_named(store, kind):
    name, share = KINDS[kind]
    path, generator = Path(store.url) / name, random.Random(kind)
    whole = path.read_bytes()
    places = [int(share * len(whole)), *(generator.randrange(len(whole)) for _ in range(12))]
    for place in places:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << generator.randrange(8))]) + whole[place + 1 :])
        with pytest.raises(UserError) as caught:
            read_everything(store.url)
        assert name in str(caught.value)
    path.write_bytes(whole)
    read_everything(store.url)


def test_every_single_byte_of_a_shard_counts(tmp_path):
    store = fill(LabelStore.create(str(tmp_path / "s"), spec(images=6, crops=1)))
    path = Path(store.url) / "heads/small/ids/c/0/0/0"
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :])
        with pytest.raises(UserError, match="heads/small/ids/c/0/0/0"):
            pickle.loads(pickle.dumps(store)).reader.crop_labels(0, ["small"])


@pytest.mark.parametrize("damage", ["deleted", "empty", "shortened", "lengthened"])
@pytest.mark.parametrize("name", ["heads/wide/logp/c/0/1/0", "crops/flip/c/0/1"])
def test_a_lost_or_cut_shard_is_found_and_written_again(store, name, damage):
    path, before = Path(store.url) / name, snapshot(Path(store.url))
    whole = path.read_bytes()
    {
        "deleted": path.unlink,
        "empty": lambda: path.write_bytes(b""),
        "shortened": lambda: path.write_bytes(whole[:-1]),
        "lengthened": lambda: path.write_bytes(whole + b"\0"),
    }[damage]()
    with pytest.raises(UserError, match=name):
        read_everything(store.url)
    again = LabelStore.create(store.url, spec())
    assert [unit.name for unit in again.completion.unfinished()] == ["part-0-crop-0-row-40"]
    fill(again)
    read_everything(store.url)
    assert snapshot(Path(store.url)) == before


def test_a_deleted_completion_record_means_unfinished(store):
    (Path(store.url) / "done/part-0-crop-0-row-0.json").unlink()
    with pytest.raises(UserError, match=r"part-0-crop-0-row-0\.json: no such completion record"):
        read_everything(store.url)


def test_a_damaged_completion_record_is_named_and_its_unit_written_again(store):
    path = Path(store.url) / "done/part-0-crop-0-row-0.json"
    before = path.read_bytes()
    path.write_bytes(before[:-20])
    assert [unit.name for unit in LabelStore.open(store.url).completion.unfinished()] == ["part-0-crop-0-row-0"]
    fill(LabelStore.create(store.url, spec()))
    assert path.read_bytes() == before


def test_shards_that_changed_places_are_found(tmp_path):
    store = fill(LabelStore.create(str(tmp_path / "s"), spec(images=80, crops=1)))
    one, other = (Path(store.url) / f"crops/flip/c/0/{row}" for row in (0, 1))
    left, right = one.read_bytes(), other.read_bytes()
    assert len(left) == len(right)  # no length gives it away, and their own checksums are right
    one.write_bytes(right)
    other.write_bytes(left)
    with pytest.raises(UserError, match="not the one that was written"):
        LabelStore.open(store.url).reader.crop_labels(0)


def test_completion_records_that_changed_places_are_found(store):
    one, other = (Path(store.url) / f"done/part-0-crop-0-row-{row}.json" for row in (0, 40))
    left, right = one.read_bytes(), other.read_bytes()
    one.write_bytes(right)
    other.write_bytes(left)
    with pytest.raises(UserError, match="the completion record is that of unit"):
        read_everything(store.url)


def test_labels_of_a_teacher_that_the_manifest_does_not_name_are_unfinished(store):
    """An older manifest is put back, and the store grown in another way: units of the same names hold other labels."""
    root = Path(store.url)
    older = {path: path.read_bytes() for path in (root / "manifest.json", *root.rglob("zarr.json"))}

    def grown(*teachers):
        opened = LabelStore.open(store.url)
        opened.append_teachers(teachers)
        return opened

    added = fill(grown(teacher_metadata("birds", 50)))
    assert added.completion.unfinished() == []
    for others in (teacher_metadata("birds", 50, weight_hash="trained again"), teacher_metadata("cars", 50)):
        for path, data in older.items():
            path.write_bytes(data)
        again = grown(others)
        assert [unit.heads for unit in again.completion.unfinished()] == [(others.name,)] * 3
        with pytest.raises(UserError, match=r"other teachers or crops.*precompute"):
            again.reader.crop_labels(0)
        fill(again)
        assert again.completion.unfinished() == [] and not any(unit_problems(again, unit) for unit in again.units())


def test_completion_records_of_stores_from_before_their_source_was_kept_count(store):
    for path in Path(store.url, "done").iterdir():
        held = {name: value for name, value in json.loads(path.read_text()).items() if name != "source"}
        path.write_bytes(seal(held))
    assert LabelStore.open(store.url).completion.unfinished() == []


def test_a_store_that_grows_while_it_is_opened_is_not_damaged(store, monkeypatch):
    other, plain, grown = LabelStore.open(store.url), LocalFileSystem.read, []

    def read(self, name, *place):
        data = plain(self, name, *place)
        if name == "manifest.json" and not grown:
            grown.append(True)
            other.append_crops(8)
        return data

    monkeypatch.setattr(LocalFileSystem, "read", read)
    assert LabelStore.open(store.url).crops == 8


def test_a_journal_that_is_gone_meanwhile_is_none(store, monkeypatch):
    plain = LocalFileSystem.size
    monkeypatch.setattr(LocalFileSystem, "size", lambda self, name: 9 if "next" in name else plain(self, name))
    assert LabelStore.open(store.url).crops == store.crops


def test_a_disk_that_cannot_be_read_is_not_called_missing(store, monkeypatch):
    def read(descriptor, length, start):
        raise OSError(5, "Input/output error")

    opened = LabelStore.open(store.url)
    monkeypatch.setattr(os, "pread", read)
    with pytest.raises(OSError) as caught:
        opened.reader.crop_labels(0)
    assert str(caught.value.filename).startswith(store.url)
    monkeypatch.undo()
    plain = LocalFileSystem.read

    def no_metadata(self, name, *place):
        if name.endswith("zarr.json"):
            raise OSError(5, "Input/output error")
        return plain(self, name, *place)

    monkeypatch.setattr(LocalFileSystem, "read", no_metadata)
    with pytest.raises(UserError, match=r"zarr.json: cannot be read \(Input/output error"):
        LabelStore.open(store.url)


def test_another_version_of_the_format_is_refused(store):
    path = Path(store.url) / "manifest.json"
    path.write_bytes(seal(unseal(path.read_bytes(), "m") | {"version": 2}))
    for act in (lambda: LabelStore.open(store.url), lambda: LabelStore.create(store.url, spec())):
        with pytest.raises(UserError, match="format version 2; this repcon reads version 1"):
            act()


class Quota(LocalFileSystem):
    """A file system that is full after some bytes; shards are written by several threads."""

    left, lock = 0, threading.Lock()

    def write(self, name: str, data: bytes, *require: Any) -> None:
        with Quota.lock:
            Quota.left -= len(data)
        super().write(name, data, *require)


@pytest.mark.parametrize("room", [100, 5_000, 20_000, 22_000])
def test_a_full_disk_stops_with_one_message_and_goes_on_when_there_is_room(tmp_path, monkeypatch, room):
    def fsync(descriptor: int, really=os.fsync) -> None:
        if Quota.left < 0:
            raise OSError(28, "No space left on device")
        really(descriptor)

    create_and_fill(str(tmp_path / "roomy"))
    monkeypatch.setattr("repcon.labels.store.open_filesystem", lambda url: Quota(Path(url)))
    monkeypatch.setattr(os, "fsync", fsync)
    Quota.left = room
    with pytest.raises(UserError, match=r"the disk is full .* make room"):
        create_and_fill(str(tmp_path / "full"))
    Quota.left = 10**9
    create_and_fill(str(tmp_path / "full"))
    assert snapshot(tmp_path / "full") == snapshot(tmp_path / "roomy")


def test_a_really_full_file_system(tmp_path):
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=60k", "none", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this user may not mount a small tmpfs")
    try:
        with pytest.raises(UserError, match="the disk is full"):
            create_and_fill(str(folder / "s"))
        assert all(path.suffix != ".tmp" for path in folder.rglob("*"))
        subprocess.run(["mount", "-o", "remount,size=4m", str(folder)], check=True)
        create_and_fill(str(folder / "s"))
        read_everything(str(folder / "s"))
    finally:
        subprocess.run(["umount", str(folder)], check=True)


class Cut(Exception):
    pass


@pytest.mark.parametrize("change", ["create", "teacher", "crops"])
def test_a_change_cut_short_at_any_write_leaves_a_store_that_reads_and_completes(tmp_path, monkeypatch, change):
    def act(url: str) -> None:
        store = LabelStore.create(url, spec())
        if change == "teacher":
            store.append_teachers([teacher_metadata("third", 10)])
        if change == "crops":
            store.append_crops(8)

    if change != "create":
        create_and_fill(str(tmp_path / "before"))
    act(str(shutil.copytree(tmp_path / "before", tmp_path / "whole") if change != "create" else tmp_path / "whole"))
    honest_write = LocalFileSystem.write
    for cut_at in range(40):
        url = str(tmp_path / f"cut-{cut_at}")
        if change != "create":
            shutil.copytree(tmp_path / "before", url)
        written = []

        def write_or_die(self, name, data, *require, written=written, cut_at=cut_at):
            if len(written) == cut_at:
                raise Cut
            written.append(name)
            honest_write(self, name, data, *require)

        with monkeypatch.context() as patch:
            patch.setattr(LocalFileSystem, "write", write_or_die)
            try:
                act(url)
                break
            except Cut:
                pass
        if change != "create":
            assert np.array_equal(
                LabelStore.open(url).reader.crop_labels(1).flips,
                LabelStore.open(str(tmp_path / "before")).reader.crop_labels(1).flips,
            )
        act(url)
        assert snapshot(Path(url)) == snapshot(tmp_path / "whole")
    assert 5 < cut_at < 39
