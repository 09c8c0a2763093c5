"""What training from stored top-k labels loses against the teachers run in every step, in transfer accuracy.

    python -m benchmarks.topk_quality --data FOLDER          two minutes: that it runs, no result
    python -m benchmarks.topk_quality --data FOLDER --long   three seeds, k from 4 to all; 43 minutes on two cores
    ... --temperature 1   at which all learn, instead of 2; without `_bucket`
    ... --seeds 0,1,2,3   of the students; those that the work folder holds are not trained again

FOLDER (or REPCON_DATA) holds grocery.tar and objects.tar of tools/photos.py. A generalist and a teacher of one half of
the groceries label unlabelled photographs of other things; students of the generalist's architecture learn from them,
from stores of k = 4, 8, 16, 64 and all classes, and online: the same student, seed, batches and crops, with both
teachers' whole float32 answers computed in the step. Linear probe and kNN on the other half of the groceries.
The tail, what is left beside the k classes, is spread over the others evenly (the default) or, under `_bucket`, one
class of its own.

probe_k4_minus_online ...   points, mean over seeds of the paired difference; *_spread: its standard deviation
probe_online_spread         points, standard deviation of the online students over seeds (the 95 % interval of a mean is
                            2.5 times a spread to either side for three seeds, 1.05 times for six)
kl_k4 ...                   nats on held-out images, mean over both heads, against the whole stored distribution
"""

import json
import statistics
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import script
from benchmarks.harness.tables import Grid
from benchmarks.topk_quality.online_student import train
from repcon.commands import evaluate, precompute, teach
from repcon.commands import pack as packing
from repcon.config import (
    ClassSubset,
    EvaluateConfig,
    HeadConfig,
    OptimConfig,
    PackConfig,
    PrecomputeConfig,
    Tail,
    TeachConfig,
    TeacherConfig,
    TrainConfig,
)
from repcon.distill.distributed import DistributedContext
from repcon.distill.loader import DistillLoader
from repcon.distill.trainer import Trainer
from repcon.distill.validation import TeacherAgreement
from repcon.images.pack import ImagePack
from repcon.labels.store import LabelStore
from repcon.runtime.run_dir import write_json
from repcon.runtime.system import environment

GENERALIST, SIZE = "package:efficientnet_lite0", 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Protocol:
    """How much is run."""

    proxy_images: int
    teach_epochs: int
    epochs: int
    ks: tuple[int, ...]
    bucket: tuple[int, ...]
    """Those of the ks that are run with the tail as one bucket as well."""
    seeds: tuple[int, ...]
    temperature: float = 2.0


SHORT = Protocol(proxy_images=128, teach_epochs=1, epochs=1, ks=(4, 1000), bucket=(4,), seeds=(0,))
LONG = Protocol(proxy_images=1000, teach_epochs=4, epochs=6, ks=(4, 8, 16, 64, 1000), bucket=(4, 16), seeds=(0, 1, 2))


def main() -> None:
    parser = script.parser("Stored top-k labels against teachers in every step.", data="folder with the tars")
    parser.add_argument("--work", default="bench-run/topk-quality", help="folder for packs, labels, models; resumed")
    parser.add_argument("--long", action="store_true", help="the whole protocol")
    parser.add_argument("--temperature", type=float, help="of both heads' losses, 2 by default")
    parser.add_argument("--seeds", help="comma-separated")
    arguments = parser.parse_args()
    data = script.photographs(arguments)
    protocol, name = (LONG, "long") if arguments.long else (SHORT, "short")
    if arguments.temperature:
        protocol = replace(protocol, temperature=arguments.temperature, bucket=())
        name = f"{name}-{arguments.temperature:g}"
    if arguments.seeds:
        protocol = replace(protocol, seeds=tuple(sorted({int(seed) for seed in arguments.seeds.split(",")})))
    figures = summarise(run(data, Path(arguments.work) / name, protocol), protocol)
    found = grid(figures)
    figures["environment"] = environment() | {"device": "cpu"}  # All of it runs there.
    script.finish("topk-quality", figures, [found], arguments)


def run(data: Path, work: Path, protocol: Protocol) -> dict[str, list[dict[str, float]]]:
    """{"k4": [per seed {"probe", "knn" (%), "kl"}], ..., "online": [...]}."""
    sources = {"proxy": data / "objects.tar", "domain": data / "grocery.tar"}
    for name, source in sources.items():
        if not (work / name).exists():
            packing.run(PackConfig(source=str(source), out=str(work / name)))
    proxy = _part(work, protocol.proxy_images)
    task = work / "task-teacher"
    if not (task / "results.json").exists():
        teach.run(_teach(work, task, protocol))
    for k in protocol.ks:
        precompute.run(_labels(proxy, work, task, k, protocol.temperature))
    results: dict[str, list[dict[str, float]]] = {}
    whole = work / _store(max(protocol.ks))
    for seed in protocol.seeds:
        for name, (k, tail) in _students(protocol).items():
            out, stored = work / f"student-{name}-{seed}", work / _store(k)
            if not (out / "figures.json").exists():
                settings = replace(_settings(proxy, stored, protocol, seed), tail=tail)
                kl = _agreement(train(settings, out, online=name == "online"), settings, whole)
                write_json(out / "figures.json", {"kl": kl, **_transfer(work, out)})
            results.setdefault(name, []).append(json.loads((out / "figures.json").read_text()))
    return results


def _students(protocol: Protocol) -> dict[str, tuple[int, Tail]]:
    """{name: (k of the store, what becomes of the tail)}; the online student takes its crops from the whole store."""
    students: dict[str, tuple[int, Tail]] = {f"k{k}": (k, "uniform") for k in protocol.ks}
    students |= {f"k{k}_bucket": (k, "bucket") for k in protocol.bucket}
    students["online"] = max(protocol.ks), "uniform"
    return students


def _store(k: int) -> str:
    return f"labels-{k}.zarr"


def _part(work: Path, count: int) -> Path:
    """The first `count` proxy images, by content hash, as a pack of their own."""
    out = work / f"proxy-{count}"
    if not out.exists():
        pack = ImagePack.open(work / "proxy")
        chosen = sorted(range(len(pack)), key=lambda row: pack.hashes[row].tobytes())[:count]
        folder = work / f"proxy-{count}-pictures"
        folder.mkdir(parents=True, exist_ok=True)
        for number, row in enumerate(chosen):
            (folder / f"{number:05d}.jpg").write_bytes(pack.read(row))
        packing.run(PackConfig(source=str(folder), out=str(out)))
    return out


def _teach(work: Path, out: Path, protocol: Protocol) -> TeachConfig:
    return TeachConfig(
        data=str(work / "domain"),
        out=str(out),
        model=GENERALIST,
        classes=ClassSubset(seed=0, start=0.0, stop=0.5),
        size=SIZE,
        epochs=protocol.teach_epochs,
        freeze_blocks=11,
        freeze_norm=True,
        device="cpu",
    )


def _labels(proxy: Path, work: Path, task: Path, k: int, temperature: float) -> PrecomputeConfig:
    models = {"generalist": GENERALIST, "task": str(task)}
    return PrecomputeConfig(
        pack=str(proxy),
        out=str(work / _store(k)),
        teachers=tuple(TeacherConfig(name=name, model=model, size=SIZE) for name, model in models.items()),
        crops=4,
        k=k,
        temperatures=tuple(sorted({1.0, temperature})),
        device="cpu",
    )


def _settings(proxy: Path, stored: Path, protocol: Protocol, seed: int) -> TrainConfig:
    return TrainConfig(
        pack=str(proxy),
        store=str(stored),
        out="",
        backbone=GENERALIST,
        size=SIZE,
        epochs=protocol.epochs,
        batch_size=64,
        freeze_blocks=11,
        freeze_norm=True,
        heads=(
            HeadConfig(name="generalist", weight=0.25, temperature=protocol.temperature),
            HeadConfig(name="task", temperature=protocol.temperature),
        ),
        optim=OptimConfig(lr=1e-3),
        val_fraction=0.05,
        seed=seed,
    )


def _agreement(trainer: Trainer, settings: TrainConfig, whole: Path) -> float:
    """The student's KL to the whole distributions on held-out rows, in nats, mean over the heads."""
    store, distributed = (
        LabelStore.open(str(whole)),
        DistributedContext(rank=0, world_size=1, device=torch.device("cpu"), cpu_group=None),
    )
    held = DistillLoader(
        ImagePack.open(settings.pack), store, size=SIZE, batch_size=64, epochs=1, val_fraction=settings.val_fraction,
        seed=settings.seed,
    )  # fmt: skip
    agreement = TeacherAgreement(store, settings.heads, "bucket", distributed)
    trainer.student.eval()
    figures = agreement.measure(trainer.student, trainer.forward, held.validation_batches())
    held.close()
    return statistics.mean(head["kl"] for head in figures.values())


def _transfer(work: Path, out: Path, batch_size: int = 64) -> dict[str, float]:
    """Probe and kNN on the classes that no teacher saw, in %."""
    results = evaluate.run(
        EvaluateConfig(
            data=str(work / "domain"),
            out=str(out / "transfer"),
            backbones=(f"student={out}",),
            classes=ClassSubset(seed=0, start=0.5, stop=1.0),
            size=SIZE,
            metrics=("knn", "probe"),
            batch_size=batch_size,
            device="cpu",
        )
    )
    metrics = results["backbones"]["student"]["metrics"]
    return {name: float(metrics[name]["mean"]) for name in ("probe", "knn_5")}


def summarise(results: dict[str, list[dict[str, float]]], protocol: Protocol) -> dict[str, Any]:
    """The figures that the head of this file names."""
    figures: dict[str, Any] = {
        "seeds": len(protocol.seeds), "proxy_images": protocol.proxy_images, "temperature": protocol.temperature,
    }  # fmt: skip
    for name, runs in results.items():
        label = name.replace("k1000", "all")
        figures[f"kl_{label}"] = statistics.mean(run["kl"] for run in runs)
        for metric in ("probe", "knn_5"):
            values = [run[metric] for run in runs]
            figures[f"{metric}_{label}"] = statistics.mean(values)
            if name == "online":
                figures[f"{metric}_online_spread"] = _spread(values)
            else:
                pairs = zip(values, results["online"], strict=True)
                differences = [value - online[metric] for value, online in pairs]
                figures[f"{metric}_{label}_minus_online"] = statistics.mean(differences)
                figures[f"{metric}_{label}_minus_online_spread"] = _spread(differences)
    return figures


def _spread(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def grid(figures: dict[str, Any]) -> Grid:
    """The table."""
    rows = [(name, f"{value:.4f}" if name.startswith("kl") else f"{value:.2f}") for name, value in figures.items()]
    return Grid(
        title="Stored top-k labels against teachers in every step: % and points",
        titles=("figure", "value"),
        rows=rows,
    )
