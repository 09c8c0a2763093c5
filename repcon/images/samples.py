"""Which members of a tar belong to one sample: its image, and the `.cls` members that may be its label.

A sample is what shares a path without suffix: `a/v1.2.jpg` and `a/v1.2.cls`. Members with a further part in their name
(`KEY.mask.png`, `KEY.fine.cls`) are fields of the sample KEY. Where a key is there twice, as in tars that were joined,
members that follow one another belong together, as WebDataset reads them.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import PurePosixPath
from typing import NamedTuple

from repcon.images.names import JPEG_SUFFIXES

FURTHER = "a further file of its sample"
_SEVERAL = "its sample has several labels"


class Label(NamedTuple):
    """A `.cls` member of a sample."""

    field: str
    """"" for KEY.cls, "fine" for KEY.fine.cls."""
    text: str
    fault: str = ""
    """Why no class can be had from it, for example because two members of its name differ."""


class Member(NamedTuple):
    """A plain file in a tar."""

    name: str
    offset: int
    length: int
    refusal: str
    """Why it is no image; empty where it may be one."""
    text: str | None = None
    """A label's text; None for other members."""
    fault: str = ""
    """Why the label cannot be used."""


class Samples:
    """The samples of one tar."""

    def __init__(self, members: Sequence[Member]) -> None:
        self._members = members
        self._runs = [run for run, (_, held) in enumerate(groupby(members, _key_of)) for _ in held]
        self._images: dict[str, tuple[int, ...]] = {}
        """Stem of an image -> the runs of members that have such an image."""
        self._keys: set[str] = set()
        self._first: dict[tuple[str, int], int] = {}
        self._labels: dict[str, dict[str, list[tuple[int, Label]]]] = {}
        """Stem -> field -> its labels, each with its run."""
        self._same: dict[tuple[Label, ...], tuple[Label, ...]] = {}
        self.labelled = any(member.text is not None for member in members)
        self._add_images()
        self._add_labels()
        self._owners: dict[int, str] = {}
        """Image -> the sample of which it is the only image, though it is not named as the sample is."""
        self.crowded: dict[str, list[str]] = {}
        """Sample -> its images, where several share a label and none is named as the sample is."""
        if self.labelled:
            self._add_owners()

    def _add_images(self) -> None:
        for number, (member, run) in enumerate(zip(self._members, self._runs, strict=True)):
            if member.refusal:
                continue
            stem = stem_of(member.name)
            self._keys.add(_key_of(member))
            held = self._images.get(stem, ())
            if run not in held:
                self._images[stem] = (*held, run)
            if self.labelled:
                first = self._first.setdefault((stem, run), number)
                if _is_jpeg(member.name) and not _is_jpeg(self._members[first].name):
                    self._first[stem, run] = number

    def _add_labels(self) -> None:
        for member, run in zip(self._members, self._runs, strict=True):
            if member.text is None:
                continue
            stem = stem_of(member.name)
            owner = stem if stem in self._images else next((s for s in shorter(stem) if s in self._images), stem)
            label = Label(stem[len(owner) + 1 :], member.text, member.fault)
            self._labels.setdefault(owner, {}).setdefault(label.field, []).append((run, label))

    def _add_owners(self) -> None:
        images: dict[str, list[int]] = {}
        for number, member in enumerate(self._members):
            stem = stem_of(member.name)
            if not member.refusal and stem not in self._labels:
                owner = next((s for s in shorter(stem) if s in self._images or s in self._labels), "")
                if owner and owner not in self._images:
                    images.setdefault(owner, []).append(number)
                elif owner:
                    self._owners[number] = ""
        for owner, numbers in images.items():
            if len(numbers) == 1:
                self._owners[numbers[0]] = owner
            else:
                self.crowded[owner] = [self._members[number].name for number in numbers]

    def is_beside(self, name: str) -> bool:
        """Whether the file belongs to a sample that has an image."""
        return key_of(name) in self._keys

    def is_further(self, number: int) -> bool:
        """Whether the image is not the one that its sample's label is about: a mask or another view."""
        name, run = self._members[number].name, self._runs[number]
        if not self.labelled:
            return False
        other = self._first[stem_of(name), run]
        return self._owners.get(number) == "" or self._members[other].name != name

    def labels(self, number: int) -> tuple[Label, ...]:
        """The image's labels, one for each field."""
        stem = stem_of(self._members[number].name)
        owner = self._owners.get(number, stem)
        fields = self._labels.get(owner, {})
        found = tuple(label for held in fields.values() if (label := self._one(held, stem, self._runs[number])))
        return self._same.setdefault(found, found)

    def _one(self, held: list[tuple[int, Label]], stem: str, run: int) -> Label | None:
        """The label of the image in `run`: of its own run, or of runs without such an image."""
        runs = self._images[stem]
        mine = {label for place, label in held if place == run or place not in runs}
        if len(mine) < 2:
            return next(iter(mine), None)
        texts = ", ".join(sorted(ascii(label.text) for label in mine))
        return Label(held[0][1].field, "", f"{_SEVERAL}: {texts[:200]}")


def stem_of(name: str) -> str:
    """A member's path without its last suffix."""
    folder, slash, file = name.rpartition("/")
    return folder + slash + (file.rpartition(".")[0] or file)


def shorter(stem: str) -> Iterator[str]:
    """What the stem may be a field of, from the longest: `a/b.c.d` gives `a/b.c` and `a/b`."""
    folder, slash, file = stem.rpartition("/")
    while file := file.rpartition(".")[0]:
        yield folder + slash + file


def key_of(name: str) -> str:
    """A member's WebDataset key: its path up to the file name's first dot."""
    folder, slash, file = name.rpartition("/")
    return folder + slash + file.split(".", 1)[0]


def _key_of(member: Member) -> str:
    return key_of(member.name)


def _is_jpeg(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in JPEG_SUFFIXES
