"""README's own tables, from the records that they name."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.experiments.consolidation.summary import cell

RECORDS = Path(__file__).parent / "records"

TRANSFER = "2026-11-30-consolidation-cpu-2-cores-2"
TRANSFER_DOMAINS = "2026-11-30-consolidation-cpu-2-cores-3"
"""With unlabelled images of the domains in the proxy."""
TRANSFER_COLUMNS = {
    "birds, linear probe": "birds, probe",
    "birds, 5-shot": "birds, 5-shot",
    "grocery, linear probe": "grocery, probe",
    "grocery, 5-shot": "grocery, 5-shot",
}
TRANSFER_ROWS = {
    "generalist": "generalist",
    "task teacher": "task teacher",
    "mean of both models' weights, no training": "mean of the two models' weights",
    "student: task + generalist": "**student: task + generalist**",
    "student: all tasks + generalist": "**ONE student: both tasks + generalist**",
    "task teacher and generalist side by side": "teacher and generalist side by side (two backbones)",
}
"""As the record calls them: as the README does."""

MARGIN_ROWS = {"finding_2": "student", "finding_3": "ONE student"}
"""The records' margins: as the README calls the students."""

TRAINING_GPU = "2026-11-27-training-nvidia-h200"
TRAINING_CPU = "2026-11-27-training-cpu-2-cores-3"
LOADERS_CPU = "2026-11-26-loaders-cpu-2-cores-4"
LOSS_GPU = "2026-11-26-kernels-nvidia-h200"
LOSS_CPU = "2026-11-25-kernels-cpu-2-cores"
STORE = "2026-11-26-store-cpu-2-cores-4"


def transfer() -> list[str]:
    """The lines of the table of accuracies."""
    lines = [_cells(line) for line in (RECORDS / TRANSFER / "table.md").read_text().partition("\n\n")[0].splitlines()]
    places = [lines[0].index(name) for name in TRANSFER_COLUMNS]
    rows = {line[0]: [line[place] for place in places] for line in lines[2:]}
    return _table(["", *TRANSFER_COLUMNS.values()], [[told, *rows[name]] for name, told in TRANSFER_ROWS.items()])


def margins() -> list[str]:
    """The lines of the table of margins over the better of teacher and generalist."""
    proxies = {"other things": _figures(TRANSFER), "and the domains": _figures(TRANSFER_DOMAINS)}
    metrics = {"": "probe", "_shot_5": "5-shot"}
    titles = [f"{proxy}: {metric}" for proxy in proxies for metric in metrics.values()]
    rows = [
        [told, *(cell(figures, name + metric, signed=True) for figures in proxies.values() for metric in metrics)]
        for name, told in MARGIN_ROWS.items()
    ]
    return _table(["", *titles], rows)


def speed() -> list[str]:
    """The lines of the table of speeds."""
    gpu, cpu, loaders = _figures(TRAINING_GPU), _figures(TRAINING_CPU), _figures(LOADERS_CPU)
    both, cores = "H200, two CPU cores", "two CPU cores"
    over_pil = loaders["torch_images_per_second"] / loaders["dataloader_pil_images_per_second"]
    loss = ", ".join(" to ".join(f"{end:.2g} x" for end in _over_compile(record)) for record in (LOSS_GPU, LOSS_CPU))
    rows = [
        (
            "a student's steps, over the same steps on one batch in memory",
            f"{gpu['torch_over_synthetic']:.2f}, {cpu['step_over_synthetic']:.2f} of the rate",
            both,
        ),
        (
            "the same, over two teachers in every step",
            f"{gpu['online_two_over_ours']:.2f} x, {cpu['online_two_over_ours']:.2f} x the rate",
            both,
        ),
        (
            "an epoch, over plain supervised training in timm, 4 crops per decoded image",
            f"{gpu['epoch_over_plain_4']:.2f}, {cpu['epoch_over_plain_4']:.2f} of the time",
            both,
        ),
        (
            "4 crops of 160 pixels from every image, over PyTorch's DataLoader with PIL",
            f"{over_pil:.1f} x the rate",
            cores,
        ),
        ("the loss of all heads with its gradient, over `torch.compile`", f"{loss} the rate", both),
        (
            "labels of three teachers (1,000, 196 and 45 classes), k = 16",
            f"{_figures(STORE)['bytes_per_crop_zstd']:.0f} bytes per crop",
            "",
        ),
    ]
    return _table(["", "figure", "measured on"], rows)


TABLES: dict[str, Callable[[], list[str]]] = {"TRANSFER": transfer, "MARGINS": margins, "SPEED": speed}


def _figures(record: str) -> dict[str, Any]:
    return json.loads((RECORDS / record / "results.json").read_text())


def _over_compile(record: str) -> tuple[float, float]:
    """Smallest and largest ratio to `torch.compile` over the shapes, of the dense and the sparse loss."""
    ratios = [value for name, value in _figures(record).items() if re.search(r"_compile(_sparse)?_over_ours$", name)]
    return min(ratios), max(ratios)


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def _table(titles: list[str], rows: list[Any]) -> list[str]:
    """Lines of Markdown; empty cells are one space."""
    lines = [titles, *rows]
    text = ["|" + "|".join(f" {cell} " if cell else " " for cell in line) + "|" for line in lines]
    return [text[0], "|" + "---|" * len(titles), *text[1:]]
