"""How well trunks' features transfer: every trunk on the same images, the same splits and the same draws.

Images of the wanted classes are split once into a training and a test part. Features are extracted once per trunk
(`repcon.probing.features`), then probed (`repcon.probing.probes`). Accuracies are per cent of test images, with 95 %
intervals over the test images and, few-shot, over the draws; differences to the baseline are paired. Other training
images, or a trunk trained again under another seed: how much that changes lies outside these intervals.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.markup import escape
from rich.progress import Progress

from repcon import backbones
from repcon.config import EvaluateConfig, OptimConfig, TeachConfig, dump, require_least
from repcon.device import choose
from repcon.errors import UserError
from repcon.factories import is_factory
from repcon.images import Pack, class_rows
from repcon.loaders import open_loader
from repcon.packing import open_or_pack
from repcon.probing import intervals, probes, show
from repcon.probing.features import Reading, extract
from repcon.record import Run, console, few, progress
from repcon.training.finetune import Labelled, fit, predict

SHOTS = (1, 5, 10)
JOIN = " + "
"""Between trunks whose features are measured side by side: what one trunk in their place would have to reach."""
FINETUNE = TeachConfig(
    data="", out="", epochs=10, optim=OptimConfig(lr=5e-4, weight_decay=0.02), validation=0.0, precision="fp32"
)
"""The whole trunk is trained, for every trunk alike and on every device in float32; the last epoch counts, nothing is
chosen on the test part."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """The labelled images that every trunk is measured on."""

    train: np.ndarray
    """(n,) int64 rows of the pack."""
    train_labels: np.ndarray
    test: np.ndarray
    """(m,) int64 rows of the pack, none of them in `train`."""
    test_labels: np.ndarray
    classes: tuple[str, ...]
    left_out: tuple[str, ...]
    """Classes with a single image, which cannot be both trained and tested on."""


def run(config: EvaluateConfig) -> dict[str, Any]:
    """Measures every trunk of `config`; writes `results.json`, `answers.npz` and `transfer.svg`; gives the results."""
    require_least(config, draws=1, size=0, batch_size=1, workers=0, seed=0)
    if not config.metrics:
        raise UserError("metrics: none named; leave it out, or name some of knn, probe, fewshot, finetune")
    trunks = parse_trunks(config.trunks, config.baseline)
    joined = [name for name, model in trunks.items() if JOIN in model]
    if joined and "finetune" in config.metrics:
        raise UserError(f"metrics: fine-tuning takes one trunk, and {joined[0]} is several; leave `finetune` or it out")
    made = [name for name, model in trunks.items() if is_factory(model)]
    if made and "finetune" in config.metrics:
        raise UserError(f"metrics: fine-tuning takes models of timm, and {made[0]} is not; leave `finetune` or it out")
    output = Run(config.out, "evaluate", dump(config), alone=True)
    pack = open_or_pack(config.data, output.path / "pack")
    split = split_images(pack, config)
    if split.left_out:
        console.print(f"left out, with one image each: {escape(', '.join(split.left_out))}")
    shots_left_out = _point_out_small(split) if "fewshot" in config.metrics else []
    _point_out_taught(trunks, pack, split)
    baseline = config.baseline or next(iter(trunks))
    measured: dict[str, dict[str, np.ndarray]] = {}
    about: dict[str, dict[str, Any]] = {}
    with progress() as bars:
        task = bars.add_task("trunks", total=len(trunks), unit="trunks", note="")
        for name, model in trunks.items():
            bars.update(task, note=name)
            measured[name], about[name] = measure(model, pack, split, config, bars)
            output.log("trunk", name=name, **about[name])
            bars.update(task, advance=1, note="")
    results = summarise(measured, about, split, baseline)
    results |= {"data": config.data, "size": config.size, "shots_left_out": shots_left_out}
    np.savez(output.path / "answers.npz", **_flat(measured), test_rows=split.test, test_labels=split.test_labels)  # pyright: ignore[reportArgumentType]
    show.table(results)
    show.plot(results, output.path / "transfer.svg")
    console.print(f"written to {escape(str(output.path))}", soft_wrap=True, highlight=False)
    return output.finish(results)


def parse_trunks(trunks: tuple[str, ...], baseline: str) -> dict[str, str]:
    """`name=trunk` entries to {name: what `extract` takes}; an entry without a name is named by its end.

    `name=trunk + trunk` is several trunks side by side.
    """
    named: dict[str, str] = {}
    for entry in trunks:
        name, equals, model = entry.partition("=")
        if not equals or Path(entry).is_dir():  # a path may hold a `=` of its own
            name, model = Path(entry).name, entry
        if name in named:
            raise UserError(f"trunks: two are called {name!r}; give each a name of its own, `name=trunk`")
        named[name] = JOIN.join(model_folder(part) for part in model.split(JOIN))
    if not named:
        raise UserError("trunks: none given; name at least one, for example `generalist=package:efficientnet_lite0`")
    if baseline and baseline not in named:
        raise UserError(f"baseline: no trunk is called {baseline!r}; there are {', '.join(named)}")
    return named


def model_folder(model: str) -> str:
    """A run's output folder to the folder inside it that holds the model; anything else is given back as it is."""
    folder = Path(model)
    if not folder.is_dir() or (folder / backbones.CONFIG).is_file():
        return model
    if (inner := backbones.model_folder(folder)) == folder:
        raise UserError(
            f"{model}: holds no model (no config.json); name the output folder of `repcon train` or `teach`"
        )
    return str(inner)


def _point_out_taught(trunks: Mapping[str, str], pack: Pack, split: Split) -> None:
    """Says which of the measured classes a trunk learnt from this very pack, or that it was distilled on it, by what is
    saved with it."""
    for name, model in trunks.items():
        taught: set[str] = set()
        for part in model.split(JOIN):
            saved = Path(part, backbones.CONFIG).is_file() and backbones.saved_extra(part)
            if saved and saved.get("data_fingerprint") == pack.fingerprint:
                taught |= set(backbones.saved_classes(part)) & set(split.classes)
            if saved and saved.get("proxy_fingerprint") == pack.fingerprint:
                what = f"{name} was distilled on the images of this very pack: what it reaches is no transfer"
                console.print(f"[yellow]careful[/]: {escape(what)}", highlight=False)
        if taught:
            names = few(sorted(taught))
            what = f"{len(taught)} of the {len(split.classes)} classes ({names}) were taught to {name} on these images"
            console.print(f"[yellow]careful[/]: {escape(what)}; what it reaches there is no transfer", highlight=False)


def _point_out_small(split: Split) -> list[int]:
    """Gives the shots that the smallest class has too few training images for, and says so."""
    left_out = [shots for shots in SHOTS if shots > _fewest(split)]
    if left_out:
        smallest = split.classes[int(np.bincount(split.train_labels).argmin())]
        shots = ", ".join(f"{count}-shot" for count in left_out)
        console.print(f"left out: {shots}; the class {escape(smallest)} has {_fewest(split)} to train on")
    return left_out


def _fewest(split: Split) -> int:
    """Training images of the smallest class."""
    return int(np.bincount(split.train_labels).min())


def split_images(pack: Pack, config: EvaluateConfig) -> Split:
    """The images of the wanted classes, `config.test` of each class for the test; the same for every trunk."""
    if not 0 < config.test < 1:
        raise UserError(f"test: {config.test} is no share of the images between 0 and 1; 0.5 is usual")
    rows, labels, names = class_rows(pack, config.classes)
    counts = np.bincount(labels, minlength=len(names))
    kept = np.flatnonzero(counts >= 2)
    left_out = tuple(names[label] for label in np.flatnonzero(counts < 2))
    if len(kept) < 2:
        raise UserError(f"{config.data}: fewer than two of the {len(names)} classes have two images or more")
    usable = np.isin(labels, kept)
    rows, labels = rows[usable], np.searchsorted(kept, labels[usable])
    train, test = probes.split_classes(labels, config.test, config.seed)
    return Split(
        train=rows[train],
        train_labels=labels[train],
        test=rows[test],
        test_labels=labels[test],
        classes=tuple(names[label] for label in kept),
        left_out=left_out,
    )


def measure(
    model: str, pack: Pack, split: Split, config: EvaluateConfig, bars: Progress
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """One trunk's answers, {metric: (m,) right or wrong per test image, for few-shot (draws, m)}, and facts."""
    reading = Reading(
        size=config.size,
        batch_size=config.batch_size,
        loader=config.loader,
        workers=config.workers,
        device=str(choose(config.device)),
        cache=Path(config.cache or Path(config.out) / "features"),
    )
    rows = np.concatenate([split.train, split.test])
    values, weights = side_by_side([extract(part, pack, rows, reading, bars) for part in model.split(JOIN)])
    train, test = values[: len(split.train)], values[len(split.train) :]
    answers: dict[str, np.ndarray] = {}
    about: dict[str, Any] = {"model": model, "weight_hash": weights, "dimensions": values.shape[1]}
    task = bars.add_task("measures", total=len(config.metrics), unit="", note="")
    for metric in dict.fromkeys(config.metrics):
        bars.update(task, note=metric)
        if metric == "knn":
            for k, predicted in probes.knn(train, split.train_labels, test).items():
                answers[f"knn_{k}"] = predicted == split.test_labels
        elif metric == "probe":
            probe = probes.linear_probe(train, split.train_labels, test, config.seed)
            answers["probe"] = probe.predicted == split.test_labels
            about |= {"probe_c": probe.c, "probe_converged": probe.converged}
        elif metric == "fewshot":
            for shots in (count for count in SHOTS if count <= _fewest(split)):
                answers[f"shot_{shots}"] = probes.few_shot(
                    train, split.train_labels, test, split.test_labels, shots, config.draws, config.seed
                )
        else:
            answers["finetune"] = _finetune(model, pack, split, config, bars) == split.test_labels
        bars.advance(task)
    bars.remove_task(task)
    return answers, about


def side_by_side(parts: Sequence[tuple[np.ndarray, str]]) -> tuple[np.ndarray, str]:
    """Several trunks' features of the same images as one, each at unit length, and their weight hashes."""
    if len(parts) == 1:
        return parts[0]
    return np.hstack([probes.unit(values) for values, _ in parts]), JOIN.join(weights for _, weights in parts)


def _finetune(model: str, pack: Pack, split: Split, config: EvaluateConfig, bars: Progress) -> np.ndarray:
    """(m,) predicted classes after the whole trunk was trained on the training part, the same way for every trunk."""
    device = choose(config.device)
    torch.manual_seed(config.seed)
    network = backbones.create(model, num_classes=len(split.classes), size=config.size)
    recipe = replace(
        FINETUNE, size=config.size, seed=config.seed, loader=config.loader, workers=config.workers,
        batch_size=config.batch_size,
    )  # fmt: skip
    train = Labelled(rows=split.train, labels=split.train_labels)
    none = Labelled(rows=split.train[:0], labels=split.train_labels[:0])
    tuned = fit(network, pack, train, none, recipe, device=device, bars=bars, report=lambda epoch, best: None)
    preprocessing = backbones.preprocessing(network, config.size)
    loader = open_loader(config.loader, pack, (preprocessing.size,), workers=config.workers, device=str(device))
    try:
        return predict(tuned, pack, split.test, preprocessing, config.batch_size, loader).argmax(1).numpy()
    finally:
        loader.close()


def summarise(
    measured: Mapping[str, Mapping[str, np.ndarray]],
    about: Mapping[str, Mapping[str, Any]],
    split: Split,
    baseline: str,
) -> dict[str, Any]:
    """Means, intervals and paired differences to the baseline, in per cent and points; JSON-able."""
    trunks = {
        name: {
            **about[name],
            "metrics": {metric: intervals.over_images(values) for metric, values in answers.items()},
        }
        for name, answers in measured.items()
    }
    differences = {
        name: {
            metric: intervals.difference(values, measured[baseline][metric])
            for metric, values in answers.items()
        }
        for name, answers in measured.items()
        if name != baseline
    }
    return {
        "trunks": trunks,
        "baseline": baseline,
        "differences": differences,
        "classes": len(split.classes),
        "class_names": list(split.classes),
        "left_out": list(split.left_out),
        "train_images": len(split.train),
        "test_images": len(split.test),
        "chance": 100 / len(split.classes),
        "preparation": "largest centred square, resized with antialias",
    }


def _flat(measured: Mapping[str, Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """One (m,) array per trunk and metric, named `trunk/metric`, so that others can pair and pool the answers; of
    few-shot the share of draws."""
    return {
        f"{name}/{metric}": values.mean(axis=0) if values.ndim == 2 else values
        for name, answers in measured.items()
        for metric, values in answers.items()
    }
