"""How well backbones' features transfer: every backbone on the same images, the same splits and the same draws.

Images of the wanted classes are split once into a training and a test part. Features are extracted once per backbone
(`repcon.evaluation.features`), then probed (`repcon.evaluation.probes`). Accuracies are per cent of test images, with
95 % intervals over the test images and, few-shot, over the draws; differences to the baseline are paired. Other
training images, or a backbone trained again under another seed: how much that changes lies outside these intervals.
Several data sets are measured one by one and in the mean; a verdict ends every evaluation.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.markup import escape
from rich.progress import Progress

from repcon.config import EvaluateConfig, OptimConfig, TeachConfig, dump, require_least
from repcon.decode.factory import open_loader
from repcon.distill.finetune import Labelled, fit, predict
from repcon.evaluation import probes, tables
from repcon.evaluation.data_sets import Split, named, split_images
from repcon.evaluation.features import Reading, extract
from repcon.evaluation.heads import measure_heads, plan_heads
from repcon.evaluation.summary import combine, flat, summarise
from repcon.evaluation.verdict import headline, verdict
from repcon.images.pack import ImagePack
from repcon.images.packing import open_or_pack
from repcon.models.custom import is_factory
from repcon.models.factory import create_model
from repcon.models.preprocessing import preprocessing_of
from repcon.models.saved_model import CONFIG, model_folder, saved_class_names, saved_extra
from repcon.models.student import head_names
from repcon.runtime.console import console, few, progress
from repcon.runtime.device import choose
from repcon.runtime.errors import UserError
from repcon.runtime.run_dir import RunDir
from repcon.runtime.terminal import printable

SHOTS = (1, 5, 10)
JOIN = " + "
"""Between backbones whose features are measured side by side: what one backbone in their place would have to reach."""
FINETUNE = TeachConfig(
    data="", out="", epochs=10, optim=OptimConfig(lr=5e-4, weight_decay=0.02), validation=0.0, precision="fp32"
)
"""Fine-tuning: all weights, the same settings for every backbone, float32 on every device. The last epoch counts, so
that nothing is chosen on the test part."""


Measured = dict[str, dict[str, np.ndarray]]
"""{backbone: {metric: (m,) right or wrong per test image, for few-shot (draws, m)}} of one data set."""
Facts = dict[str, dict[str, Any]]
"""{backbone: what was found out about it}: model, weight_hash, input_size, heads, ..."""


def run(config: EvaluateConfig) -> dict[str, Any]:
    """Measures every backbone of `config`; gives the results and writes them.

    `config.out` gets `results.json`, `answers.npz` and `transfer.svg`; of several data sets the latter two lie in a
    folder of each set's name. Results of one data set have `summarise`'s keys, of several `combine`'s; `verdict` (of
    `repcon.evaluation.verdict`) and, where asked for, `heads` (of `repcon.evaluation.heads`) are added to both.
    """
    backbones, sets = _checked(config)
    output = RunDir(config.out, "evaluate", dump(config), exclusive=True)
    packs = {name: open_or_pack(str(one.data), output.path / "pack") for name, one in sets.items()}
    splits = {name: split_images(packs[name], one) for name, one in sets.items() if config.metrics}
    checks = plan_heads(config, backbones, packs)
    measured: dict[str, Measured] = {}
    about: dict[str, Facts] = {}
    with progress() as bars:
        task = bars.add_task("backbones", total=len(backbones) * len(splits), unit="backbones", note="")
        for name, split in splits.items():
            _point_out_taught(backbones, packs[name], split)
            measured[name], about[name] = {}, {}
            for backbone, model in backbones.items():
                bars.update(task, note=backbone if len(sets) == 1 else f"{backbone}, {name}")
                measured[name][backbone], about[name][backbone] = measure(model, packs[name], split, sets[name], bars)
                output.log("backbone", name=backbone, dataset=name, **about[name][backbone])
                bars.update(task, advance=1, note="")
        heads = measure_heads(checks, config, bars)
    results = _results(measured, about, splits, sets, config)
    folders = {name: output.path / name if len(sets) > 1 else output.path for name in results}
    for name, folder in folders.items():
        _write_answers(measured[name], splits[name], folder)
    whole = _whole(results, heads, config)
    if measured:
        whole["verdict"] = _verdict(config.student, next(iter(about.values())), measured)
    whole = output.finish(whole)  # before anything is drawn or shown, which may fail
    for name, folder in folders.items():
        tables.plot(results[name], folder / "transfer.svg")
    _show(whole, results)
    console.print(f"written to {escape(str(output.path))}", soft_wrap=True, highlight=False)
    tables.verdict(whole.get("verdict", {}))
    return whole


def _checked(config: EvaluateConfig) -> tuple[dict[str, str], dict[str, EvaluateConfig]]:
    """{name: backbone} and {name: data set's settings}. Raises UserError for what cannot be measured."""
    require_least(config, fewshot_trials=1, size=0, batch_size=1, num_workers=0, seed=0)
    if not config.metrics and not config.heads:
        raise UserError("metrics: none named; leave it out, or name some of knn, probe, fewshot, finetune")
    backbones = parse_backbones(config.backbones, config.baseline)
    if config.student and config.student not in backbones:
        raise UserError(f"student: no backbone is called {config.student!r}; there are {', '.join(backbones)}")
    joined = [name for name, model in backbones.items() if JOIN in model]
    if joined and "finetune" in config.metrics:
        raise UserError(
            f"metrics: fine-tuning takes one backbone, and {joined[0]} is several; leave `finetune` or it out"
        )
    made = [name for name, model in backbones.items() if is_factory(model)]
    if made and "finetune" in config.metrics:
        raise UserError(f"metrics: fine-tuning takes models of timm, and {made[0]} is not; leave `finetune` or it out")
    return backbones, named(config)


def _write_answers(measured: Measured, split: Split, folder: Path) -> None:
    """`answers.npz` of one data set."""
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / "answers.npz", **flat(measured), test_rows=split.test, test_labels=split.test_labels)  # pyright: ignore[reportArgumentType]


def _results(
    measured: Mapping[str, Measured],
    about: Mapping[str, Facts],
    splits: Mapping[str, Split],
    sets: Mapping[str, EvaluateConfig],
    config: EvaluateConfig,
) -> dict[str, dict[str, Any]]:
    """The results of each data set."""
    baseline = config.baseline or next(iter(next(iter(measured.values()), {})), "")
    return {
        name: summarise(answers, about[name], splits[name], baseline)
        | {
            "data": sets[name].data,
            "size": config.size,
            "shots_left_out": [shots for shots in SHOTS if shots > splits[name].fewest],
        }
        for name, answers in measured.items()
    }


def _whole(
    results: Mapping[str, dict[str, Any]], heads: list[dict[str, Any]], config: EvaluateConfig
) -> dict[str, Any]:
    """The one data set's results, or those of several, and what the heads came to."""
    whole = dict(next(iter(results.values()), {}))
    if len(results) > 1:
        whole = combine(results, whole["baseline"]) | {"size": config.size}
    return whole | ({"heads": heads} if heads else {})


def _show(whole: Mapping[str, Any], results: Mapping[str, Mapping[str, Any]]) -> None:
    """Every table, that over all data sets last."""
    for number, (name, one) in enumerate(results.items()):
        if not number:
            _point_out_sizes(one["backbones"])
        shown = name if len(results) > 1 else ""
        _point_out_left_out(one, shown)
        tables.table(one, shown)
    tables.heads(whole.get("heads", ()))
    if len(results) > 1:
        tables.summary(whole)


def _verdict(asked: str, about: Facts, measured: Mapping[str, Measured]) -> dict[str, Any]:
    """About the backbone that was asked for, else the student with the most heads (the last of equals), else the best.

    Backbones side by side are no single model: they are compared with nothing.
    """
    single = [name for name, facts in about.items() if JOIN not in facts["model"]] or list(about)
    students = [name for name in single if about[name]["heads"]]
    if asked:
        subject = asked
    elif students:
        subject = max(reversed(students), key=lambda name: len(about[name]["heads"]))
    else:
        metric = headline(list(measured.values()))
        answers = list(measured.values())
        subject = max(single, key=lambda name: sum(models[name][metric].mean() for models in answers) if metric else 0)
    return verdict(measured, subject, [name for name in single if name != subject])


def _point_out_left_out(results: Mapping[str, Any], name: str) -> None:
    """Says which classes and shots were left out of a data set."""
    where = f"{name}: " if name else ""
    if results["left_out"]:
        console.print(f"{where}left out, with one image each: {escape(', '.join(results['left_out']))}")
    if results["shots_left_out"]:
        shots = ", ".join(f"{count}-shot" for count in results["shots_left_out"])
        smallest, count = results["smallest_class"]
        console.print(f"{where}left out: {shots}; the class {escape(smallest)} has {count} to train on")


def _point_out_sizes(about: Mapping[str, Mapping[str, Any]]) -> None:
    """Says which input sizes backbones were measured at where they differ."""
    sizes = {name: facts["input_size"] for name, facts in about.items()}
    if len({tuple(size) for size in sizes.values()}) > 1:
        told = ", ".join(f"{name} {' + '.join(map(str, size))}" for name, size in sizes.items())
        what = f"each backbone at its own input size, in pixels: {told}; `size` takes one for all"
        console.print(f"[yellow]note[/]: {escape(what)}", highlight=False)


def parse_backbones(backbones: tuple[str, ...], baseline: str) -> dict[str, str]:
    """`name=backbone` entries to {name: what `extract` takes}; an entry without a name is named by its end.

    `name=backbone + backbone` is several backbones side by side.
    """
    named: dict[str, str] = {}
    for entry in backbones:
        name, equals, model = entry.partition("=")
        if not equals or Path(entry).is_dir():  # a path may hold a `=` of its own
            name, model = Path(entry).name, entry
        name = printable(name)  # it goes into tables, plots and the names of arrays
        if name in named:
            raise UserError(f"backbones: two are called {name!r}; give each a name of its own, `name=backbone`")
        named[name] = JOIN.join(resolve_model(part) for part in model.split(JOIN))
    if not named:
        raise UserError("backbones: none given; name at least one, for example `generalist=package:efficientnet_lite0`")
    if baseline and baseline not in named:
        raise UserError(f"baseline: no backbone is called {baseline!r}; there are {', '.join(named)}")
    return named


def resolve_model(model: str) -> str:
    """A run's output folder to the folder inside it that holds the model; anything else is given back as it is."""
    folder = Path(model)
    if not folder.is_dir() or (folder / CONFIG).is_file():
        return model
    if (inner := model_folder(folder)) == folder:
        raise UserError(
            f"{model}: holds no model (no config.json); name the output folder of `repcon train` or `teach`"
        )
    return str(inner)


def _point_out_taught(backbones: Mapping[str, str], pack: ImagePack, split: Split) -> None:
    """Warn where a backbone was taught classes of this very pack, or distilled on it, as its folder says."""
    for name, model in backbones.items():
        taught: set[str] = set()
        for part in model.split(JOIN):
            saved = Path(part, CONFIG).is_file() and saved_extra(part)
            if saved and saved.get("data_fingerprint") == pack.fingerprint:
                taught |= set(saved_class_names(part)) & set(split.classes)
            if saved and saved.get("proxy_fingerprint") == pack.fingerprint:
                what = f"{name} was distilled on the images of this very pack: what it reaches is no transfer"
                console.print(f"[yellow]careful[/]: {escape(what)}", highlight=False)
        if taught:
            names = few(sorted(taught))
            what = f"{len(taught)} of the {len(split.classes)} classes ({names}) were taught to {name} on these images"
            console.print(f"[yellow]careful[/]: {escape(what)}; what it reaches there is no transfer", highlight=False)


def measure(
    model: str, pack: ImagePack, split: Split, config: EvaluateConfig, bars: Progress
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """One backbone's answers, {metric: (m,) right or wrong per test image, for few-shot (draws, m)}, and facts."""
    reading = Reading(
        size=config.size,
        batch_size=config.batch_size,
        loader=config.loader,
        num_workers=config.num_workers,
        device=str(choose(config.device)),
        cache=Path(config.cache or Path(config.out) / "features"),
    )
    rows = np.concatenate([split.train, split.test])
    parts = [extract(part, pack, rows, reading, bars) for part in model.split(JOIN)]
    values, weights = side_by_side([(part.values, part.weight_hash) for part in parts])
    train, test = values[: len(split.train)], values[len(split.train) :]
    answers: dict[str, np.ndarray] = {}
    about: dict[str, Any] = {"model": model, "weight_hash": weights, "dimensions": values.shape[1]}
    about |= {"input_size": [part.input_size for part in parts], "heads": list(head_names(model))}
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
            for shots in (count for count in SHOTS if count <= split.fewest):
                answers[f"shot_{shots}"] = probes.few_shot(
                    train, split.train_labels, test, split.test_labels, shots, config.fewshot_trials, config.seed
                )
        else:
            answers["finetune"] = _finetune(model, pack, split, config, bars) == split.test_labels
        bars.advance(task)
    bars.remove_task(task)
    return answers, about


def side_by_side(parts: Sequence[tuple[np.ndarray, str]]) -> tuple[np.ndarray, str]:
    """Several backbones' features of the same images as one, each at unit length, and their weight hashes."""
    if len(parts) == 1:
        return parts[0]
    return np.hstack([probes.unit(values) for values, _ in parts]), JOIN.join(weights for _, weights in parts)


def _finetune(model: str, pack: ImagePack, split: Split, config: EvaluateConfig, bars: Progress) -> np.ndarray:
    """(m,) predicted classes after fine-tuning on the training part."""
    device = choose(config.device)
    torch.manual_seed(config.seed)
    network = create_model(model, num_classes=len(split.classes), size=config.size)
    recipe = replace(
        FINETUNE, size=config.size, seed=config.seed, loader=config.loader, num_workers=config.num_workers,
        batch_size=config.batch_size,
    )  # fmt: skip
    train = Labelled(rows=split.train, labels=split.train_labels)
    none = Labelled(rows=split.train[:0], labels=split.train_labels[:0])
    tuned = fit(network, pack, train, none, recipe, device=device, bars=bars, report=lambda epoch, best: None)
    preprocessing = preprocessing_of(network, config.size)
    loader = open_loader(config.loader, pack, (preprocessing.size,), num_workers=config.num_workers, device=str(device))
    try:
        return predict(tuned, pack, split.test, preprocessing, config.batch_size, loader).argmax(1).numpy()
    finally:
        loader.close()
