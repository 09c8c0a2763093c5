"""The loaders' figures as tables, for the terminal and for the record."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks.harness import records
from benchmarks.harness.tables import Grid
from benchmarks.harness.targets import met
from benchmarks.loaders.contenders import FLOOR, FLOOR_ODD, OURS

PEERS = ("dali_mixed", "dataloader_pil", "ffcv_stock")


def grids(figures: Mapping[str, Any], sweep: Sequence[tuple[str, int]]) -> list[Grid]:
    """The tables of all that was measured; `sweep` has the cases' names and crops per image."""
    threads = figures["threads"]
    pictures = f"{figures['pictures']}, {figures['bytes_per_image'] / 1000:.0f} kB"
    found = [
        Grid(
            title=f"4 crops of 160 pixels from 400 x 300 ({pictures}), {threads} threads",
            titles=("loader", *_SPEED),
            rows=list(_speeds(figures, "", 4)),
        ),
        Grid(
            title="Of the same: decoding alone, first epoch with content hashes checked, first batch, memory",
            titles=("loader", "decode only / bare", "to reach", "checked / unchecked", "first batch s", "peak MB"),
            rows=[_beside(figures, kind) for kind in (FLOOR, FLOOR_ODD, *OURS, *PEERS) if _known(figures, kind)],
        ),
        Grid(
            title=f"The teacher's crop: {figures['label_images']} labels, {figures['teacher_side']} pixels",
            titles=("loader", "pixels off, of 255", "mean KL, nat", "worst KL", "same class"),
            rows=[_contract(figures, kind) for kind in ("reference", *OURS) if f"{kind}_label_kl" in figures],
        ),
    ]
    if sweep:
        rows = [(case, *row) for case, crops in sweep for row in _speeds(figures, f"{case}_", crops)]
        title = f"Every size, {threads} threads"
        found.append(Grid(title=title, titles=("case", "loader", *_SPEED[:-1]), rows=[row[:-1] for row in rows]))
    return found


_SPEED = ("images/s", "crops/s", "over bare decode", "20 to 80 %", "repeats", "to reach")


def _speeds(figures: Mapping[str, Any], prefix: str, crops: int) -> Iterator[tuple[str, ...]]:
    yield FLOOR, records.cells(figures, f"{prefix}{FLOOR}_images_per_second")[0], "", "1", "", "", ""
    for kind in (*OURS, *PEERS):
        if (name := f"{prefix}{kind}_over_decode") in figures:
            rate = figures[f"{prefix}{kind}_images_per_second"]
            yield (
                kind, f"{rate:,.0f}", f"{crops * rate:,.0f}", *records.cells(figures, name),
                _verdict(figures, name),
            )  # fmt: skip


def _beside(figures: Mapping[str, Any], kind: str) -> tuple[str, ...]:
    decode, names = f"{kind}_decode_only_over_decode", (f"{kind}_checked_over_unchecked", f"{kind}_first_batch_seconds")
    memory = figures.get(f"{kind}_peak_memory_bytes")
    return (
        kind,
        _spread(figures, decode),
        _verdict(figures, decode),
        *(_spread(figures, n) for n in names),
        "" if memory is None else f"{memory / 1e6:,.0f}",
    )


def _contract(figures: Mapping[str, Any], kind: str) -> tuple[str, ...]:
    def cell(name: str) -> str:
        if name not in figures:
            return ""
        verdict = _verdict(figures, name)
        return f"{figures[name]:.2g} ({verdict})" if verdict else f"{figures[name]:.2g}"

    kl, worst, agreement = (f"{kind}_label_{what}" for what in ("kl", "kl_worst", "agreement"))
    return kind, cell(f"{kind}_pixel_difference"), cell(kl), cell(worst), cell(agreement)


def _known(figures: Mapping[str, Any], kind: str) -> bool:
    return any(f"{kind}_{what}" in figures for what in ("peak_memory_bytes", "decode_only_over_decode"))


def _spread(figures: Mapping[str, Any], name: str) -> str:
    value, spread, repeats = records.cells(figures, name)
    return f"{value} ({spread})" if repeats not in ("", "1") else value


def _verdict(figures: Mapping[str, Any], name: str) -> str:
    """The target, and whether it is missed."""
    reach = figures["targets"]
    if name not in reach or name not in figures:
        return ""
    return reach[name] if met(reach[name], figures[name]) else f"{reach[name]} MISSED"
