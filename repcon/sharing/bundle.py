"""What is shared: the files of a student, a teacher or a label store, and how they are known to be the same ones."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from repcon.labels.manifest import COMPLETION_RECORDS, MANIFEST
from repcon.labels.store import LabelStore
from repcon.models.factory import create_model
from repcon.models.identity import weight_hash
from repcon.models.saved_model import CONFIG, WEIGHTS, model_folder
from repcon.models.student import HEADS, HEADS_INDEX, is_student, load_student
from repcon.runtime.errors import UserError
from repcon.runtime.filesystem import is_safe_name
from repcon.runtime.untrusted import UnreadableError, parse_json, read_text
from repcon.sharing.address import Address

Kind = Literal["student", "teacher", "store"]
ABOUT, CARD = "repcon.json", "README.md"
"""What was pushed and its fingerprint; and the card that the hub shows."""
FILES: dict[Kind, tuple[str, ...]] = {
    "teacher": (CARD, CONFIG, WEIGHTS),
    "student": (CARD, CONFIG, WEIGHTS, HEADS, HEADS_INDEX),
    "store": (CARD, MANIFEST, "zarr.json", "crops/*", "heads/*", f"{COMPLETION_RECORDS}/*"),
}
"""Patterns of the only files that are pushed and pulled; none of them is code."""
WHAT: dict[Kind, str] = {"student": "a student", "teacher": "a teacher", "store": "a label store"}


@dataclass(frozen=True, slots=True)
class Bundle:
    """A folder with what is to be shared."""

    kind: Kind
    folder: Path

    @property
    def about(self) -> dict[str, str]:
        """What ABOUT holds."""
        return {"kind": self.kind, "fingerprint": fingerprint_of(self.kind, self.folder)}

    def files(self) -> Iterable[Path]:
        """The files to share, without the card. Raises UserError for a model whose weights are no safetensors."""
        for pattern in FILES[self.kind][1:]:
            found = [path for path in sorted(self.folder.glob(pattern.replace("/*", "/**/*"))) if path.is_file()]
            if "*" not in pattern and not found:
                raise UserError(f"{self.folder}: holds no {pattern}, without which it cannot be shared; save it again")
            yield from (path for path in found if is_safe_name(path.relative_to(self.folder).as_posix()))


def find_bundle(source: str) -> Bundle:
    """The store, student or teacher in a folder, or in the output folder of the run that made it.

    Raises UserError for anything else.
    """
    if "://" in source:
        raise UserError(f"{source}: is not in a local folder; copy it to one first, then push that")
    if (Path(source) / MANIFEST).is_file():
        return Bundle("store", Path(source))
    folder = model_folder(Path(source))
    if (folder / CONFIG).is_file():
        return Bundle("student" if is_student(source) else "teacher", folder)
    raise UserError(f"{source}: holds no label store, student or teacher; name the folder of one")


def require_place(kind: Kind, address: Address) -> None:
    """Raises UserError where models are to lie among the datasets, or a store among the models."""
    wanted = "dataset" if kind == "store" else "model"
    if address.repo_type != wanted:
        right = Address(wanted, address.repo, address.path)
        raise UserError(f"{address}: {WHAT[kind]} belongs in a {wanted} repository; write {right}")


def fingerprint_of(kind: Kind, folder: Path) -> str:
    """A store's fingerprint, or the hash of a model's weights, heads included, after all have been read."""
    if kind == "store":
        return LabelStore.open(str(folder)).fingerprint
    model = load_student(folder) if kind == "student" else create_model(str(folder))
    return weight_hash(model)


def read_about(path: Path, address: Address) -> tuple[Kind, str]:
    """Kind and fingerprint that ABOUT names. Raises UserError where it cannot be read."""
    try:
        about: Any = parse_json(read_text(path))
    except UnreadableError as error:
        raise UserError(f"{address}: its {ABOUT} cannot be read ({error}); push it again") from error
    known = isinstance(about, Mapping) and about.get("kind") in get_args(Kind)
    if not known or not isinstance(about.get("fingerprint"), str):
        raise UserError(f"{address}: its {ABOUT} names no kind that this repcon knows; pull it with a newer one")
    return about["kind"], about["fingerprint"]
