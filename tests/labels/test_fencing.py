"""A writer that stands still for longer than its claim lives changes nothing of what its successor has written."""

import contextlib
import os
import uuid

import numpy as np
import pytest
from store_builder import boxes_of, expected, labels_of, spec, teacher_metadata

from repcon.labels.commit import take_over
from repcon.labels.integrity import hierarchy_problems, unit_problems
from repcon.labels.store import LabelStore, LostClaimError, Unit
from repcon.runtime.errors import UserError
from repcon.runtime.filesystem import LocalFileSystem, UrlFileSystem, open_filesystem


class Claim:
    """A claim that goes from its first holder to the second."""

    def __init__(self, holders: list[str], name: str, inherited: bool) -> None:
        self._holders, self._name, self.inherited = holders, name, inherited

    def is_held(self) -> bool:
        return self._holders[-1] == self._name


@pytest.fixture(params=["disk", "url"])
def url(request, tmp_path) -> str:
    return str(tmp_path / "labels.zarr") if request.param == "disk" else f"memory://fencing-{uuid.uuid4().hex}"


def small(url: str) -> LabelStore:
    return LabelStore.create(url, spec(images=6, crops=1, rows_per_shard=6, teachers=(teacher_metadata("wide", 30),)))


def other_labels(store: LabelStore, unit: Unit) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """What another processor's arithmetic might give: other bytes, of the same lengths."""
    return {name: (ids, logp + np.float16(2**-9) * (logp < -1)) for name, (ids, logp) in labels_of(store, unit).items()}


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("left_by_successor", ["all", "nothing", "shards without a record"])
def test_wherever_it_stops_the_store_is_its_successors_or_unfinished(url, monkeypatch, after, left_by_successor):
    kind = UrlFileSystem if "://" in url else LocalFileSystem
    plain = kind.write
    for stop in range(5):  # boxes, flips, ids, values, completion record
        place = f"{url}-{stop}"
        store, successor = small(place), small(place)
        (unit,) = store.units()
        holders, written = ["first"], []

        def take_over(successor=successor, unit=unit, holders=holders):
            holders.append("second")
            if left_by_successor == "nothing":
                return
            claim = Claim(holders, "second", inherited=True)
            with monkeypatch.context() as patch:
                patch.setattr(kind, "write", plain)
                if left_by_successor != "all":
                    patch.setattr(type(successor.completion), "put", lambda *given: 1 / 0)
                with contextlib.suppress(ZeroDivisionError):
                    successor.writer.write(unit, *boxes_of(unit), other_labels(successor, unit), claim=claim)

        def write(self, name, data, stop=stop, written=written, take_over=take_over):
            now = len(written) == stop
            written.append(name)
            if now and not after:
                take_over()
            plain(self, name, data)
            if now and after:
                take_over()

        monkeypatch.setattr(kind, "write", write)
        with pytest.raises(LostClaimError):
            store.writer.write(
                unit, *boxes_of(unit), labels_of(store, unit), claim=Claim(holders, "first", inherited=False)
            )
        monkeypatch.setattr(kind, "write", plain)
        assert len(written) == stop + 1
        now = LabelStore.open(place)
        if now.completion.is_done(unit):
            assert unit_problems(now, unit) == []
            wanted = other_labels(store, unit) if left_by_successor == "all" else labels_of(store, unit)
            np.testing.assert_array_equal(now.reader.crop_labels(0).labels["wide"][1], wanted["wide"][1][0])
        elif left_by_successor == "all":
            assert not after  # its file lay over the successor's for a moment, and was taken back
        successor.writer.write(
            unit, *boxes_of(unit), labels_of(store, unit), claim=Claim(holders, "second", inherited=True)
        )
        now = LabelStore.open(place)
        assert now.completion.is_done(unit) and unit_problems(now, unit) == []
        np.testing.assert_array_equal(now.reader.crop_labels(0).labels["wide"][1], expected(store, 0, "wide")[1])


def test_a_stopped_writers_late_file_is_found_by_its_successor(url, monkeypatch):
    """The successor's shards are read back: what the first put over one of them in between is written again."""
    store, successor = small(url), small(url)
    (unit,) = store.units()
    kind = UrlFileSystem if "://" in url else LocalFileSystem
    plain, late = kind.write, []

    def write(self, name, data):
        plain(self, name, data)
        if name.startswith("done/") and not late:
            late.append(name)
            with monkeypatch.context() as patch:
                patch.setattr(kind, "write", plain)
                store.files.write("heads/wide/logp/c/0/0/0", b"x" * store.files.size("heads/wide/logp/c/0/0/0"))

    monkeypatch.setattr(kind, "write", write)
    successor.writer.write(
        unit, *boxes_of(unit), labels_of(store, unit), claim=Claim(["second"], "second", inherited=True)
    )
    assert late and unit_problems(LabelStore.open(url), unit) == []


def test_a_change_of_the_store_stops_where_another_took_it_over(url, monkeypatch):
    whole = small(f"{url}-whole")
    whole.append_teachers([teacher_metadata("third", 10)])
    for allowed in range(30):
        place = f"{url}-{allowed}"
        store, answers = small(place), [True] * allowed + [False] * 99
        before = LabelStore.open(place).manifest
        try:
            store.append_teachers([teacher_metadata("third", 10)], lambda answers=answers: answers.pop(0))
            break
        except UserError as error:
            assert "another process took over the change" in str(error)
        assert len(LabelStore.open(place).heads) in (1, 2)
        now = small(place)  # which completes it
        assert now.manifest in (before, whole.manifest)
    assert 3 < allowed < 29


def test_a_stopped_change_cannot_be_put_over_its_successors(tmp_path, monkeypatch):
    """A process stands still in the instant before each of its renames, after it was seen to have its claim."""
    plain = os.replace
    for stop in range(30):
        place, holders, renames = f"{tmp_path}/{stop}.zarr", ["first"], []
        store = small(place)

        def replace(source, target, place=place, holders=holders, renames=renames, stop=stop):
            renames.append(target)
            if len(renames) == stop + 1:
                holders.append("second")
                with monkeypatch.context() as patch:
                    patch.setattr(os, "replace", plain)
                    take_over(open_filesystem(place))
                    successor = small(place)
                    successor.append_teachers([teacher_metadata("third", 10), teacher_metadata("fourth", 12)])
            plain(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", replace)
            claim = Claim(holders, "first", inherited=False)
            try:
                store.append_teachers([teacher_metadata("third", 10)], claim.is_held)
            except UserError as error:
                assert "another process took over the change" in str(error)
            else:
                break
        now = LabelStore.open(place)
        assert set(now.heads) == {"wide", "third", "fourth"} and hierarchy_problems(now) == []
        assert not list((tmp_path / f"{stop}.zarr").rglob("*.tmp"))
    assert 3 < stop < 29
