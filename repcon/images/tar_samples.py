"""WebDataset samples of a tar: an image and the `.cls` members that may be its label.

Members that share a path without suffix are one sample: `a/v1.2.jpg` and `a/v1.2.cls`. Members with a further part in
their name (`KEY.mask.png`, `KEY.fine.cls`) are fields of the sample KEY. If a key occurs twice, as in concatenated
tars, consecutive members belong together, as WebDataset reads them.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import PurePosixPath
from typing import NamedTuple

from repcon.images.file_names import JPEG_SUFFIXES

SECONDARY = "a further file of its sample"
_SEVERAL = "its sample has several labels"


class Label(NamedTuple):
    """A `.cls` member of a sample."""

    field: str
    """"" for KEY.cls, "fine" for KEY.fine.cls."""
    text: str
    problem: str = ""
    """Why it gives no class, for example because two members of its name differ."""


class TarMember(NamedTuple):
    """A plain file in a tar."""

    name: str
    offset: int
    length: int
    rejection: str
    """Why it is not taken as an image; empty where it may be one."""
    text: str | None = None
    """A label's text; None for other members."""
    problem: str = ""
    """Why the label cannot be used."""


class TarSamples:
    """The samples of one tar."""

    def __init__(self, members: Sequence[TarMember]) -> None:
        self._members = members
        self._runs = [
            run for run, (_, held) in enumerate(groupby(key_of(member.name) for member in members)) for _ in held
        ]
        self._images: dict[str, tuple[int, ...]] = {}
        """Stem of an image -> the runs of consecutive members with such an image."""
        self._keys: set[str] = set()
        self._first: dict[tuple[str, int], int] = {}
        self._labels: dict[str, dict[str, list[tuple[int, Label]]]] = {}
        """Stem -> field -> its labels, each with its run."""
        self._interned: dict[tuple[Label, ...], tuple[Label, ...]] = {}
        self.labelled = any(member.text is not None for member in members)
        self._add_images()
        self._add_labels()
        self._owners: dict[int, str] = {}
        """Image -> the sample whose only image it is, though it has another name."""
        self.ambiguous: dict[str, list[str]] = {}
        """Sample -> its images, where several share a label and none has the sample's name."""
        if self.labelled:
            self._add_owners()

    def _add_images(self) -> None:
        for number, (member, run) in enumerate(zip(self._members, self._runs, strict=True)):
            if member.rejection:
                continue
            stem = stem_of(member.name)
            self._keys.add(key_of(member.name))
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
            owner = stem if stem in self._images else next((s for s in parent_stems(stem) if s in self._images), stem)
            label = Label(stem[len(owner) + 1 :], member.text, member.problem)
            self._labels.setdefault(owner, {}).setdefault(label.field, []).append((run, label))

    def _add_owners(self) -> None:
        images: dict[str, list[int]] = {}
        for number, member in enumerate(self._members):
            stem = stem_of(member.name)
            if not member.rejection and stem not in self._labels:
                owner = next((s for s in parent_stems(stem) if s in self._images or s in self._labels), "")
                if owner and owner not in self._images:
                    images.setdefault(owner, []).append(number)
                elif owner:
                    self._owners[number] = ""
        for owner, numbers in images.items():
            if len(numbers) == 1:
                self._owners[numbers[0]] = owner
            else:
                self.ambiguous[owner] = [self._members[number].name for number in numbers]

    def has_image(self, name: str) -> bool:
        """Whether the file belongs to a sample with an image."""
        return key_of(name) in self._keys

    def is_secondary(self, number: int) -> bool:
        """Whether the image is a further one of its sample, such as a mask, which the label does not describe."""
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
        found = tuple(
            label for held in fields.values() if (label := self._label_of_run(held, stem, self._runs[number]))
        )
        return self._interned.setdefault(found, found)

    def _label_of_run(self, held: list[tuple[int, Label]], stem: str, run: int) -> Label | None:
        """The label of the image in `run`: of its own run, or of runs without such an image."""
        runs = self._images[stem]
        own = {label for place, label in held if place == run or place not in runs}
        if len(own) < 2:
            return next(iter(own), None)
        texts = ", ".join(sorted(ascii(label.text) for label in own))
        return Label(held[0][1].field, "", f"{_SEVERAL}: {texts[:200]}")


def stem_of(name: str) -> str:
    """A member's path without its last suffix."""
    folder, slash, file = name.rpartition("/")
    return folder + slash + (file.rpartition(".")[0] or file)


def parent_stems(stem: str) -> Iterator[str]:
    """Stems of which this one may be a field, longest first: `a/b.c.d` gives `a/b.c` and `a/b`."""
    folder, slash, file = stem.rpartition("/")
    while file := file.rpartition(".")[0]:
        yield folder + slash + file


def key_of(name: str) -> str:
    """A member's WebDataset key: its path up to the file name's first dot."""
    folder, slash, file = name.rpartition("/")
    return folder + slash + file.split(".", 1)[0]


def _is_jpeg(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in JPEG_SUFFIXES
