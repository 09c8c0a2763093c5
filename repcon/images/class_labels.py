"""Assign classes to the images of a source, from label members, label columns or folders.

Labels are `KEY.cls` members of tars, or a column of Parquet files. Where there are none, the class is the first folder
of the path, after the folders that all images share; tars that share a first folder count as one set. A choice among
several possibilities is reported as a warning; where there is no obvious choice, the source is refused.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import PurePosixPath

from repcon.images.archives import FoundImage, SourceScan
from repcon.images.file_names import display_name
from repcon.runtime.errors import UserError
from repcon.runtime.text import abbreviate

Folders = tuple[str, ...]
"""Folders of a file's path, outermost first."""
_SPLITS = frozenset(
    ("train", "training", "trainval", "val", "valid", "validation", "test", "testing", "dev", "eval", "evaluation")
)
_NUMBER = re.compile(r"[+]?([0-9]+)(?:[.]0*)?")
_WORDNET = re.compile(r"n\d{8}")
"""Names of ImageNet's classes and tars."""


def assign_classes(scan: SourceScan) -> tuple[list[int], tuple[str, ...], tuple[str, ...]]:
    """The class number per image, -1 where it has none; the classes; and warnings about choices and probable mistakes.

    Images with an ambiguous label are moved to `scan.left_out`. Raises UserError where several members may be the label
    or the image of a sample, and where two classes have the same name.
    """
    if scan.ambiguous:
        sample, images = scan.ambiguous[0]
        several = ", ".join(PurePosixPath(display_name(name)).name for name in images[:3])
        raise UserError(
            f"{display_name(sample)}: one label for several images ({several}); pack a tar in which the image to be "
            f"packed is named as the label is, KEY.jpg with KEY.cls ({len(scan.ambiguous):,} such samples)"
        )
    warnings = list(scan.warnings)
    field = _label_field(scan.found, warnings)
    if field is None:
        files = [entry for entry in scan.found if not entry.column]
        held = _by_folders(files)
        warnings += _folder_warnings(files, held) + _sidecar_warnings(scan.sidecars, held)
        by_file = iter(held)
        names = ["" if entry.column else next(by_file) for entry in scan.found]
    else:
        names = _by_members(scan, field, warnings)
    classes, numbers = _classes(names, list(scan.class_order))
    warnings += name_warnings(classes)
    return [numbers.get(name, -1) if name else -1 for name in names], classes, tuple(warnings)


def _label_field(found: Iterable[FoundImage], warnings: list[str]) -> str | None:
    """The samples' field that holds the label, "" for KEY.cls; None where no sample has a label."""
    fields = {label.field for entry in found for label in entry.labels or ()}
    if not fields:
        if any(entry.labels is not None and not entry.column for entry in found):
            warnings.append(
                "nothing is labelled: the .cls members are named as no image is; KEY.cls belongs to KEY.jpg"
            )
            return ""
        return None
    others = sorted(f"KEY.{display_name(field)}.cls" for field in fields if field)
    if "" in fields:
        if others:
            warnings.append(f"labels are KEY.cls; not used: {_abbreviate(others)}")
        return ""
    if len(others) > 1:
        raise UserError(
            f"several members may be the label ({_abbreviate(others)}) and none is KEY.cls; pack a tar in which the "
            "one to be learnt is named KEY.cls"
        )
    warnings.append(f"labels are {others[0]}: there is no KEY.cls")
    return next(iter(fields))


def _by_members(scan: SourceScan, field: str, warnings: list[str]) -> list[str]:
    """Each image's class by the text of its label, "" where it has none; images with ambiguous labels are left out."""
    names: list[str] = []
    kept: list[FoundImage] = []
    without_labels = 0
    for entry in scan.found:
        label = next((label for label in entry.labels or () if label.field == field), None)
        if label is not None and label.problem:
            tar = f"{PurePosixPath(entry.container).name}: " if entry.offset and not entry.column else ""
            scan.left_out.append((tar + entry.name, label.problem))
            continue
        without_labels += entry.labels is None and len(_folders(entry)) > 0
        kept.append(entry)
        names.append(label.text if label else "")
    scan.found[:] = kept
    if without_labels:
        warnings.append(
            f"labels are .cls members or columns; {without_labels:,} images of tars or folders without any are "
            "unlabelled, whatever their folders' names"
        )
    return names


def _by_folders(found: Sequence[FoundImage]) -> list[str]:
    """Each image's class: the first folder below those that all of its set share; "" where it is in none."""
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


def _folders(entry: FoundImage) -> Folders:
    return tuple(entry.name.split("/")[:-1])


def _root(entry: FoundImage) -> str:
    """The tar of an image; "" for all plain files, whose offset is 0, as no tar member's is."""
    return entry.container if entry.offset else ""


def _depths(folders: dict[str, set[Folders]]) -> dict[str, int]:
    """Number of folders above the class folders, for each root.

    Tars that share a first folder are shards of one set. A set whose images are all in one folder is one class, named
    by its first folder, if there are other sets.
    """
    if len(folders) == 1:
        return {root: _shared_depth(paths) for root, paths in folders.items()}
    from scipy.cluster.hierarchy import DisjointSet  # here: slow to import

    joined = DisjointSet()
    names: dict[str, str] = {}
    for root, paths in folders.items():
        firsts = sorted({f"{bool(root):d}/{path[0]}" for path in paths if path}) or [root]
        for first in firsts:
            joined.add(first)
            joined.merge(firsts[0], first)
        names[root] = firsts[0]
    sets: dict[str, set[Folders]] = {}
    for root, paths in folders.items():
        sets.setdefault(joined[names[root]], set()).update(paths)
    depths = {name: 0 if len(sets) > 1 and len(paths) == 1 else _shared_depth(paths) for name, paths in sets.items()}
    return {root: depths[joined[name]] for root, name in names.items()}


def _shared_depth(paths: set[Folders]) -> int:
    """Number of leading folders that all paths share, each followed by another folder."""
    depth = 0
    while all(len(path) > depth + 1 for path in paths) and len({path[depth] for path in paths}) == 1:
        depth += 1
    return depth


def _folder_warnings(found: Sequence[FoundImage], names: Sequence[str]) -> list[str]:
    """Warnings where the folders may not be the intended classes."""
    roots = {_root(entry) for entry in found}
    if not any(names):
        if len(roots - {""}) > 1 and not any(_folders(entry) for entry in found):
            return ["no labels: no folders or .cls in the tars; if each tar is a class, unpack each into a folder"]
        return []
    warnings: list[str] = []
    if "" not in roots and not any(_folders(entry) for entry in found):
        warnings.append(f"each tar is a class, named by it as ImageNet's are: {len(roots):,}")
    below: dict[str, set[str]] = {}
    for entry, name in zip(found, names, strict=True):
        folders = _folders(entry)
        if name and folders:
            place = folders.index(name)
            below.setdefault(name, set()).add("/".join(folders[place + 1 : place + 2]))
    return [*warnings, *_split_warnings(below)]


def _sidecar_warnings(sidecars: Iterable[str], names: Sequence[str]) -> list[str]:
    """A warning where all images have one class or none, and other members may hold labels."""
    if not sidecars or len(set(names)) > 1:
        return []
    members = _abbreviate(sorted(f"KEY.{suffix}" for suffix in sidecars))
    return [f"beside the images are {members}, which are not read for labels; a class is the text of a member KEY.cls"]


def _split_warnings(below: dict[str, set[str]]) -> list[str]:
    """Warnings about splits. below: for each class, its sub-folders with images, "" where it has images itself."""
    classes = _abbreviate([f"{name}/" for name in sorted(below)])
    several = Counter(folder for folders in below.values() for folder in folders if folder)
    shared = [folder for folder, count in several.items() if count > 1]
    splits = [name for name in below if name.lower() in _SPLITS]
    if splits and (len(splits) == len(below) or any(below[name] - {""} for name in splits)):
        return [f"the classes are {classes}, which look like splits; if the folders below are meant, pack each split"]
    nested = not any("" in folders for folders in below.values()) and sum(several.values()) > len(below)
    if several and (nested or len(shared) > 1):
        folders = _abbreviate(sorted(shared or several))
        return [f"the classes are {classes}, with folders below them ({folders}) whose names are no classes"]
    return []


def name_warnings(classes: Sequence[str]) -> list[str]:
    """Warnings about different classes with similar names, and about a class -1."""
    alike: dict[str, list[str]] = {}
    for name in classes:
        alike.setdefault(_normalized(name), []).append(name)
    pairs = [ascii(name) for names in alike.values() if len(names) > 1 for name in names]
    what = "classes whose names differ in nothing but case, spaces, encoding or zeros"
    warnings = [f"{what}: {_abbreviate(pairs)}"] if pairs else []
    if "-1" in classes:
        warnings.append("one class is called -1; an image without a class has no label at all")
    return warnings


def _normalized(name: str) -> str:
    """A name without case, spaces, control characters and leading zeros."""
    parts = (" " if part.isspace() else part for part in unicodedata.normalize("NFKC", name))
    text = " ".join(
        "".join(part for part in parts if unicodedata.category(part) not in ("Cc", "Cf")).split()
    ).casefold()
    number = _NUMBER.fullmatch(text)
    return f"number {number[1].lstrip('0') or '0'}" if number else text


def number_warnings(sources: Iterable[Sequence[str]]) -> list[str]:
    """A warning where the classes of several sources are numbers, and so joined by number."""
    numbered = [set(classes) for classes in sources if classes and all(_NUMBER.fullmatch(name) for name in classes)]
    if len(numbered) > 1 and set.intersection(*numbered):
        return [
            "classes are numbers in several sources: those of one number are taken for one class, whatever it means"
        ]
    return []


def _classes(names: Iterable[str], given: Sequence[str]) -> tuple[tuple[str, ...], dict[str, int]]:
    """Class names and the number of each: in the order of `given` if that holds all of them, else sorted."""
    raw = {name for name in names if name}
    texts: dict[str, str] = {}
    for name in sorted(raw):
        text = display_name(name)
        if text in texts:
            raise UserError(f"two classes would be called {text}: {_raw(texts[text])} and {_raw(name)}; rename one")
        texts[text] = name
    classes = sort_classes(texts)
    if raw <= set(given):
        classes = [display_name(name) for name in given if name in raw]
    return tuple(classes), {texts[text]: number for number, text in enumerate(classes)}


def sort_classes(classes: Iterable[str]) -> list[str]:
    """Sorts class names: by value where every name is a number, as in `.cls` files."""
    names = list(classes)
    numeric = all(name.isascii() and name.isdigit() for name in names)
    return sorted(names, key=_value if numeric else None)


def _value(digits: str) -> tuple[int, str, str]:
    """Sort key by value, without conversion: Python limits the digits of a number."""
    bare = digits.lstrip("0")
    return len(bare), bare, digits


def _raw(name: str) -> str:
    return repr(name.encode("utf-8", "surrogateescape"))


def _abbreviate(names: Sequence[str]) -> str:
    return abbreviate([display_name(name) for name in names])
