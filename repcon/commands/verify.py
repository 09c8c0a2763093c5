"""`repcon verify`: is this store whole, are its labels possible, and do its teachers still give them?

Everything is looked at before the verdict: one damaged shard does not hide another.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from rich.markup import escape
from rich.table import Table

from repcon.config import CropConfig, VerifyConfig, parse, parse_named_values
from repcon.crops.plan import plan_crops
from repcon.images.pack import ImagePack
from repcon.labels.integrity import hierarchy_problems, unit_problems
from repcon.labels.layout import HeadInfo
from repcon.labels.store import CropLabels, LabelStore, Unit
from repcon.precompute.recompute import find_teachers, rerun
from repcon.runtime.console import console, progress, warn
from repcon.runtime.errors import UserError

_SHOWN = 20
_MOST_PROBLEMS = 1000
"""More are not looked for."""
_HALF_ULP = 2.0**-11
"""Largest relative rounding error of float16."""
_QUANTIZED_TOLERANCE = 0.002
"""What eight-bit values add to it: the first log-probability is a multiple of 0.0025 nat."""


def run(config: VerifyConfig) -> dict[str, Any]:
    """Checks files and labels, re-runs the teachers on a sample where `pack` is named; raises UserError on failure.

    The error carries the same figures as a success gives.
    """
    if min(config.sample, config.seed) < 0 or not config.loaders:
        raise UserError("sample and seed must be 0 or more, and loaders name at least one, or auto")
    store = LabelStore.open(config.store)
    pack = ImagePack.open(config.pack) if config.pack else None
    if pack is not None:
        store.require_pack(pack.fingerprint, len(pack))
    if pack is not None and config.sample:
        models = parse_named_values("models", config.models, "NAME=MODEL", store.heads)
        try:  # before the files are checked, which may take long
            find_teachers(store, models)
        except UserError as error:
            warn(str(error))
    problems = hierarchy_problems(store)
    units, marked = store.units(), store.completion.recorded_units()
    if unmarked := [unit for unit in units if unit.name not in marked]:
        hint = "run `repcon precompute` again to complete the store"
        problems.append(f"{store.url}: {len(unmarked):,} units were never finished, {unmarked[0].name} first; {hint}")
    finished = [unit for unit in units if unit.name in marked]
    figures: dict[str, Any] = {"units": len(units), "reruns": {}} | _check_units(store, pack, finished, len(unmarked))
    problems = figures["problems"] = problems + figures["problems"]
    if pack is not None and config.sample and not problems:
        try:
            figures["reruns"] = rerun(store, pack, config)
        except UserError as error:
            what = "structure, checksums and labels are sound; the teachers were not asked again"
            raise UserError(f"{error} ({what})", figures=figures | {"passed": False}) from error
        problems += _rerun_problems(figures["reruns"], config)
        console.print(_reruns(figures["reruns"]))
    figures["passed"] = not problems
    for problem in problems[:_SHOWN]:
        console.print(f"[red]wrong[/] {escape(problem)}", highlight=False, soft_wrap=True)
    if problems:
        more = f", the first {_SHOWN} are above" if len(problems) > _SHOWN else ""
        count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
        raise UserError(f"{store.url}: {count}{more}; the first: {problems[0]}", figures=figures)
    present = store.images - figures["missing"]
    figures["crops_asked_again"] = min(config.sample, present) if figures["reruns"] else 0
    return figures


def _check_units(store: LabelStore, pack: ImagePack | None, units: Sequence[Unit], unmarked: int) -> dict[str, Any]:
    """The problems of these finished units, and how many rows of them are sound. unmarked: units that are none."""
    missing = store.completion.recorded_missing_rows(units)
    problems: list[str] = []
    checked = 0
    with progress() as bar:
        task = bar.add_task("verify", total=unmarked + len(units), completed=unmarked, unit="units", note="")
        for unit in units:
            found = unit_problems(store, unit)
            if not found:
                checked += len(unit.crops) * len(unit.rows)
                found = list(label_problems(store, unit, pack, missing))
                if pack is not None and not found:
                    found = list(plan_problems(store, unit, pack))
            problems += found
            bar.advance(task)
            if len(problems) > _MOST_PROBLEMS:
                problems.append(f"{store.url}: after so many problems no further units were looked at")
                break
    return {"rows_checked": checked, "missing": len(missing), "problems": problems}


def label_problems(store: LabelStore, unit: Unit, pack: ImagePack | None, missing: np.ndarray) -> Iterator[str]:
    """What no teacher could have said, in a unit whose files are as they were written; `missing` rows are skipped."""
    present = ~np.isin(np.arange(unit.rows.start, unit.rows.stop), missing)
    absent = store.completion.recorded_missing_rows([unit]) - unit.rows.start
    for crop in unit.crops:
        try:
            crop_labels = store.reader.read_rows(crop, unit.rows, unit.heads)
        except UserError as error:
            yield str(error)
            continue
        place = f"{store.url}: crop {crop} of rows {unit.rows.start} to {unit.rows.stop - 1}"
        if unit.writes_boxes and pack is not None:
            rows = slice(unit.rows.start, unit.rows.stop)
            yield from (f"{place}: {what}" for what in _box_problems(crop_labels, pack.sizes[rows]))
        for name in unit.heads:
            if not np.isnan(crop_labels.labels[name][1][absent]).all():
                yield f"{place}, {name}: rows that are marked as missing have labels"
            ids, logp = (array[present] for array in crop_labels.labels[name])
            tolerance = _QUANTIZED_TOLERANCE if store.manifest.values == "quantized8" else 0.0
            yield from (f"{place}, {name}: {what}" for what in _head_problems(store.heads[name], ids, logp, tolerance))


def _box_problems(crop_labels: CropLabels, sizes: np.ndarray) -> Iterator[str]:
    ends = crop_labels.boxes[:, :2].astype(np.int64) + crop_labels.boxes[:, 2:]
    outside = (ends > sizes).any(1) | (crop_labels.boxes[:, 2:] == 0).any(1)
    if outside.any():
        yield f"{outside.sum()} boxes reach out of their image or are empty"


def plan_problems(store: LabelStore, unit: Unit, pack: ImagePack) -> Iterator[str]:
    """Boxes that are not those which the manifest's crop recipe draws for the pack's images."""
    if not unit.writes_boxes:
        return
    rows = slice(unit.rows.start, unit.rows.stop)
    recipe = parse(CropConfig, store.manifest.crop_recipe, store.url)
    planned = plan_crops(recipe, pack.hashes[rows], pack.sizes[rows], unit.crops)
    boxes, flips = store.reader.boxes(unit.crops, unit.rows)
    if not (np.array_equal(planned.boxes, boxes) and np.array_equal(planned.flips, flips)):
        place = f"crops {unit.crops.start} to {unit.crops.stop - 1} of rows {rows.start} to {rows.stop - 1}"
        yield f"{store.url}: {place}: their boxes are not those that the manifest's crop_recipe draws"


def _head_problems(head: HeadInfo, ids: np.ndarray, logp: np.ndarray, tolerance: float) -> Iterator[str]:
    """Order, range, repetition and mass of one head's rows (R, k) and (R, k + T)."""
    if not len(ids):
        return
    top = logp[:, : head.k].astype(np.float64)
    if (ids >= head.classes).any() or not np.isfinite(top).all():
        yield f"{((ids >= head.classes) | ~np.isfinite(top)).any(1).sum()} rows hold fill values"
        return
    if (np.diff(np.sort(ids, 1)) == 0).any():
        yield f"{(np.diff(np.sort(ids, 1)) == 0).any(1).sum()} rows name a class twice"
    if (np.diff(top) > 0).any():
        yield f"{(np.diff(top) > 0).any(1).sum()} rows are not by falling probability"
    tails = logp[:, head.k :]
    # A tail that float16 cannot hold is -inf too: then the stored classes have all there is.
    without, all_inside = np.isneginf(tails).all(1), np.exp(top).sum(1) > 0.999
    if np.isnan(tails).any() or (~without if head.k == head.classes else without & ~all_inside).any():
        yield f"rows have no tail, or one that {head.k} of {head.classes} classes cannot have"
    yield from _mass_problems(head, top, tails.astype(np.float64), tolerance)


def _mass_problems(head: HeadInfo, top: np.ndarray, tails: np.ndarray, tolerance: float) -> Iterator[str]:
    """The probabilities of a row sum to one, within what float16 can say of logarithms."""
    inside = np.exp(top)
    bound = (inside * (-top * _HALF_ULP + tolerance)).sum(1) + 1e-4
    known = 1.0 in head.temperatures
    tail = tails[:, head.temperatures.index(1.0)] if known else np.full(len(top), -np.inf)
    mass = inside.sum(1) + np.exp(tail)
    bound += np.exp(tail) * np.where(np.isfinite(tail), -tail, 0.0) * _HALF_ULP
    wrong = np.abs(mass - 1) > bound if known or head.k == head.classes else mass - 1 > bound
    if wrong.any():
        worst = np.abs(mass - 1).argmax()
        yield f"the probabilities of {wrong.sum()} rows do not sum to one (the worst to {mass[worst]:.4f})"


def _rerun_problems(reruns: dict[str, dict[str, dict[str, float]]], config: VerifyConfig) -> list[str]:
    problems = []
    for teacher, loaders in reruns.items():
        for loader, figures in loaders.items():
            place = f"teacher {teacher} through the {loader} loader"
            # A comparison that NaN fails.
            if not figures["kl"] <= config.max_kl:
                problems.append(f"{place}: mean KL {figures['kl']:.2g} nat to what is stored, above {config.max_kl:g}")
            if not figures["agreement"] >= config.min_agreement:
                limit = f"below {config.min_agreement:.1%}"
                problems.append(f"{place}: the same class as stored on {figures['agreement']:.1%}, {limit}")
    return problems


def _reruns(reruns: dict[str, dict[str, dict[str, float]]]) -> Table:
    table = Table("teacher", "loader", title="Teachers again", title_justify="left")
    for column in ("mean KL", "worst KL", "same class", "pixels off"):
        table.add_column(column, justify="right")
    for teacher, loaders in reruns.items():
        for loader, figures in loaders.items():
            off = f"{figures['pixel_difference']:.3f}" if "pixel_difference" in figures else "-"
            cells = (f"{figures['kl']:.1e}", f"{figures['kl_worst']:.1e}", f"{figures['agreement']:.1%}", off)
            table.add_row(escape(teacher), loader, *cells)
    return table
