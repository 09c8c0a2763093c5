"""The model card: what a student was made of, in Markdown."""

from collections.abc import Mapping
from typing import Any

from repcon.backbones import Preprocessing


def model_card(heads: Mapping[str, int], preprocessing: Preprocessing, card: Mapping[str, Any]) -> str:
    """`card` may hold: name, trunk, store (fingerprint), pack (fingerprint), images, epochs, teachers (mappings with
    name, architecture, weight_hash, licence, precision), metrics (figure by head by name), versions, recipe (TOML)."""
    sections = [
        _head(card),
        _teachers(heads, card),
        _metrics(card),
        _use(preprocessing, card),
        _recipe(card),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _head(card: Mapping[str, Any]) -> str:
    facts = [
        ("Trunk", card.get("trunk")),
        ("Label store", card.get("store")),
        ("Images", card.get("pack")),
        ("Training images", card.get("images")),
        ("Epochs", card.get("epochs")),
        ("Versions", ", ".join(f"{name} {version}" for name, version in card.get("versions", {}).items())),
    ]
    lines = [f"- {name}: {value}" for name, value in facts if value not in (None, "")]
    title = f"# {card.get('name', 'student')}"
    about = "One backbone distilled offline from the stored answers of the teachers below, with repcon."
    return "\n".join([title, "", about, "", *lines])


def _teachers(heads: Mapping[str, int], card: Mapping[str, Any]) -> str:
    known = {teacher["name"]: teacher for teacher in card.get("teachers", ())}
    lines = [
        "## Teachers",
        "",
        "| head | classes | architecture | weights | precision | licence |",
        "|---|---|---|---|---|---|",
    ]
    for name, classes in heads.items():
        teacher = known.get(name, {})
        cells = [teacher.get(key) or "not stated" for key in ("architecture", "weight_hash", "precision", "licence")]
        cells[1] = cells[1][:16]
        lines.append(f"| {name} | {classes} | " + " | ".join(cells) + " |")
    lines += ["", "The student's use is bound by the teachers' licences and those of the images."]
    return "\n".join(lines)


def _metrics(card: Mapping[str, Any]) -> str:
    metrics: Mapping[str, Mapping[str, float]] = card.get("metrics", {})
    if not metrics:
        return ""
    names = sorted({name for figures in metrics.values() for name in figures})
    lines = [
        "## Figures on held-out images",
        "",
        "| head | " + " | ".join(names) + " |",
        "|---" * (len(names) + 1) + "|",
    ]
    for head, figures in metrics.items():
        cells = [f"{figures[name]:.4f}" if name in figures else "" for name in names]
        lines.append(f"| {head} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _use(preprocessing: Preprocessing, card: Mapping[str, Any]) -> str:
    mean, std = ([round(value, 6) for value in values] for values in (preprocessing.mean, preprocessing.std))
    return "\n".join(
        [
            "## Use",
            "",
            "```python",
            f'trunk = timm.create_model("local-dir:{card.get("folder", "student")}", pretrained=True)',
            "```",
            "",
            f"Inputs: RGB / 255, {preprocessing.size} x {preprocessing.size}, mean {mean}, std {std}. "
            "The heads are in `heads.safetensors`; `repcon.student.load` opens both.",
        ]
    )


def _recipe(card: Mapping[str, Any]) -> str:
    recipe = card.get("recipe", "")
    return f"## Recipe\n\n```toml\n{recipe.strip()}\n```" if recipe else ""
