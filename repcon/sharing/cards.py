"""The card of what is shared: README.md with the front matter that the hub reads."""

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path

from repcon.labels.store import LabelStore
from repcon.models.factory import create_model, stated_license
from repcon.models.identity import architecture_of, class_names_of
from repcon.models.model_card import escape_markdown, teacher_table
from repcon.models.preprocessing import preprocessing_of
from repcon.models.student import head_names, teacher_licences
from repcon.sharing.address import Address
from repcon.sharing.bundle import CARD, Bundle

LICENCES = (
    "apache-2.0", "mit", "bsd-3-clause", "gpl-3.0", "lgpl-3.0", "mpl-2.0", "cc0-1.0", "cc-by-3.0", "cc-by-4.0",
    "cc-by-sa-3.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "cc-by-nc-nd-4.0",
)  # fmt: skip
"""Names that the hub knows; any other is given as `other`."""


def card_text(bundle: Bundle, address: Address, fingerprint: str) -> str:
    """README.md of a store, a teacher or a student; a student's own model card is taken over."""
    make = {"store": _store, "teacher": _teacher, "student": _student}[bundle.kind]
    return make(bundle.folder, address, fingerprint)


def front_matter(licences: Iterable[str], tags: Iterable[str], **values: str | bool) -> str:
    """YAML between `---`. One licence that is stated of all, and that the hub knows, is the repository's."""
    stated = sorted({licence or "not stated" for licence in licences} or {"not stated"})
    only = stated[0].lower() if len(stated) == 1 else ""
    facts: dict[str, str | bool] = {"license": only if only in LICENCES else "other"}
    if facts["license"] == "other":
        facts["license_name"] = "; ".join(stated)
    lines = [f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in {**facts, **values}.items()]
    return "\n".join(["---", *lines, "tags:", *(f"- {tag}" for tag in ("repcon", *tags)), "---"])


def _store(folder: Path, address: Address, fingerprint: str) -> str:
    store = LabelStore.open(str(folder))
    manifest, teacher_metadata = store.manifest, [head.metadata for head in store.heads.values()]
    size = sum(store.completion.shard_bytes(store.units()).values())
    crops = store.images * store.crops
    recipe = ", ".join(f"{name} {value}" for name, value in manifest.crop_recipe.items())
    facts = {
        "Images": f"{store.images:,}, {len(store.completion.missing_rows()):,} of them without labels",
        "Image pack, fingerprint": manifest.pack_fingerprint,
        "Crops per image": f"{store.crops} ({recipe})",
        "Encoding": f"top {manifest.k} classes, values as {manifest.values}, {manifest.codec}",
        "Temperatures of the tails": ", ".join(f"{value:g}" for value in manifest.temperatures),
        "Size": f"{size:,} bytes, {size / max(crops, 1):.1f} per crop",
        "Fingerprint": fingerprint,
    }
    about = (
        "The stored answers of the teachers below about planned crops of images, for distilling students with repcon."
    )
    heads = {name: head.classes for name, head in store.heads.items()}
    return _joined(
        front_matter(
            [metadata.licence for metadata in teacher_metadata], ["label-store", "knowledge-distillation"], viewer=False
        ),
        f"# {escape_markdown(folder.name)}",
        about + " The images are not part of it.",
        "\n".join(f"- {name}: {escape_markdown(value)}" for name, value in facts.items()),
        teacher_table(heads, [dataclasses.asdict(metadata) for metadata in teacher_metadata], "The labels'"),
        _pulled(address, "labels.zarr", "repcon train --pack PACK --store labels.zarr --out student"),
    )


def _teacher(folder: Path, address: Address, fingerprint: str) -> str:
    network = create_model(str(folder))
    licence = stated_license(network, str(folder))
    classes = class_names_of(network)
    facts = {
        "Architecture": architecture_of(network),
        "Classes": f"{getattr(network, 'num_classes', 0):,}" + (f": {', '.join(classes[:20])}" if classes else ""),
        "Input": f"{preprocessing_of(network).size} pixels",
        "Licence": licence or "not stated",
        "Fingerprint of the weights": fingerprint,
    }
    return _joined(
        front_matter([licence], ["image-classification"], library_name="timm"),
        f"# {escape_markdown(folder.name)}",
        "A classifier, made or used as a teacher with repcon.",
        "\n".join(f"- {name}: {escape_markdown(value)}" for name, value in facts.items()),
        _pulled(address, "teacher", "repcon precompute --pack PACK --teachers NAME=teacher --out labels.zarr"),
        _with_timm(address),
    )


def _student(folder: Path, address: Address, fingerprint: str) -> str:
    card = folder / CARD
    text = card.read_text(encoding="utf-8") if card.is_file() else f"# {escape_markdown(folder.name)}\n"
    licences = teacher_licences(str(folder))
    heads = head_names(str(folder))
    return _joined(
        front_matter([licences.get(head, "") for head in heads], ["image-feature-extraction"], library_name="timm"),
        text.strip(),
        f"## From the hub\n\n- Fingerprint of the weights: {fingerprint}",
        _pulled(address, "student", "repcon evaluate --backbones student=student --data LABELLED --out transfer"),
        _with_timm(address),
    )


def _pulled(address: Address, out: str, then: str) -> str:
    return f"```sh\nrepcon pull {address} --out {out}\n{then}\n```"


def _with_timm(address: Address) -> str:
    """timm opens a repository's root only."""
    if address.path:
        return ""
    return f"In timm: `timm.create_model({json.dumps(f'hf-hub:{address.repo}')}, pretrained=True)`."


def _joined(*sections: str) -> str:
    return "\n\n".join(section for section in sections if section) + "\n"
