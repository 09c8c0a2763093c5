"""The model card of a student, in Markdown."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from repcon.models.preprocessing import Preprocessing

TEACHER = {"architecture": "architecture", "weight_hash": "weights", "precision": "precision", "licence": "licence"}
"""What may be known of a teacher, and its column."""
STARTS = {"average": "its teacher's weights", "backbone": "the backbone's own weights", "random": "random weights"}
BEST = 12
"""Rows of the table of candidate means."""
FIGURES = {"agreement": "agreement (same top class as its teacher)", "kl": "KL from its teacher"}
"""Column titles of the figures."""


def model_card(
    heads: Mapping[str, int], preprocessing: Preprocessing, card: Mapping[str, Any], folder: str | Path
) -> str:
    """The card of the student in `folder`; what is not known of it is left out.

    `card` may hold: name (or the folder's), backbone, store (fingerprint), pack (fingerprint), images, epochs, teachers
    (mappings with name, architecture, weight_hash, licence, precision), metrics (figure by head by name), versions,
    held_out (how many images the metrics are of), start (`Initialization.to_json`), recipe (TOML).
    """
    sections = [
        _head(card, Path(folder).name),
        teacher_table(heads, card.get("teachers", ()), "The student's"),
        _start(card),
        _metrics(card),
        _use(preprocessing, folder),
        f"## Recipe\n\n```toml\n{card['recipe'].strip()}\n```" if card.get("recipe") else "",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _head(card: Mapping[str, Any], folder: str) -> str:
    facts = [
        ("Backbone", card.get("backbone")),
        ("Label store, fingerprint", card.get("store")),
        ("Image pack, fingerprint", card.get("pack")),
        ("Training images", card.get("images")),
        ("Epochs", card.get("epochs")),
        ("Versions", ", ".join(f"{name} {version}" for name, version in card.get("versions", {}).items())),
    ]
    lines = [f"- {name}: {escape_markdown(value)}" for name, value in facts if value not in (None, "")]
    title = f"# {escape_markdown(card.get('name', folder))}"
    about = "One backbone distilled offline from the stored answers of the teachers below, with repcon."
    return "\n\n".join(part for part in (title, about, "\n".join(lines)) if part)


def teacher_table(heads: Mapping[str, int], teachers: Iterable[Mapping[str, Any]], whose: str) -> str:
    """The section of the teachers, which ends with what `whose` use is bound by.

    heads: classes per head. teachers: mappings as `model_card` takes them.
    """
    known = {teacher["name"]: teacher for teacher in teachers}
    # That a licence is not stated is worth a column.
    keys = [key for key in TEACHER if (known and key == "licence") or any(held.get(key) for held in known.values())]
    rows = [
        [name, str(classes), *(_stated(key, known.get(name, {}).get(key)) for key in keys)]
        for name, classes in heads.items()
    ]
    table = _table(["head", "classes", *(TEACHER[key] for key in keys)], rows)
    return f"## Teachers\n\n{table}\n\n{whose} use is bound by the teachers' licences and those of the images."


def _start(card: Mapping[str, Any]) -> str:
    """Where the weights came from, and the best of the means that were tried."""
    start: Mapping[str, Any] = card.get("initialization", {})
    if not start:
        return ""
    shares = ", ".join(f"{share:.2f} of {name}" for name, share in start["shares"].items() if share)
    lines = [f"- Backbone: {escape_markdown(f'the mean of weights, {shares}' if shares else STARTS[start['init']])}"]
    for key, what in (
        ("warm_heads", "these students" if start["init"] == "students" else "their teachers' classifiers"),
        ("warmed_up_heads", "a fit on the start's features"),
    ):
        if start[key]:
            lines.append(f"- Heads from {what}: {escape_markdown(', '.join(start[key]))}")
    parts = ["## Start", "\n".join(lines)]
    if search := start.get("search"):
        best = search["candidates"][:BEST]
        columns = [*(f"share of {name}" for name in best[0]["shares"]), *(f"KL of {name}" for name in best[0]["kl"])]
        rows = [
            [
                *(f"{x:.2f}" for x in each["shares"].values()),
                *(f"{x:.3f}" for x in each["kl"].values()),
                f"{each['score']:.3f}",
            ]
            for each in best
        ]
        parts.append(
            f"The best of {len(search['candidates'])} means by the stored labels of {search['crops']:,} crops:"
        )
        parts.append(_table([*columns, "score"], rows))
    return "\n\n".join(parts)


def _stated(key: str, value: str | None) -> str:
    """A hash is cut to what tells it from others."""
    return (value[:16] if key == "weight_hash" else value) if value else "not stated"


def _metrics(card: Mapping[str, Any]) -> str:
    metrics: Mapping[str, Mapping[str, float]] = card.get("metrics", {})
    if not metrics:
        return ""
    names = sorted({name for figures in metrics.values() for name in figures})
    rows = [
        [head, *(_figure(name, figures[name]) if name in figures else "" for name in names)]
        for head, figures in metrics.items()
    ]
    held = f"{card['held_out']:,} " if "held_out" in card else ""
    table = _table(["head", *(FIGURES.get(name, name) for name in names)], rows)
    return f"## Figures on {held}held-out images\n\n{table}"


def _figure(name: str, value: float) -> str:
    """With its unit."""
    if name == "agreement":
        return f"{100 * value:.1f} %"
    return f"{value:.4f} nat" if name == "kl" else f"{value:.4f}"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [" | ".join(map(escape_markdown, cells)) for cells in (columns, *rows)]
    return "\n".join([f"| {lines[0]} |", "|---" * len(columns) + "|", *(f"| {line} |" for line in lines[1:])])


def escape_markdown(text: str) -> str:
    """Escape Markdown characters, and join lines so that the text stays in its table cell."""
    text = re.sub(r"([\\`*\[\]<>|#~$&!{}])", r"\\\1", " ".join(str(text).split()))
    return re.sub(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\_", text)


def _use(preprocessing: Preprocessing, folder: str | Path) -> str:
    mean, std = ([round(value, 6) for value in values] for values in (preprocessing.mean, preprocessing.std))
    return f"""## Use

```python
import timm

backbone = timm.create_model({json.dumps(f"local-dir:{folder}")}, pretrained=True)
```

Inputs: RGB / 255, {preprocessing.size} x {preprocessing.size}, mean {mean}, std {std}. \
The heads are in `heads.safetensors`; `repcon.load_student` opens both."""
