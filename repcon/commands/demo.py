"""One student of a generalist and two experts, on real pictures, on the CPU, in a few minutes.

A generalist (EfficientNet-Lite0 with ImageNet weights) and two task teachers, each fine-tuned here on one half of a
domain's classes (animals, foods), are consolidated into ONE student on unlabelled pictures: of other things, and of the
teachers' halves without their labels. The other half of each domain's classes then tells how well the features
transfer; the verdict says which model is best and by how much. The steps are those of `repcon consolidate`: each is
the command of the same name, and can be repeated by hand on what the demo leaves.
"""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from repcon.commands import consolidate
from repcon.commands import pack as packing
from repcon.commands.outcome import print_step, run_step
from repcon.config import (
    ClassSubset,
    ConsolidateConfig,
    DemoConfig,
    EvaluateConfig,
    PackConfig,
    PrecomputeConfig,
    TeachConfig,
    TeacherConfig,
    TrainConfig,
    dump,
)
from repcon.evaluation import tables
from repcon.images.icon_drawings import render
from repcon.images.pack import ImagePack, count_shared_images, select_classes
from repcon.runtime.errors import UserError
from repcon.runtime.run_dir import RunDir

GENERALIST = "package:efficientnet_lite0"
FROZEN_BLOCKS = 5
"""The stem and the first five of sixteen blocks keep ImageNet's weights, which makes training quicker."""
FOLDS = 2
"""Every drawing of the tested halves is tested once: there are few."""
PROXY = ("objects", "activities")
"""The categories whose drawings, with those of the teachers' halves, serve as unlabelled images."""
OTHERS = "others"
"""What the pack of those is called."""
OWN = "domain"
"""What the domain of the user's own images is called."""


def run(config: DemoConfig) -> dict[str, Any]:
    """`repcon consolidate` on the demo's pictures; gives its figures and the licences of the pictures."""
    folder = Path(config.out)
    record = RunDir(folder, "demo", dump(config))
    domains, proxy, licences = _pictures(config, folder)
    whole = consolidation(config, domains, proxy)
    consolidate.check_settings(whole)
    teacher_metadata = consolidate.check_models(whole)
    results = consolidate.carry_out(
        whole, GENERALIST, teacher_metadata, record, extra={"licences": licences}, title="repcon demo"
    )
    tables.verdict(results["transfer"]["verdict"])
    return results


def consolidation(config: DemoConfig, domains: Mapping[str, Path], proxy: Path) -> ConsolidateConfig:
    """The settings: a teacher of one half of each domain's classes, the other half to be measured on; the student's
    are the defaults of `repcon train`, but for what makes it quick."""
    labelled = tuple(f"{name}={pack}" for name, pack in domains.items())
    return ConsolidateConfig(
        proxy=(str(proxy),),
        teachers=(f"generalist={GENERALIST}",),
        teach=labelled,
        evaluate=labelled,
        out=config.out,
        size=config.size,
        crops=config.crops,
        epochs=config.epochs,
        seed=config.seed,
        teaching=TeachConfig(
            data="",
            out="",
            model=GENERALIST,
            classes=_half(config, first=True),
            epochs=config.teacher_epochs,
            freeze_blocks=FROZEN_BLOCKS,
            freeze_norm=True,
            license="" if config.data else "weights Apache-2.0; drawings by their sets' licences, listed in the report",
        ),
        labelling=PrecomputeConfig(
            pack="",
            out="",
            teachers=(TeacherConfig(name="generalist", model=GENERALIST, license="Apache-2.0"),),
            temperatures=(1.0, 2.0),
        ),
        training=TrainConfig(pack="", store="", out="", freeze_blocks=FROZEN_BLOCKS),
        evaluation=EvaluateConfig(out="", classes=_half(config, first=False), folds=FOLDS),
    )


def _pictures(config: DemoConfig, folder: Path) -> tuple[dict[str, Path], Path, list[dict[str, str]]]:
    """The labelled packs by domain, the unlabelled proxy's pack, and the licences of pictures that the demo fetched."""
    if config.data:
        own, proxy = _own_pictures(config, folder)
        return {OWN: own}, proxy, []
    print_step("pictures: drawings from packages, rendered and packed")
    drawings, packs = folder / "drawings", folder / "packs"
    drawn = [render([name], drawings / name, config.size) for name in config.domains]
    render(PROXY, drawings / OTHERS, config.size)
    for name in (*config.domains, OTHERS):
        _pack(drawings / name, packs / name)
    domains = {name: packs / name for name in config.domains}
    _pack_proxy(config, folder, domains)
    licences = {row["artist"]: row for one in drawn for row in one["licences"]}
    return domains, packs / "proxy", list(licences.values())


def _pack_proxy(config: DemoConfig, folder: Path, domains: Mapping[str, Path]) -> None:
    """Packs, without their classes, drawings of other things and of the teachers' halves; none that is tested on."""
    opened = {name: ImagePack.open(pack) for name, pack in domains.items()}
    tested = {bytes(content) for pack in opened.values() for content in _hashes(pack, _half(config, first=False))}
    others = ImagePack.open(folder / "packs" / OTHERS)
    chosen = {OTHERS: (others, range(len(others)))}
    chosen |= {name: (pack, select_classes(pack, _half(config, first=True))[0]) for name, pack in opened.items()}
    for name, (pack, rows) in chosen.items():
        kept = [int(row) for row in rows if bytes(pack.hashes[row]) not in tested]
        _write_unlabelled(folder / "proxy", f"{name}-", pack, kept)
    _pack(folder / "proxy", folder / "packs" / "proxy")


def _own_pictures(config: DemoConfig, folder: Path) -> tuple[Path, Path]:
    """Packs the user's images; without a proxy of hers, the teacher's half serves, its labels left behind."""
    print_step("pictures: yours, packed")
    if config.proxy and Path(config.data).resolve() == Path(config.proxy).resolve():
        raise UserError(f"--proxy {config.proxy}: the proxy must not be the labelled data, whose half is tested on")
    domain = folder / "packs" / OWN
    _pack(config.data, domain)
    source = Path(config.proxy or folder / "proxy")
    if not config.proxy:
        pack = ImagePack.open(domain)
        _write_unlabelled(source, "", pack, select_classes(pack, _half(config, first=True))[0])
    _pack(source, folder / "packs" / "proxy")
    tested = _hashes(ImagePack.open(domain), _half(config, first=False))
    if shared := count_shared_images(tested, ImagePack.open(folder / "packs" / "proxy").hashes):
        raise UserError(f"--proxy {config.proxy}: holds {shared} of the images that are tested on; leave them out")
    return domain, folder / "packs" / "proxy"


def _pack(source: str | Path, out: Path) -> None:
    run_step("pack", packing.run, PackConfig(source=str(source), out=str(out)))


def _hashes(pack: ImagePack, classes: ClassSubset) -> np.ndarray:
    return pack.hashes[select_classes(pack, classes)[0]]


def _write_unlabelled(folder: Path, prefix: str, pack: ImagePack, rows: Iterable[int]) -> None:
    """Writes images of a pack side by side, without their classes."""
    folder.mkdir(exist_ok=True)
    for row in rows:
        path = folder / f"{prefix}{int(row):07d}.jpg"
        path.write_bytes(pack.read(int(row)))
        os.utime(path, (0, 0))  # A pack knows its source by names, sizes and times: the same when the demo goes on.


def _half(config: DemoConfig, *, first: bool) -> ClassSubset:
    return ClassSubset(seed=config.seed, start=0.0 if first else 0.5, stop=0.5 if first else 1.0)
