"""A store's life against a plain dictionary: it is made, grown, filled, killed, stalled, damaged, mended and read."""

import contextlib
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from store_builder import boxes_of, labels_of, spec, teacher_metadata

from repcon.commands import verify
from repcon.config import VerifyConfig
from repcon.labels.integrity import unit_problems
from repcon.labels.store import LabelStore, LostClaimError, Unit
from repcon.runtime.errors import UserError
from repcon.runtime.filesystem import LocalFileSystem


class Killed(Exception):
    """The process ends between two files."""


class Claim:
    """Held for so many looks, then lost for good."""

    def __init__(self, looks: float = float("inf"), inherited: bool = False) -> None:
        self._looks, self.inherited = looks, inherited

    def is_held(self) -> bool:
        self._looks -= 1
        return self._looks >= 0


def foreign_labels(store: LabelStore, unit: Unit) -> dict[str, Any]:
    """What another processor's arithmetic gives."""
    return {name: (ids, logp - np.float16(0.01)) for name, (ids, logp) in labels_of(store, unit).items()}


class Life(RuleBasedStateMachine):
    """`done` and `damaged` name units; `crops` and `heads` say what the store is to hold."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.url = str(self.folder / "labels.zarr")

    def teardown(self) -> None:
        shutil.rmtree(self.folder)

    def _spec(self) -> Any:
        teachers = (teacher_metadata("wide", 12), teacher_metadata("small", 3))
        return spec(images=10, crops=2, k=4, rows_per_shard=6, teachers=teachers)

    @contextlib.contextmanager
    def _killed_after(self, files: int) -> Any:
        plain, left = LocalFileSystem.write, [files]

        def write(this: LocalFileSystem, name: str, data: bytes, *require: Any) -> None:
            if not left[0]:
                raise Killed
            left[0] -= 1
            plain(this, name, data, *require)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(LocalFileSystem, "write", write)
            with contextlib.suppress(Killed):
                yield

    @initialize(files=st.integers(0, 14))
    def create(self, files: int) -> None:
        self.done: set[str] = set()
        self.damaged: set[str] = set()
        self.heads, self.crops = ["wide", "small"], 2
        with self._killed_after(files):
            LabelStore.create(self.url, self._spec())
        LabelStore.create(self.url, self._spec())

    @property
    def store(self) -> LabelStore:
        return LabelStore.open(self.url)

    def _unit(self, number: int) -> Unit:
        units = self.store.units()
        return units[number % len(units)]

    def _write(self, unit: Unit, labels: dict[str, Any], claim: Claim) -> None:
        self.store.writer.write(unit, *boxes_of(unit), labels, claim=claim)

    @rule(number=st.integers(0, 99))
    def label(self, number: int) -> None:
        """A run finishes a unit that is not finished."""
        unit = self._unit(number)
        if not self.store.completion.is_done(unit):
            self._write(unit, labels_of(self.store, unit), Claim())
            self.done.add(unit.name)

    @rule(number=st.integers(0, 99), files=st.integers(0, 7))
    def kill(self, number: int, files: int) -> None:
        unit = self._unit(number)
        if self.store.completion.is_done(unit):
            return
        with self._killed_after(files):
            self._write(unit, labels_of(self.store, unit), Claim())
            self.done.add(unit.name)

    @rule(number=st.integers(0, 99), looks=st.integers(0, 13))
    def stall(self, number: int, looks: int) -> None:
        """A writer whose claim is lost after so many looks at it, and its successor, which labels otherwise."""
        unit = self._unit(number)
        if self.store.completion.is_done(unit):
            return
        try:
            self._write(unit, foreign_labels(self.store, unit), Claim(looks))
        except LostClaimError:
            assert not self.store.completion.is_done(unit) or unit_problems(self.store, unit) == []
            self._write(unit, labels_of(self.store, unit), Claim(inherited=True))
        else:
            (Path(self.url) / f"done/{unit.name}.json").unlink()
            self._write(unit, labels_of(self.store, unit), Claim())
        self.done.add(unit.name)

    @precondition(lambda self: len(self.heads) < 4)
    @rule(files=st.integers(0, 20))
    def append_teacher(self, files: int) -> None:
        new = teacher_metadata(f"more{len(self.heads)}", 7)
        with self._killed_after(files):
            self.store.append_teachers([new])
        LabelStore.create(self.url, self._spec()).append_teachers([new])
        self.heads.append(new.name)

    @precondition(lambda self: self.crops < 6)
    @rule(files=st.integers(0, 20))
    def append_crops(self, files: int) -> None:
        self.crops += 2
        with self._killed_after(files):
            self.store.append_crops(self.crops)
        LabelStore.create(self.url, self._spec()).append_crops(self.crops)

    @precondition(lambda self: self.done - self.damaged)
    @rule(data=st.data(), kind=st.sampled_from(["flip", "cut", "delete", "swap record"]))
    def damage(self, data: st.DataObject, kind: str) -> None:
        name = data.draw(st.sampled_from(sorted(self.done - self.damaged)))
        unit = next(unit for unit in self.store.units() if unit.name == name)
        record = Path(self.url) / f"done/{name}.json"
        shard = Path(self.url) / f"heads/{unit.heads[0]}/ids/c/{unit.crops.start // 2}/{unit.rows.start // 6}/0"
        content = shard.read_bytes()
        if kind == "flip":
            place = data.draw(st.integers(0, len(content) - 1))
            shard.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
            self.damaged.add(name)  # the length is right: the run does not look at it, readers and `verify` do
        elif kind == "cut":
            shard.write_bytes(content[:-1])
            self.done.discard(name)
        elif kind == "delete":
            shard.unlink()
            self.done.discard(name)
        else:
            record.write_bytes(record.read_bytes()[:-3])
            self.done.discard(name)

    @precondition(lambda self: self.damaged)
    @rule(data=st.data())
    def mend(self, data: st.DataObject) -> None:
        """As the message says: delete the record in done/ and run again."""
        name = data.draw(st.sampled_from(sorted(self.damaged)))
        (Path(self.url) / f"done/{name}.json").unlink()
        self.damaged.discard(name)
        self.done.discard(name)

    @rule()
    def finish(self) -> None:
        """A run to the end, and `verify`."""
        store = LabelStore.create(self.url, self._spec())
        for unit in store.completion.unfinished():
            store.writer.write(unit, *boxes_of(unit), labels_of(store, unit))
            self.done.add(unit.name)
        try:
            verify.run(VerifyConfig(store=self.url))
            assert not self.damaged
        except UserError as error:
            assert self.damaged, error

    @invariant()
    def the_store_says_what_the_dictionary_says(self) -> None:
        store = self.store
        assert list(store.heads) == self.heads and store.crops == self.crops
        assert {unit.name for unit in store.units() if store.completion.is_done(unit)} == self.done
        for unit in store.units():
            whole = unit.name in self.done - self.damaged
            assert (unit_problems(store, unit) == []) == whole
            if whole:
                self._compare(store, unit)

    def _compare(self, store: LabelStore, unit: Unit) -> None:
        wanted = labels_of(store, unit)
        for place, crop in enumerate(unit.crops):
            with contextlib.suppress(UserError):  # a teacher's crop whose boxes were damaged
                crop_labels = store.reader.read_rows(crop, unit.rows, unit.heads)
                for name in unit.heads:
                    np.testing.assert_array_equal(crop_labels.labels[name][0], wanted[name][0][place])
                    np.testing.assert_array_equal(crop_labels.labels[name][1], wanted[name][1][place])


Life.TestCase.settings = settings(max_examples=25, stateful_step_count=14, deadline=None, derandomize=True)
TestLife = Life.TestCase
