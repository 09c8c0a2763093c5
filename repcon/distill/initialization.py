"""Initialise a student: the backbone's own weights or a mean of several models', heads from teachers' classifiers."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from repcon.config import HeadConfig, TrainConfig, parse_named_values
from repcon.distill.distributed import DistributedContext
from repcon.distill.head_warmup import warm_up_heads
from repcon.distill.labelled_sample import draw_images, load_sample
from repcon.distill.loader import DistillLoader
from repcon.distill.loss import MultiHeadKLLoss
from repcon.distill.optim import autocast
from repcon.distill.weight_search import CROPS, SearchResult, balanced_weights, print_candidates, search_shares
from repcon.labels.layout import HeadInfo
from repcon.labels.store import LabelStore
from repcon.models import initial_weights
from repcon.models.factory import create_model
from repcon.models.initial_weights import InitialWeights, find_teacher_weights
from repcon.models.merge import SplitModel, check_mergeable, check_shares, split_classifier
from repcon.models.preprocessing import preprocessing_of
from repcon.models.student import Student, build_student, is_student
from repcon.runtime.console import print_plain
from repcon.runtime.errors import UserError


@dataclass(frozen=True, slots=True, kw_only=True)
class Initialization:
    """How a student was initialised; kept in checkpoints, results and model card."""

    init: str
    """`average` (of teachers), `students` (mean of earlier students), `backbone` or `random`."""
    shares: dict[str, float] = field(default_factory=dict)
    """Weights of the mean, by teacher's name or earlier student's folder."""
    search: SearchResult | None = None
    weights: dict[str, float] = field(default_factory=dict)
    """Factors of the heads' loss weights that balance them; 1 for heads that are not named."""
    warm_heads: list[str] = field(default_factory=list)
    """Heads that were initialised with a classifier of their teacher, or with heads of earlier students."""
    warmed_up_heads: list[str] = field(default_factory=list)
    """Heads that were fitted on the initial backbone's features."""

    def to_json(self) -> dict[str, Any]:
        """As plain values, without a search that was not made."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def check_init_settings(settings: TrainConfig) -> None:
    """Raises UserError for settings of the initialisation that contradict each other."""
    students_decide = {
        "init": settings.init != "auto",
        "init_weights": settings.init_weights,
        "models": settings.models,
    }
    for name, given in students_decide.items():
        if settings.init_students and given:
            raise UserError(f"{name}: the start is that of init_students; leave one of the two out")
    if settings.init_students and not settings.pretrained:
        raise UserError("init_students: they start from trained weights, and pretrained is false; set one of them")
    if settings.init == "average" and not settings.pretrained:
        raise UserError("init: 'average' starts from the teachers' weights, and pretrained is false; set one of them")
    if settings.init_weights and settings.init == "backbone":
        raise UserError("init_weights: init = 'backbone' averages nothing; leave one of them out")
    if settings.init_weights:
        check_shares(settings.init_weights, [head.name for head in settings.heads] or settings.init_weights)


def init_student(
    settings: TrainConfig, store: LabelStore, loader: DistillLoader, distributed: DistributedContext, *, resumed: bool
) -> tuple[Student, Initialization]:
    """The initial student on the ranks' devices, equal on all ranks; the main process decides.

    resumed: the weights will come from a checkpoint, so nothing is searched, loaded or fitted.
    """
    heads = {head.name: store.heads[head.name] for head in settings.heads}
    build = partial(
        build_student,
        settings.backbone,
        heads,
        size=settings.size,
        pretrained=settings.pretrained,
        init_heads=settings.init_heads,
        projection=settings.projection,
        freeze_blocks=settings.freeze_blocks,
        freeze_norm=settings.pretrained if settings.freeze_norm == "auto" else settings.freeze_norm,
    )
    if resumed or not settings.pretrained or not distributed.is_main:
        student, result = build(), Initialization(init="backbone" if settings.pretrained else "random")
        student = student.to(distributed.device)
    else:
        student, result = _init_on_main(settings, store, loader, distributed, heads, build)
    distributed.broadcast(student.state_dict().values())
    return student.to(memory_format=torch.channels_last), result  # pyright: ignore[reportCallIssue]


def _init_on_main(
    settings: TrainConfig,
    store: LabelStore,
    loader: DistillLoader,
    distributed: DistributedContext,
    heads: Mapping[str, HeadInfo],
    build: Callable[..., Student],
) -> tuple[Student, Initialization]:
    weights, init, reason = _load_weights(settings, store, heads)
    shares, search, earlier_heads = {}, None, {}
    if init == "average":
        shares, search = _choose_shares(settings, store, loader, distributed, weights.members)
    elif init == "students":
        shares = dict.fromkeys(weights.members, 1 / len(weights.members))
        earlier_heads = initial_weights.mean_heads(settings.init_students, heads)
    torch.manual_seed(settings.seed)
    student = build(teachers=weights.members, shares=shares, earlier=earlier_heads).to(distributed.device)
    warm = [name for name in heads if name in student.warm_heads]
    warmed_up = warm_up_heads(
        student, store, settings.heads, loader, tail=settings.tail, steps=settings.head_warmup_steps,
        preprocessing=preprocessing_of(student.backbone, settings.size),
        autocast=partial(autocast, distributed.device, settings.precision),
    )  # fmt: skip
    if search is not None:
        print_candidates(search)
    balance = balanced_weights(search) if search is not None and settings.balance_heads is True else {}
    result = Initialization(
        init=init, shares=shares, search=search, weights=balance, warm_heads=warm, warmed_up_heads=warmed_up
    )
    _print_summary(result, reason, weights, list(heads), settings)
    return student, result


def _load_weights(
    settings: TrainConfig, store: LabelStore, heads: Mapping[str, HeadInfo]
) -> tuple[InitialWeights, str, str]:
    """The models to average, `Initialization.init`, and the reason for it."""
    if settings.init == "backbone" and (settings.projection or not settings.init_heads):
        return InitialWeights(), "backbone", "as asked for"
    models = parse_named_values("models", settings.models, "NAME=MODEL", store.heads)
    backbone, name_of_own = create_model(settings.backbone, size=settings.size), f"the backbone {settings.backbone}"
    if settings.init_students:
        members = initial_weights.load_students(settings.init_students, settings.size)
        own = {name_of_own: split_classifier(backbone, settings.size)}
        check_mergeable(own | members, initial_weights.STUDENTS_FIELD, "name the students' architecture")
        return InitialWeights(members=members), "students", "as asked for"
    folder = Path(store.url) if "://" not in store.url else None
    metadata = [head.metadata for head in heads.values()]
    weights = find_teacher_weights(metadata, backbone, size=settings.size, models=models, folder=folder)
    own = {name_of_own: split_classifier(backbone, settings.size)} if weights.members else {}
    for name, member in list(weights.members.items()):
        try:
            check_mergeable(own | {name: member})
        except UserError as error:
            if _average_requested(settings):
                raise
            weights.other_architecture[name] = str(error)
            del weights.members[name]
    return weights, *_choose_init(settings, weights)


def _average_requested(settings: TrainConfig) -> bool:
    return settings.init == "average" or bool(settings.init_weights)


def _choose_init(settings: TrainConfig, weights: InitialWeights) -> tuple[str, str]:
    """`average` or `backbone`, and the reason. Raises UserError where the mean is requested and weights are missing."""
    if settings.init == "backbone":
        return "backbone", "as asked for"
    others = [f"{name} is of another architecture, {kind}" for name, kind in weights.other_architecture.items()]
    missing = [f"{name}: {reason}" for name, reason in weights.not_found.items()]
    if _average_requested(settings):
        names = settings.init_weights or [*weights.other_architecture, *weights.not_found]
        absent = [name for name in names if name not in weights.members]
        if absent:
            reasons = "; ".join([*others, *missing])
            raise UserError(f"init: no weights of {', '.join(absent)} to average ({reasons}); use init = 'backbone'")
        return "average", "as asked for"
    if others:
        return "backbone", "; ".join(others)
    if is_student(settings.backbone):
        return "backbone", "an earlier student"
    if not weights.members or (missing and len(weights.members) == 1):
        return "backbone", "; ".join(missing)
    return "average", "; ".join(["all that are here have the backbone's architecture", *missing])


def _choose_shares(
    settings: TrainConfig,
    store: LabelStore,
    loader: DistillLoader,
    distributed: DistributedContext,
    members: Mapping[str, SplitModel],
) -> tuple[dict[str, float], SearchResult | None]:
    """The weights of the mean: those of the recipe, else found by a search where members have linear classifiers."""
    if settings.init_weights:
        return check_shares(settings.init_weights, members), None
    linear = [name for name, member in members.items() if member.classifier is not None]
    if len(members) == 1 or not linear:
        return dict.fromkeys(members, 1 / len(members)), None
    heads = [
        HeadConfig(name=name, temperature=1.0 if 1.0 in store.heads[name].temperatures else 0.0) for name in linear
    ]
    loss = MultiHeadKLLoss(
        store.heads, heads, tail=settings.tail, implementation="torch", device=distributed.device, announce=False
    )
    images = draw_images(loader, CROPS, validation_first=True)
    sample = load_sample(loader, images, distributed.device, torch.clone)
    precision = partial(autocast, distributed.device, settings.precision)
    result = search_shares(members, loss, sample, autocast=precision)
    return result.shares, result


def _print_summary(
    result: Initialization, reason: str, weights: InitialWeights, heads: list[str], settings: TrainConfig
) -> None:
    """Print a line on the backbone, one on the heads' loss weights where they are balanced, and one on the heads."""
    if result.shares:
        mean = " + ".join(f"{share:.2f} {name}" for name, share in result.shares.items() if share)
        how = "chosen by their stored labels" if result.search is not None else reason
        print_plain(f"start: mean of weights, {mean} ({how})")
    else:
        print_plain(f"start: the weights of {settings.backbone} ({reason})")
    if result.weights:
        balance = ", ".join(f"{name} {weight:.2f}" for name, weight in result.weights.items())
        print_plain(f"weights of the heads, balanced: {balance}")
    teachers = {} if result.init == "students" else weights.members
    nonlinear = [name for name, member in teachers.items() if member.classifier is None]
    sources = {
        "from the students" if result.init == "students" else "from their teachers' classifiers": result.warm_heads,
        "learnt on the features of the start": result.warmed_up_heads,
        "random": [name for name in heads if name not in (*result.warm_heads, *result.warmed_up_heads)],
    }
    listed = "; ".join(f"{source}: {', '.join(names)}" for source, names in sources.items() if names)
    without = f"; not linear, so no start for a head: {', '.join(nonlinear)}" if nonlinear else ""
    projected = "; a projection has no classifier to start from" if settings.projection else ""
    print_plain(f"heads: {listed}{without}{projected}")
