"""`repcon consolidate`: from images and teachers to one backbone and a report.

Every step is the command of the same name, so each can be repeated by hand on what is left in the output folder:
`packs/`, `NAME-teacher/`, `labels.zarr`, `student/`, `transfer/`, `report/`. Every step goes on where it was stopped,
and so does the whole. What can be checked is checked before the first teacher is taught.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from repcon.commands import consolidation_plan as plan
from repcon.commands import evaluate, inspect, precompute, teach, train
from repcon.commands import report as reporting
from repcon.commands.outcome import print_step, run_step
from repcon.config import ConsolidateConfig, InspectConfig, check_minimum, dump
from repcon.distill.checkpoint import require_same_settings
from repcon.evaluation import tables
from repcon.evaluation.backbones import resolve_model
from repcon.evaluation.data_sets import parse_data_sets, split_images
from repcon.images.pack import ImagePack, count_shared_images, select_classes
from repcon.images.packing import open_or_pack, write_pack
from repcon.labels.manifest import TeacherMetadata
from repcon.models import teacher as teachers
from repcon.models.custom import is_module_function
from repcon.models.factory import create_model
from repcon.precompute import context
from repcon.precompute.output_store import with_store_settings
from repcon.runtime.console import console, print_plain, warn
from repcon.runtime.errors import UserError
from repcon.runtime.run_dir import RunDir, require_free

FREE = ("out", "evaluate", "evaluation", "device", "estimate", "dry_run", "allow_overlap")
"""What may differ where a run goes on: what the student is made of does not depend on it."""


def run(config: ConsolidateConfig) -> dict[str, Any]:
    """Carries out the steps that are left; gives the figures of all. With `dry_run` or `estimate` it makes nothing."""
    require_free(config.out, "consolidate")
    if Path(config.out, "labels.zarr").exists() or list(Path(config.out).glob("*-teacher")):
        require_same_settings(config, "consolidate", FREE)  # else packs at most, which know their sources themselves
    check_settings(config)
    teacher_metadata = check_models(config)
    backbone = plan.choose_backbone(config, teacher_metadata)
    require_backbone(backbone, teacher_metadata)
    if config.dry_run:
        return _show_plan(config, backbone)
    record = RunDir(config.out, "consolidate", dump(config), exclusive=True)
    if config.estimate:
        return _estimate(config)
    named = plan.sources(config)
    title = f"One backbone of {', '.join([*named.teachers, *named.taught])}"
    results = carry_out(config, backbone, teacher_metadata, record, extra={}, title=title)
    tables.verdict(results["transfer"].get("verdict", {}))
    return results


def carry_out(
    config: ConsolidateConfig,
    backbone: str,
    teacher_metadata: Sequence[TeacherMetadata],
    record: RunDir,
    *,
    extra: Mapping[str, Any],
    title: str,
) -> dict[str, Any]:
    """Every step in turn; what is finished is left as it is. `extra` is added to the results before the report."""
    named = plan.sources(config)
    if plan.packs_to_write(config):
        print_step("pack")
    proxy = _pack_proxy(config)
    labelled = dict.fromkeys([*named.taught.values(), *named.evaluated.values()])
    packs = {source: open_or_pack(source, Path(config.out, "packs")) for source in labelled}  # each source once
    _check_sets(config, proxy, {name: packs[source] for name, source in named.evaluated.items()})
    for name, source in named.taught.items():
        print_step(f"teach {name}")
        run_step("teach", teach.run, plan.teaching(config, name, packs[source].url))
    made = {name: plan.teacher_folder(config, name) for name in named.taught}
    print_step(f"precompute: {', '.join([*named.teachers, *made])} answer once about every crop")
    run_step("precompute", precompute.run, plan.labelling(config, made))
    inspect.run(InspectConfig(store=plan.store(config)))
    print_step("train: ONE student of all of them")
    trained = run_step("train", train.run, plan.training(config, backbone))
    figures = _evaluate(config, teacher_metadata, packs)
    print_step("report")
    results = {
        "sentence": _sentence(trained, backbone, [*named.teachers, *made], proxy),
        "student": trained["student"],
        "report": str(Path(config.out, "report", "report.html")),
        "backbone": backbone,
        "store": plan.store(config),
        "pack": proxy.url,
        "transfer": figures,
        **extra,
    }
    results = record.finish(results)
    reporting.run(plan.report(config, named.taught, title))  # the command's last line names it
    return results


def check_settings(config: ConsolidateConfig) -> None:
    """Raises UserError for settings that make no sense in any step, before anything is opened."""
    check_minimum(config, size=0, limit=0, crops=0, epochs=0, seed=0)
    made = {name: plan.teacher_folder(config, name) for name in plan.sources(config).taught}
    for name in made:
        teach.check(plan.teaching(config, name, ""))
    context.check(plan.labelling(config, made))
    train.check(plan.training(config, config.teaching.model))


def check_models(config: ConsolidateConfig) -> list[TeacherMetadata]:
    """Loads every teacher that is there, one after the other, on the CPU. Raises UserError naming all that fail."""
    found, failed = [], []
    for teacher in plan.given_teachers(config):
        try:
            found.append(teachers.load_teacher(teacher, "cpu").metadata)
        except UserError as error:
            failed.append(str(error))
    if config.teach:
        try:
            create_model(config.teaching.model)
        except UserError as error:
            failed.append(f"teach: {error}")
    if failed:
        raise UserError("; ".join(failed))
    return found


def require_backbone(backbone: str, teacher_metadata: Sequence[TeacherMetadata]) -> None:
    """Raises UserError where the student cannot be made of this."""
    if backbone in {metadata.model for metadata in teacher_metadata} and not is_module_function(backbone):
        return
    try:
        create_model(backbone, num_classes=0)
    except UserError as error:
        raise UserError(f"backbone: {error}") from error


def _pack_proxy(config: ConsolidateConfig) -> ImagePack:
    if plan.proxy_pack(config) != config.proxy[0]:
        run_step("pack", write_pack, plan.packing(config))
    elif config.limit:
        raise UserError(f"limit: {config.proxy[0]} is a pack, which is taken whole; leave the limit out")
    return ImagePack.open(plan.proxy_pack(config))


def _check_sets(config: ConsolidateConfig, proxy: ImagePack, packs: Mapping[str, ImagePack]) -> None:
    """Raises UserError where a data set cannot be measured on, or its measured images are in the proxy."""
    if not packs:
        return
    settings = parse_data_sets(plan.evaluation(config, {name: pack.url for name, pack in packs.items()}, {}, ()))
    for name, pack in packs.items():
        split_images(pack, settings[name])
        rows = select_classes(pack, settings[name].classes)[0]
        if shared := count_shared_images(pack.hashes[rows], proxy.hashes):
            what = f"--proxy {' '.join(config.proxy)}: holds {shared} of the images that {name} is measured on"
            if not config.allow_overlap:
                raise UserError(f"{what}; leave them out, or give --allow-overlap")
            warn(what)


def _evaluate(
    config: ConsolidateConfig, teacher_metadata: Sequence[TeacherMetadata], packs: Mapping[str, ImagePack]
) -> dict:
    """The student compared with every teacher; {} where no labelled images are given."""
    named = plan.sources(config)
    if not named.evaluated:
        return {}
    print_step("evaluate: the student and its teachers")
    models = {
        metadata.name: resolve_model(metadata.model)
        for metadata in teacher_metadata
        if not is_module_function(metadata.model)
    }
    if left := [metadata.name for metadata in teacher_metadata if is_module_function(metadata.model)]:
        what = f"{', '.join(left)}: a function's features are not known, so the student is not compared with it"
        warn(what, "note")
    models |= {f"{name} teacher": plan.teacher_folder(config, name) for name in named.taught}
    measured = {packs[source].fingerprint for source in named.evaluated.values()}
    held_out = [name for name, source in named.taught.items() if packs[source].fingerprint in measured]
    held_out = held_out if config.teaching.val_fraction else []
    sets = {name: packs[source].url for name, source in named.evaluated.items()}
    return run_step("evaluate", evaluate.run, plan.evaluation(config, sets, models, held_out))


def _estimate(config: ConsolidateConfig) -> dict[str, Any]:
    """What labelling would take; for a teacher that is still to be made its start answers, which takes as long."""
    proxy = _pack_proxy(config)
    start = {name: config.teaching.model for name in plan.sources(config).taught}
    settings = plan.labelling(config, start)
    if start:
        console.print(f"note: {', '.join(start)} is not taught yet; {config.teaching.model} answers in its place")
    figures = precompute.run(replace(settings, estimate=True))
    print_plain(f"the proxy's pack is kept: {proxy.url}")
    return figures


def _show_plan(config: ConsolidateConfig, backbone: str) -> dict[str, Any]:
    """Prints the steps with what they read and write."""
    sources, out = plan.sources(config), Path(config.out)
    made = {name: plan.teacher_folder(config, name) for name in sources.taught}
    labels, training = with_store_settings(plan.labelling(config, made)), plan.training(config, backbone)
    sets = ", ".join(f"{name} ({source})" for name, source in sources.evaluated.items())
    rows = [
        ("pack", ", ".join(config.proxy), plan.proxy_pack(config)),
        *(
            ("teach", f"{name}: {config.teaching.model} on {source}", made[name])
            for name, source in sources.taught.items()
        ),
        ("precompute", f"{', '.join(one.name for one in labels.teachers)}; {labels.crops} crops per image", labels.out),
        ("train", f"{backbone}, {training.epochs} epochs", training.out),
        *([("evaluate", sets, str(out / "transfer"))] if sets else []),
        ("report", "all of it", str(out / "report" / "report.html")),
    ]
    table = Table("step", "from", "to", title="The plan", title_justify="left")
    for row in rows:
        table.add_row(*map(escape, row))
    console.print(table)
    overlap = " and whether the proxy holds measured images" if sets else ""
    console.print(f"teachers load; not looked at yet: the images{overlap}; nothing was written", style="dim")
    return {"plan": [dict(zip(("step", "from", "to"), row, strict=True)) for row in rows], "backbone": backbone}


def _sentence(trained: Mapping[str, Any], backbone: str, names: Sequence[str], proxy: ImagePack) -> str:
    """What came out, where nothing was measured on labelled images."""
    made = f"student: {backbone}, distilled from {', '.join(names)} on {len(proxy):,} images"
    heads = trained.get("validation", {}).get("heads", {})
    shares = ", ".join(f"{name} {100 * held['agreement']:.0f} %" for name, held in heads.items())
    return f"{made}; the same class as its teacher on held-out images: {shares}" if shares else made
