"""The settings of every step of `repcon consolidate`, from the command's own."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from repcon.config import (
    ConsolidateConfig,
    DatasetConfig,
    EvaluateConfig,
    PackConfig,
    PrecomputeConfig,
    ReportConfig,
    TeachConfig,
    TeacherConfig,
    TrainConfig,
    parse_named_values,
    split_name,
)
from repcon.images import hub
from repcon.images.packing import is_pack
from repcon.labels.manifest import TeacherMetadata
from repcon.models.custom import is_module_function
from repcon.runtime.errors import UserError

GENERALIST = "generalist"
STUDENT = "student"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sources:
    """Teachers and labelled images that the command was given, by name."""

    teachers: dict[str, str]
    """{name: model} of the teachers that are there."""
    taught: dict[str, str]
    """{name: labelled images} of those that are made here."""
    evaluated: dict[str, str]
    """{name: labelled images}."""


def sources(config: ConsolidateConfig) -> Sources:
    """Raises UserError for what is missing, named twice, or named in another form than NAME=VALUE."""
    if not config.proxy:
        raise UserError("proxy: no images named; name folders, tars or a pack of images to distil on")
    teachers = parse_named_values("teachers", config.teachers, "NAME=MODEL")
    taught = parse_named_values("teach", config.teach, "NAME=LABELLED")
    evaluated = parse_named_values("evaluate", map(_with_name, config.evaluate), "NAME=LABELLED")
    if both := sorted(teachers.keys() & taught.keys()):
        raise UserError(f"teach: {', '.join(both)} is among the teachers too; each teacher needs a name of its own")
    if len(teachers) + len(taught) < 1:
        raise UserError("teachers: none named; give NAME=MODEL for each, or --teach NAME=LABELLED")
    if STUDENT in teachers.keys() | taught.keys():
        raise UserError(f"teachers: {STUDENT!r} is what the result is called; give the teacher another name")
    return Sources(teachers=teachers, taught=taught, evaluated=evaluated)


def _with_name(entry: str) -> str:
    """A data set without a name is called by the end of its path, one of the Hugging Face hub by its own name."""
    return f"{hub.short_name(entry)}={entry}" if hub.is_dataset(entry) else "=".join(split_name(entry))


def proxy_pack(config: ConsolidateConfig) -> str:
    """Where the proxy's pack is, or will be."""
    alone = len(config.proxy) == 1 and is_pack(config.proxy[0])
    return config.proxy[0] if alone else str(Path(config.out, "packs", "proxy"))


def packs_to_write(config: ConsolidateConfig) -> bool:
    """Whether any of the images is not a pack yet."""
    named = sources(config)
    return not all(map(is_pack, (proxy_pack(config), *named.taught.values(), *named.evaluated.values())))


def store(config: ConsolidateConfig) -> str:
    return str(Path(config.out, "labels.zarr"))


def teacher_folder(config: ConsolidateConfig, name: str) -> str:
    """The folder of a teacher that is made here."""
    return str(Path(config.out, f"{name}-teacher"))


def packing(config: ConsolidateConfig) -> PackConfig:
    source = config.proxy[0] if len(config.proxy) == 1 else config.proxy
    return replace(config.packing, source=source, out=proxy_pack(config), limit=config.limit or config.packing.limit)


def teaching(config: ConsolidateConfig, name: str, pack: str) -> TeachConfig:
    return _common(replace(config.teaching, data=pack, out=teacher_folder(config, name)), config)


def given_teachers(config: ConsolidateConfig) -> tuple[TeacherConfig, ...]:
    """The teachers that are there; those of the recipe's [labelling] have settings of their own."""
    detailed = {teacher.name: teacher for teacher in config.labelling.teachers}
    named = sources(config).teachers
    found = [detailed.get(name) or TeacherConfig(name=name, model=model) for name, model in named.items()]
    return tuple(replace(teacher, size=config.size or teacher.size) for teacher in found)


def labelling(config: ConsolidateConfig, taught: Mapping[str, str]) -> PrecomputeConfig:
    """taught: {name: model} of the teachers that were made here."""
    made = [TeacherConfig(name=name, model=model, size=config.size) for name, model in taught.items()]
    one = replace(
        config.labelling, pack=proxy_pack(config), out=store(config), teachers=(*given_teachers(config), *made),
        crops=config.crops or config.labelling.crops,
    )  # fmt: skip
    crop = replace(one.crop, seed=config.seed or one.crop.seed)
    return replace(one, crop=crop, device=one.device if config.device == "auto" else config.device)


def training(config: ConsolidateConfig, backbone: str) -> TrainConfig:
    one = replace(
        config.training, pack=proxy_pack(config), store=store(config), out=str(Path(config.out, STUDENT)),
        backbone=backbone, epochs=config.epochs or config.training.epochs,
    )  # fmt: skip
    return _common(one, config)


def evaluation(
    config: ConsolidateConfig, packs: Mapping[str, str], models: Mapping[str, str], held_out: Iterable[str]
) -> EvaluateConfig:
    """packs: {data set: pack}; models: {name: teacher}, the student is added; held_out: teachers made here whose
    packs are measured on, so that their held-out images tell what the student's heads are worth."""
    classes = config.evaluation.classes
    backbones = {**models, STUDENT: str(Path(config.out, STUDENT))}
    checked = {name: teacher_folder(config, name) for name in held_out}
    one = replace(
        config.evaluation,
        data="",
        datasets=tuple(DatasetConfig(name=name, data=pack, classes=classes) for name, pack in packs.items()),
        out=str(Path(config.out, "transfer")),
        backbones=tuple(f"{name}={model}" for name, model in backbones.items()),
        student=STUDENT,
        heads=bool(checked),
        teachers=tuple(f"{name}={folder}" for name, folder in checked.items()),
    )
    return _common(one, config)


def report(config: ConsolidateConfig, taught: Iterable[str], title: str) -> ReportConfig:
    """Of all the steps; their folders are those that exist by then."""
    folders = ["", *(f"{name}-teacher" for name in taught), "labels.zarr.run", STUDENT, "transfer"]
    paths = (Path(config.out, folder) for folder in folders)
    here = tuple(str(path) for path in paths if path.is_dir())
    return ReportConfig(paths=here, out=str(Path(config.out, "report")), title=title)


def choose_backbone(config: ConsolidateConfig, teacher_metadata: Sequence[TeacherMetadata]) -> str:
    """What the student starts from: as the user says, else the generalist, else the teacher of most classes, else what
    the teachers that are made here start from."""
    plain = TrainConfig(pack="", store="", out="").backbone
    asked = config.backbone or (config.training.backbone if config.training.backbone != plain else "")
    models = {metadata.name: metadata.model for metadata in teacher_metadata if not is_module_function(metadata.model)}
    loadable = (metadata for metadata in teacher_metadata if metadata.name in models)
    most = max(loadable, key=lambda metadata: metadata.num_classes, default=None)
    return asked or models.get(GENERALIST, "") or (most.model if most else config.teaching.model)


def _common(one: Any, config: ConsolidateConfig) -> Any:
    """The step's settings with size, seed and device of the whole where these are given."""
    given = {name: value for name in ("size", "seed", "device") if (value := getattr(config, name)) not in (0, "auto")}
    return replace(one, **given)
