"""The whole way on real pictures, on the CPU, in a few minutes.

A generalist (EfficientNet-Lite0 with ImageNet weights) and a task teacher, fine-tuned here on one half of a domain's
classes, are consolidated on unlabeled pictures of other things; the other half of the classes then tells how well the
features transfer. Every step is the command of the same name, so each can be repeated by hand on what the demo leaves.
"""

import os
from pathlib import Path
from typing import Any

from repcon import inspection, packing, precompute, report, teach, train, transfer
from repcon.config import (
    ClassSubset,
    CropConfig,
    DemoConfig,
    EvaluateConfig,
    HeadConfig,
    InspectConfig,
    OptimConfig,
    PackConfig,
    PrecomputeConfig,
    ReportConfig,
    TeachConfig,
    TeacherConfig,
    TrainConfig,
    dump,
)
from repcon.errors import UserError
from repcon.images import Pack, class_rows, shared_images
from repcon.pictures.drawings import render
from repcon.record import Run, console

GENERALIST = "package:efficientnet_lite0"
FROZEN_BLOCKS = 5
"""The stem and the first five of sixteen blocks keep ImageNet's weights, which makes training quicker."""
TEMPERATURE = 2.0
PROXY = ("objects", "activities")
"""The categories whose drawings serve as unlabeled images: nothing of either domain is among them."""


def run(config: DemoConfig) -> dict[str, Any]:
    """Runs every command on the way; gives the transfer figures and the report's path."""
    folder = Path(config.out)
    run_record = Run(folder, "demo", dump(config))
    domain, proxy, licences = _pictures(config, folder)

    _step("1/6  teach: a task teacher from one half of the classes")
    teach.run(_teach(config, folder, domain))
    _step("2/6  precompute: generalist and teacher answer once about every crop")
    precompute.run(_precompute(config, folder, proxy))
    inspection.run(InspectConfig(store=str(folder / "labels.zarr")))
    _step("3/6  train: both heads, the consolidated student")
    train.run(_train(config, folder, proxy, "student", ("generalist", "teacher")))
    _step("4/6  train: the teacher's head alone, for comparison")
    train.run(_train(config, folder, proxy, "student-task-only", ("teacher",)))
    _step("5/6  evaluate: transfer to the half of the classes that nobody was taught")
    figures = transfer.run(_evaluate(config, folder, domain))
    _step("6/6  report")
    results = run_record.finish({"transfer": figures, "licences": licences})
    parts = ("", "teacher", "labels.zarr.run", "student", "student-task-only", "transfer")
    page = ReportConfig(
        paths=tuple(str(folder / part) for part in parts), out=str(folder / "report"), title="repcon demo"
    )
    report.run(page)
    return results


def _pictures(config: DemoConfig, folder: Path) -> tuple[Path, Path, list[dict[str, str]]]:
    """The labelled domain's pack, the unlabeled proxy's pack, and the licences of pictures that the demo fetched."""
    if config.data:
        return *_own_pictures(config, folder), []
    _step("0/6  pictures: drawings from packages, rendered and packed")
    domain = render([config.domain], folder / "drawings" / config.domain, config.size)
    render(PROXY, folder / "drawings" / "proxy", config.size)
    packs = folder / "packs"
    for name in (config.domain, "proxy"):
        packing.run(PackConfig(source=str(folder / "drawings" / name), out=str(packs / name)))
    return packs / config.domain, packs / "proxy", domain["licences"]


def _own_pictures(config: DemoConfig, folder: Path) -> tuple[Path, Path]:
    """Packs the user's images; without a proxy of hers, the teacher's half serves, its labels left behind."""
    _step("0/6  pictures: yours, packed")
    if config.proxy and Path(config.data).resolve() == Path(config.proxy).resolve():
        raise UserError(f"--proxy {config.proxy}: the proxy must not be the labelled data, whose half is tested on")
    domain = folder / "packs" / "domain"
    packing.run(PackConfig(source=config.data, out=str(domain)))
    source = Path(config.proxy) if config.proxy else _unlabelled_half(config, Pack.open(domain), folder / "proxy")
    packing.run(PackConfig(source=str(source), out=str(folder / "packs" / "proxy")))
    _check_proxy(config, Pack.open(domain), Pack.open(folder / "packs" / "proxy"))
    return domain, folder / "packs" / "proxy"


def _check_proxy(config: DemoConfig, domain: Pack, proxy: Pack) -> None:
    """Raises UserError where the proxy holds images of the half of the classes that is tested on."""
    rows, _, _ = class_rows(domain, _half(config, first=False))
    if shared := shared_images(domain.hashes[rows], proxy.hashes):
        raise UserError(f"--proxy {config.proxy}: holds {shared} of the images that are tested on; leave them out")


def _unlabelled_half(config: DemoConfig, pack: Pack, folder: Path) -> Path:
    """Writes the images of the teacher's half of the classes side by side, without their classes."""
    rows, _, _ = class_rows(pack, _half(config, first=True))
    folder.mkdir(exist_ok=True)
    for row in rows:
        path = folder / f"{row:07d}.jpg"
        path.write_bytes(pack.read(int(row)))
        os.utime(path, (0, 0))  # A pack knows its source by names, sizes and times: the same when the demo goes on.
    return folder


def _half(config: DemoConfig, *, first: bool) -> ClassSubset:
    return ClassSubset(seed=config.seed, start=0.0 if first else 0.5, stop=0.5 if first else 1.0)


def _step(title: str) -> None:
    console.rule(f"[bold]{title}", align="left")


def _teach(config: DemoConfig, folder: Path, domain: Path) -> TeachConfig:
    return TeachConfig(
        data=str(domain),
        out=str(folder / "teacher"),
        model=GENERALIST,
        classes=_half(config, first=True),
        size=config.size,
        epochs=12,
        optim=OptimConfig(lr=1e-3),
        freeze_blocks=FROZEN_BLOCKS,
        freeze_norm=True,
        licence="" if config.data else "weights Apache-2.0; drawings by their sets' licences, listed in the report",
        seed=config.seed,
    )


def _precompute(config: DemoConfig, folder: Path, proxy: Path) -> PrecomputeConfig:
    generalist = TeacherConfig(name="generalist", model=GENERALIST, size=config.size, licence="Apache-2.0")
    teacher = TeacherConfig(name="teacher", model=str(folder / "teacher"), size=config.size)
    return PrecomputeConfig(
        pack=str(proxy),
        out=str(folder / "labels.zarr"),
        teachers=(generalist, teacher),
        crops=config.crops,
        crop=CropConfig(seed=config.seed),
        k=16,
        temperatures=(1.0, TEMPERATURE),
    )


def _train(config: DemoConfig, folder: Path, proxy: Path, name: str, heads: tuple[str, ...]) -> TrainConfig:
    # The generalist counts a quarter: enough to hold its features in place, without drowning the teacher's.
    weights = {"generalist": 0.25, "teacher": 1.0}
    return TrainConfig(
        pack=str(proxy),
        store=str(folder / "labels.zarr"),
        out=str(folder / name),
        trunk=GENERALIST,
        heads=tuple(HeadConfig(name=head, weight=weights[head], temperature=TEMPERATURE) for head in heads),
        size=config.size,
        epochs=config.epochs,
        batch_size=64,
        optim=OptimConfig(lr=1e-3),
        freeze_blocks=FROZEN_BLOCKS,
        freeze_norm=True,
        seed=config.seed,
    )


def _evaluate(config: DemoConfig, folder: Path, domain: Path) -> EvaluateConfig:
    trunks = {
        "generalist": GENERALIST,
        "teacher": folder / "teacher",
        "student (teacher only)": folder / "student-task-only",
        "student (consolidated)": folder / "student",
    }
    return EvaluateConfig(
        data=str(domain),
        out=str(folder / "transfer"),
        trunks=tuple(f"{name}={trunk}" for name, trunk in trunks.items()),
        classes=_half(config, first=False),
        size=config.size,
        seed=config.seed,
    )
