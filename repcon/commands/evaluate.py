"""How well backbones' features transfer: every backbone on the same images, the same splits and the same draws.

Images of the wanted classes are split once into a training and a test part, or into folds that are tested in turn.
Features are extracted once per backbone (`repcon.evaluation.features`), then probed (`repcon.evaluation.probes`).
Accuracies are per cent of test images, with 95 % intervals over the test images and, few-shot, over the draws;
differences to the baseline are paired. Other training images, or a backbone trained again under another seed: how much
that changes lies outside these intervals.
Several data sets are measured one by one and in the mean; a verdict ends every evaluation.
"""

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import Progress

from repcon.config import EvaluateConfig, OptimConfig, TeachConfig, check_minimum, dump
from repcon.decode.factory import open_loader
from repcon.distill.finetune import LabelledRows, finetune, predict
from repcon.evaluation import probes, tables
from repcon.evaluation.backbones import JOIN, parse_backbones, warn_of_seen_images
from repcon.evaluation.data_sets import Fold, Split, parse_data_sets, split_images
from repcon.evaluation.features import ExtractConfig, extract
from repcon.evaluation.heads import HeadCheck, measure_heads, plan_heads
from repcon.evaluation.results import Correctness, combine, per_image, single_backbones, subject_of, summarise, verdict
from repcon.images.pack import ImagePack
from repcon.images.packing import open_or_pack
from repcon.models.factory import create_model
from repcon.models.preprocessing import preprocessing_of
from repcon.models.student import head_names
from repcon.reports.plot_style import standalone
from repcon.reports.sections.transfer import accuracy_plot, difference_plot
from repcon.runtime.console import progress
from repcon.runtime.device import choose
from repcon.runtime.errors import UserError
from repcon.runtime.run_dir import RunDir, write_text

SHOTS = (1, 5, 10)
FINETUNE = TeachConfig(
    data="", out="", epochs=10, optim=OptimConfig(lr=5e-4, weight_decay=0.02), val_fraction=0.0, precision="fp32"
)
"""Fine-tuning: all weights, the same settings for every backbone, float32 on every device. The last epoch counts, so
that nothing is chosen on the test part."""


Facts = dict[str, dict[str, Any]]
"""{backbone: its model, weight_hash, input_size, heads, ...}."""


def run(config: EvaluateConfig) -> dict[str, Any]:
    """Measure every backbone of `config`; write the results and give them.

    `config.out` gets `results.json`, `answers.npz`, `transfer.svg` and `differences.svg`; of several data sets the
    latter three lie in a folder of each set's name. Results of one data set have `summarise`'s keys, of several
    `combine`'s; `verdict` (of `repcon.evaluation.results`) and, where asked for, `heads` (of `repcon.evaluation.heads`)
    are added to both.
    """
    check_minimum(config, fewshot_trials=1, folds=0, size=0, batch_size=1, num_workers=0, seed=0)
    if not config.metrics and not config.heads:
        raise UserError("metrics: none named; leave it out, or name some of knn, probe, fewshot, finetune")
    backbones, sets = parse_backbones(config), parse_data_sets(config)
    output = RunDir(config.out, "evaluate", dump(config), exclusive=True)
    packs = {name: open_or_pack(str(one.data), output.path / "pack") for name, one in sets.items()}
    splits = {name: split_images(packs[name], one) for name, one in sets.items() if config.metrics}
    checks = plan_heads(config, backbones, packs)
    correctness, facts, heads = _measure_all(config, backbones, sets, packs, splits, checks, output)
    results = {name: _results(correctness[name], facts[name], splits[name], sets[name]) for name in correctness}
    folders = {name: output.path / name if len(sets) > 1 else output.path for name in results}
    for name, folder in folders.items():
        _write_answers(correctness[name], splits[name], folder)
    total = dict(next(iter(results.values()), {}))
    if len(results) > 1:
        total = combine(results, total["baseline"]) | {"size": config.size}
    if heads:
        total["heads"] = heads
    if correctness:
        first = next(iter(facts.values()))
        single = single_backbones(first)
        subject = config.student or subject_of(first, list(correctness.values()))
        total["verdict"] = verdict(correctness, subject, [name for name in single if name != subject])
    total = output.finish(total)  # before anything is drawn or shown, which may fail
    for name, folder in folders.items():
        for file, plot in (("transfer", accuracy_plot), ("differences", difference_plot)):
            if drawn := plot(results[name], file):
                write_text(folder / f"{file}.svg", standalone(drawn.svg))
    tables.show(total, results)
    tables.verdict(total.get("verdict", {}))
    return total


def _measure_all(
    config: EvaluateConfig, backbones: Mapping[str, str], sets: Mapping[str, EvaluateConfig],
    packs: Mapping[str, ImagePack], splits: Mapping[str, Split], checks: Sequence[HeadCheck], output: RunDir,
) -> tuple[dict[str, Correctness], dict[str, Facts], list[dict[str, Any]]]:  # fmt: skip
    """Correctness and facts by data set, and the rows of `measure_heads`, under one progress bar."""
    correctness: dict[str, Correctness] = {}
    facts: dict[str, Facts] = {}
    with progress() as bars:
        task = bars.add_task("backbones", total=len(backbones) * len(splits), unit="backbones", note="")
        for name, split in splits.items():
            warn_of_seen_images(backbones, packs[name], split)
            correct, facts[name] = {}, {}
            for backbone, model in backbones.items():
                bars.update(task, note=backbone if len(sets) == 1 else f"{backbone}, {name}")
                correct[backbone], facts[name][backbone] = measure(model, packs[name], split, sets[name], bars)
                output.log("backbone", name=backbone, dataset=name, **facts[name][backbone])
                bars.update(task, advance=1, note="")
            correctness[name] = correct
        return correctness, facts, measure_heads(checks, config, bars)


def _results(correctness: Correctness, facts: Facts, split: Split, config: EvaluateConfig) -> dict[str, Any]:
    left_out = [shots for shots in SHOTS if shots > split.smallest_class[1]]
    found = summarise(correctness, facts, split, config.baseline or next(iter(correctness)))
    return found | {"data": config.data, "size": config.size, "shots_left_out": left_out}


def _write_answers(correctness: Correctness, split: Split, folder: Path) -> None:
    """`answers.npz` of one data set."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays = per_image(correctness) | {
        "test_rows": split.rows[split.tested], "test_labels": split.labels[split.tested]
    }  # fmt: skip
    np.savez(folder / "answers.npz", **arrays)  # pyright: ignore[reportArgumentType]


def measure(
    model: str, pack: ImagePack, split: Split, config: EvaluateConfig, bars: Progress
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """One backbone's part of `Correctness` and of `Facts`, on one data set."""
    reading = ExtractConfig(
        size=config.size,
        batch_size=config.batch_size,
        loader=config.loader,
        num_workers=config.num_workers,
        device=str(choose(config.device)),
        cache=Path(config.cache or Path(config.out) / "features"),
    )
    parts = [extract(part, pack, split.rows, reading, bars) for part in model.split(JOIN)]
    values, weights = concatenate([(part.values, part.weight_hash) for part in parts])
    facts: dict[str, Any] = {"model": model, "weight_hash": weights, "dimensions": values.shape[1]}
    facts |= {"input_size": [part.input_size for part in parts], "heads": list(head_names(model))}
    task = bars.add_task("measures", total=len(config.metrics) * len(split.folds), unit="", note="")
    right: list[dict[str, np.ndarray]] = []
    fitted: list[probes.Probe] = []
    for fold in split.folds:
        right.append({})
        for metric in dict.fromkeys(config.metrics):
            bars.update(task, note=metric)
            if metric == "finetune":
                right[-1]["finetune"] = _finetune(model, pack, split, fold, config, bars)
            elif metric == "probe":
                train, test = fold
                fitted.append(probes.linear_probe(values[train], split.labels[train], values[test], config.seed))
                right[-1]["probe"] = fitted[-1].predicted == split.labels[test]
            else:
                right[-1] |= _nearest(metric, values, split, fold, config)
            bars.advance(task)
    bars.remove_task(task)
    if fitted:
        facts |= {"probe_c": [one.c for one in fitted], "probe_converged": all(one.converged for one in fitted)}
    return {name: np.concatenate([one[name] for one in right], axis=-1) for name in right[0]}, facts


def _nearest(
    metric: str, values: np.ndarray, split: Split, fold: Fold, config: EvaluateConfig
) -> dict[str, np.ndarray]:
    """Correctness on one fold's test images by the nearest training images, or class means with `fewshot`."""
    places, tested = fold
    train, train_labels, test, test_labels = values[places], split.labels[places], values[tested], split.labels[tested]
    if metric == "knn":
        return {f"knn_{k}": found == test_labels for k, found in probes.knn(train, train_labels, test).items()}
    return {
        f"shot_{shots}": probes.few_shot(
            train, train_labels, test, test_labels, shots, config.fewshot_trials, config.seed
        )
        for shots in SHOTS
        if shots <= split.smallest_class[1]
    }


def concatenate(parts: Sequence[tuple[np.ndarray, str]]) -> tuple[np.ndarray, str]:
    """Several backbones' features of the same images as one array, each at unit length, and their weight hashes."""
    if len(parts) == 1:
        return parts[0]
    return np.hstack([probes.unit(values) for values, _ in parts]), JOIN.join(weights for _, weights in parts)


def _finetune(
    model: str, pack: ImagePack, split: Split, fold: Fold, config: EvaluateConfig, bars: Progress
) -> np.ndarray:
    """(m,) bool correctness on one fold's test images after fine-tuning on its training images."""
    places, tested = fold
    device = choose(config.device)
    torch.manual_seed(config.seed)
    network = create_model(model, num_classes=len(split.classes), size=config.size)
    recipe = replace(
        FINETUNE, size=config.size, seed=config.seed, loader=config.loader, num_workers=config.num_workers,
        batch_size=config.batch_size,
    )  # fmt: skip
    train = LabelledRows(rows=split.rows[places], labels=split.labels[places])
    none = LabelledRows(rows=split.rows[:0], labels=split.labels[:0])
    tuned = finetune(network, pack, train, none, recipe, device=device, bars=bars, on_epoch=lambda epoch, best: None)
    preprocessing = preprocessing_of(network, config.size)
    loader = open_loader(config.loader, pack, (preprocessing.size,), num_workers=config.num_workers, device=str(device))
    with closing(loader):
        logits = predict(tuned, pack, split.rows[tested], preprocessing, config.batch_size, loader)
    return logits.argmax(1).numpy() == split.labels[tested]
