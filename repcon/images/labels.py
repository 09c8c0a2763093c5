"""The classes of a source's images: which member of a sample is its label, or which folder, and what that may hide.

Labels are `KEY.cls` members of tars, or a column of Parquet files. Where there are none, the class is the first folder
of the path (after a folder that holds everything; tars with a first folder in common count as one). What is chosen
among several possibilities is said; what nobody can choose is refused.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from repcon.images.archives import Found, Scan
from repcon.images.names import readable
from repcon.runtime.errors import UserError

Folders = tuple[str, ...]
"""The folders of a file's path, from the outermost."""
_SPLITS = frozenset(
    ("train", "training", "trainval", "val", "valid", "validation", "test", "testing", "dev", "eval", "evaluation")
)
_NUMBER = re.compile(r"[+]?([0-9]+)(?:[.]0*)?")
_WORDNET = re.compile(r"n\d{8}")
"""ImageNet's names of its classes, and so of its tars."""


@dataclass(frozen=True, slots=True)
class ImageLabels:
    """What the images of a scan are labelled with."""

    numbers: list[int]
    """Per image: its class's, -1 where it has none."""
    classes: tuple[str, ...]
    cautions: tuple[str, ...]
    """One line each: what was decided, and what looks like a mistake."""


def resolve(scan: Scan) -> ImageLabels:
    """Labels what was found; images whose label is unclear go to `scan.left_out`.

    Raises UserError where several members may be the label or the image of a sample, and where two classes have one
    name.
    """
    _refuse_crowded(scan.crowded)
    cautions = list(scan.cautions)
    field = _field(scan.found, cautions)
    if field is None:
        files = [entry for entry in scan.found if not entry.column]
        held = _by_folders(files)
        cautions += _about_folders(files, held) + _about_sidecars(scan.sidecars, held)
        by_file = iter(held)
        names = ["" if entry.column else next(by_file) for entry in scan.found]
    else:
        names = _by_members(scan, field, cautions)
    classes, numbers = _classes(names, list(scan.class_order))
    cautions += about_names(classes)
    return ImageLabels([numbers.get(name, -1) if name else -1 for name in names], classes, tuple(cautions))


def _refuse_crowded(crowded: Sequence[tuple[str, list[str]]]) -> None:
    if crowded:
        sample, images = crowded[0]
        several = ", ".join(PurePosixPath(readable(name)).name for name in images[:3])
        raise UserError(
            f"{readable(sample)}: one label for several images ({several}); pack a tar in which the image to be packed "
            f"is named as the label is, KEY.jpg beside KEY.cls ({len(crowded):,} such samples)"
        )


def _field(found: Iterable[Found], cautions: list[str]) -> str | None:
    """Which field of the samples is the label, "" for KEY.cls; None where none has a label."""
    fields = {label.field for entry in found for label in entry.labels or ()}
    if not fields:
        if any(entry.labels is not None and not entry.column for entry in found):
            cautions.append(
                "nothing is labelled: the .cls members are named as no image is; KEY.cls belongs to KEY.jpg"
            )
            return ""
        return None
    others = sorted(f"KEY.{readable(field)}.cls" for field in fields if field)
    if "" in fields:
        if others:
            cautions.append(f"labels are KEY.cls; not used: {_few(others)}")
        return ""
    if len(others) > 1:
        raise UserError(
            f"several members may be the label ({_few(others)}) and none is KEY.cls; pack a tar in which the one to be "
            "learnt is named KEY.cls"
        )
    cautions.append(f"labels are {others[0]}: there is no KEY.cls")
    return next(iter(fields))


def _by_members(scan: Scan, field: str, cautions: list[str]) -> list[str]:
    """Each image's class as its label's text, "" where it has none; images with unclear labels are left out."""
    names: list[str] = []
    kept: list[Found] = []
    foldered = 0
    for entry in scan.found:
        label = next((label for label in entry.labels or () if label.field == field), None)
        if label is not None and label.fault:
            tar = f"{PurePosixPath(entry.container).name}: " if entry.offset and not entry.column else ""
            scan.left_out.append((tar + entry.name, label.fault))
            continue
        foldered += entry.labels is None and len(_folders(entry)) > 0
        kept.append(entry)
        names.append(label.text if label else "")
    scan.found[:] = kept
    if foldered:
        cautions.append(
            f"labels are .cls members or columns; {foldered:,} images of tars or folders without any are unlabelled, "
            "whatever their folders' names"
        )
    return names


def _by_folders(found: Sequence[Found]) -> list[str]:
    """Each file's class: its first folder below those that all of its set share; "" where it is in none."""
    folders: dict[str, set[Folders]] = {}
    for entry in found:
        folders.setdefault(_root(entry), set()).add(_folders(entry))
    if not any(any(paths) for paths in folders.values()) and all(_WORDNET.fullmatch(_tar(root)) for root in folders):
        return [_tar(_root(entry)) for entry in found]
    depths = _depths(folders)
    names: list[str] = []
    for entry in found:
        parts, depth = _folders(entry), depths[_root(entry)]
        names.append(parts[depth] if len(parts) > depth else "")
    return names


def _tar(root: str) -> str:
    return PurePosixPath(root).stem


def _folders(entry: Found) -> Folders:
    return tuple(entry.name.split("/")[:-1])


def _root(entry: Found) -> str:
    """Plain files (which start at 0, as no member of a tar does) have one root together, each tar has its own."""
    return entry.container if entry.offset else ""


def _depths(folders: dict[str, set[Folders]]) -> dict[str, int]:
    """How many folders stand above the classes, for each root.

    Tars that have a first folder in common are shards of one set. Of several sets, one whose images all lie in a
    single folder is a class by itself, named by its first folder.
    """
    joined: dict[str, str] = {}  # a first folder -> another one of its set, or itself

    def name_of(first: str) -> str:
        while joined[first] != first:
            joined[first] = joined[joined[first]]
            first = joined[first]
        return first

    names: dict[str, str] = {}
    for root, paths in folders.items():
        firsts = sorted({f"{bool(root):d}/{path[0]}" for path in paths if path}) or [root]
        for first in firsts:
            joined.setdefault(first, first)
            joined[name_of(first)] = name_of(firsts[0])
        names[root] = firsts[0]
    sets: dict[str, set[Folders]] = {}
    for root, paths in folders.items():
        sets.setdefault(name_of(names[root]), set()).update(paths)
    depths = {name: 0 if len(sets) > 1 and len(paths) == 1 else _shared_depth(paths) for name, paths in sets.items()}
    return {root: depths[name_of(name)] for root, name in names.items()}


def _shared_depth(paths: set[Folders]) -> int:
    """How many folders all paths share above a further folder."""
    depth = 0
    while all(len(path) > depth + 1 for path in paths) and len({path[depth] for path in paths}) == 1:
        depth += 1
    return depth


def _about_folders(found: Sequence[Found], names: Sequence[str]) -> list[str]:
    """What looks as if folders were not the classes that were meant."""
    roots = {_root(entry) for entry in found}
    if not any(names):
        if len(roots - {""}) > 1 and not any(_folders(entry) for entry in found):
            return ["no labels: no folders or .cls in the tars; if each tar is a class, unpack each into a folder"]
        return []
    cautions: list[str] = []
    if "" not in roots and not any(_folders(entry) for entry in found):
        cautions.append(f"each tar is a class, named by it as ImageNet's are: {len(roots):,}")
    below: dict[str, set[str]] = {}
    for entry, name in zip(found, names, strict=True):
        folders = _folders(entry)
        if name and folders:
            place = folders.index(name)
            below.setdefault(name, set()).add("/".join(folders[place + 1 : place + 2]))
    return [*cautions, *_about_splits(below)]


def _about_sidecars(sidecars: Iterable[str], names: Sequence[str]) -> list[str]:
    """Where nothing tells the images' classes apart, what lies beside them may."""
    if not sidecars or len(set(names)) > 1:
        return []
    few = _few(sorted(f"KEY.{suffix}" for suffix in sidecars))
    return [f"beside the images are {few}, which are not read for labels; a class is the text of a member KEY.cls"]


def _about_splits(below: dict[str, set[str]]) -> list[str]:
    """below: for each class the folders directly in its folder that hold images, "" where it holds some itself."""
    classes = _few([f"{name}/" for name in sorted(below)])
    several = Counter(folder for folders in below.values() for folder in folders if folder)
    shared = [folder for folder, count in several.items() if count > 1]
    splits = [name for name in below if name.lower() in _SPLITS]
    if splits and (len(splits) == len(below) or any(below[name] - {""} for name in splits)):
        return [f"the classes are {classes}, which look like splits; if the folders below are meant, pack each split"]
    nested = not any("" in folders for folders in below.values()) and sum(several.values()) > len(below)
    if several and (nested or len(shared) > 1):
        folders = _few(sorted(shared or several))
        return [f"the classes are {classes}, with folders below them ({folders}) whose names are no classes"]
    return []


def about_names(classes: Sequence[str]) -> list[str]:
    """Classes that look alike and are none the less several, and a class that looks like the want of one."""
    alike: dict[str, list[str]] = {}
    for name in classes:
        alike.setdefault(_bare(name), []).append(name)
    pairs = [ascii(name) for names in alike.values() if len(names) > 1 for name in names]
    what = "classes whose names differ in nothing but case, spaces, encoding or zeros"
    found = [f"{what}: {_few(pairs)}"] if pairs else []
    if "-1" in classes:
        found.append("one class is called -1; an image without a class has no label at all")
    return found


def _bare(name: str) -> str:
    """A name without what two spellings of it may differ in."""
    parts = (" " if part.isspace() else part for part in unicodedata.normalize("NFKC", name))
    text = " ".join(
        "".join(part for part in parts if unicodedata.category(part) not in ("Cc", "Cf")).split()
    ).casefold()
    number = _NUMBER.fullmatch(text)
    return f"number {number[1].lstrip('0') or '0'}" if number else text


def about_numbers(sources: Iterable[Sequence[str]]) -> list[str]:
    """What looks like a mistake where the classes of several sources are joined by their names."""
    numbered = [set(classes) for classes in sources if classes and all(_NUMBER.fullmatch(name) for name in classes)]
    if len(numbered) > 1 and set.intersection(*numbered):
        return [
            "classes are numbers in several sources: those of one number are taken for one class, whatever it means"
        ]
    return []


def _classes(names: Iterable[str], given: Sequence[str]) -> tuple[tuple[str, ...], dict[str, int]]:
    """The classes' names and each one's number: in the order of `given` where all are in it, else sorted."""
    raw = {name for name in names if name}
    texts: dict[str, str] = {}
    for name in sorted(raw):
        text = readable(name)
        if text in texts:
            raise UserError(f"two classes would be called {text}: {_raw(texts[text])} and {_raw(name)}; rename one")
        texts[text] = name
    classes = ordered(texts)
    if raw <= set(given):
        classes = [readable(name) for name in given if name in raw]
    return tuple(classes), {texts[text]: number for number, text in enumerate(classes)}


def ordered(classes: Iterable[str]) -> list[str]:
    """Sorted; by value where every name is a number, as in `.cls` files."""
    names = list(classes)
    numeric = all(name.isascii() and name.isdigit() for name in names)
    return sorted(names, key=_value if numeric else None)


def _value(digits: str) -> tuple[int, str, str]:
    """Sorts digits by value without making a number of them, of which Python makes none from too many."""
    bare = digits.lstrip("0")
    return len(bare), bare, digits


def _raw(name: str) -> str:
    return repr(name.encode("utf-8", "surrogateescape"))


def _few(names: Sequence[str]) -> str:
    """The first three, as text."""
    return ", ".join(readable(name) for name in names[:3]) + (", …" if len(names) > 3 else "")
