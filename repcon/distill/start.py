"""A student's initial weights: the teachers' mean or the backbone's own; heads from the teachers' classifiers."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from repcon.config import HeadConfig, TrainConfig, named_values
from repcon.distill import mix
from repcon.distill.distributed import DistributedContext
from repcon.distill.head_warmup import warm_up
from repcon.distill.loader import DistillLoader
from repcon.distill.loss import MultiHeadKLLoss
from repcon.distill.mix import Mix
from repcon.distill.optim import autocast
from repcon.distill.sample import collect, held_out_first
from repcon.labels.layout import HeadInfo
from repcon.labels.store import LabelStore
from repcon.models import earlier_students
from repcon.models.factory import create_model
from repcon.models.merge import MergeMember, as_member, check_shares, require_same_shapes
from repcon.models.preprocessing import preprocessing_of
from repcon.models.student import Student, build_student, is_student
from repcon.models.teacher_weights import Found, find
from repcon.runtime.console import console
from repcon.runtime.errors import UserError


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """What a run began with; kept in its checkpoints, results and model card."""

    init: str
    """`average` (of teachers), `students` (the mean of earlier ones), `backbone` or `random`."""
    shares: dict[str, float] = field(default_factory=dict)
    """By teacher's name or earlier student's folder."""
    search: Mix | None = None
    weights: dict[str, float] = field(default_factory=dict)
    """What balances the heads' losses: their own weights are multiplied by it; 1 for a head that is not named."""
    warm: tuple[str, ...] = ()
    """Heads that started as a classifier of their teacher, or as those of earlier students."""
    warmed_up: tuple[str, ...] = ()
    """Heads that were learnt on the features of the start."""

    def plain(self) -> dict[str, Any]:
        """JSON-able."""
        found = {"init": self.init, "shares": self.shares, "weights": self.weights, "warm_heads": list(self.warm)}
        search = {} if self.search is None or not self.search.candidates else {"search": self.search.plain()}
        return found | {"warmed_up_heads": list(self.warmed_up)} | search


def check(settings: TrainConfig) -> None:
    """Raises UserError for settings of the start that contradict each other."""
    if settings.init_students:
        _check_students(settings)
    if settings.init == "average" and not settings.pretrained:
        raise UserError("init: 'average' starts from the teachers' weights, and pretrained is false; set one of them")
    if settings.init_weights and settings.init == "backbone":
        raise UserError("init_weights: init = 'backbone' averages nothing; leave one of them out")
    if settings.init_weights:
        check_shares(settings.init_weights, [head.name for head in settings.heads] or settings.init_weights)


def _check_students(settings: TrainConfig) -> None:
    for field_name, given in (
        ("init", settings.init != "auto"), ("init_weights", settings.init_weights), ("models", settings.models),
    ):  # fmt: skip
        if given:
            raise UserError(f"{field_name}: the start is that of init_students; leave one of the two out")
    if not settings.pretrained:
        raise UserError("init_students: they start from trained weights, and pretrained is false; set one of them")


def begin(
    settings: TrainConfig, store: LabelStore, loader: DistillLoader, distributed: DistributedContext, *, resumed: bool
) -> tuple[Student, Start]:
    """The student as it starts, on the team's device, equal in all processes; the main process decides.

    resumed: its weights will come from a checkpoint, so that nothing is searched, loaded or learnt.
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
        model, start = build(), Start(init="random" if not settings.pretrained else "backbone")
        model = model.to(distributed.device)
    else:
        model, start = _lead(settings, store, loader, distributed, heads, build)
    distributed.share_weights(model)
    return model.to(memory_format=torch.channels_last), start  # pyright: ignore[reportCallIssue]


def _lead(
    settings: TrainConfig,
    store: LabelStore,
    loader: DistillLoader,
    distributed: DistributedContext,
    heads: Mapping[str, HeadInfo],
    build: Any,
) -> tuple[Student, Start]:
    found, init, why = _decided(settings, store, heads)
    shares, search, earlier = {}, None, {}
    if init == "average":
        shares, search = _shares(settings, store, loader, distributed, found.members)
    elif init == "students":
        shares = dict.fromkeys(found.members, 1 / len(found.members))
        earlier = earlier_students.mean_heads(settings.init_students, heads)
    torch.manual_seed(settings.seed)
    model: Student = build(teachers=found.members, shares=shares, earlier=earlier).to(distributed.device)
    warm = tuple(name for name in heads if name in model.warm_heads)
    precision = partial(autocast, distributed.device, settings.precision)
    warmed_up = warm_up(
        model, store, settings.heads, loader, tail=settings.tail, steps=settings.head_warmup_steps,
        preprocessing=preprocessing_of(model.backbone, settings.size), autocast=precision,
    )  # fmt: skip
    if search is not None:
        mix.show(search)
    weights = mix.balanced_weights(search) if search is not None and settings.balance_heads is True else {}
    start = Start(init=init, shares=shares, search=search, weights=weights, warm=warm, warmed_up=warmed_up)
    _tell(start, why, found, list(heads), settings)
    return model, start


def _decided(settings: TrainConfig, store: LabelStore, heads: Mapping[str, HeadInfo]) -> tuple[Found, str, str]:
    """The teachers' weights at hand (or the earlier students'), what `Start.init` will say, and why."""
    if settings.init_students:
        return Found(members=_students(settings), other_architecture={}, not_found={}), "students", "as asked for"
    models = named_values("models", settings.models, "NAME=MODEL", store.heads)
    if settings.init == "backbone" and (settings.projection or not settings.init_heads):
        return Found(members={}, other_architecture={}, not_found={}), "backbone", "as asked for"
    folder = Path(store.url) if "://" not in store.url else None
    backbone = create_model(settings.backbone, size=settings.size)
    teacher_metadata = [head.metadata for head in heads.values()]
    found = find(teacher_metadata, backbone, size=settings.size, models=models, folder=folder)
    own = as_member(backbone, settings.size) if found.members else None
    for name, member in list(found.members.items()):
        try:
            require_same_shapes({f"the backbone {settings.backbone}": own, name: member})  # pyright: ignore[reportArgumentType]
        except UserError as error:
            if _asked(settings):
                raise
            found.other_architecture[name] = str(error)
            del found.members[name]
    return found, *_init(settings, found)


def _students(settings: TrainConfig) -> dict[str, MergeMember]:
    members = earlier_students.load(settings.init_students, settings.size)
    own = as_member(create_model(settings.backbone, size=settings.size), settings.size)
    require_same_shapes(
        {f"the backbone {settings.backbone}": own} | members, earlier_students.FIELD, "name the students' architecture"
    )
    return members


def _asked(settings: TrainConfig) -> bool:
    """Whether the recipe itself wants the mean."""
    return settings.init == "average" or bool(settings.init_weights)


def _init(settings: TrainConfig, found: Found) -> tuple[str, str]:
    """`average` or `backbone`, and why. Raises UserError where the mean is asked for and weights are missing."""
    if settings.init == "backbone":
        return "backbone", "as asked for"
    others = [f"{name} is of another architecture, {kind}" for name, kind in found.other_architecture.items()]
    missing = [f"{name}: {why}" for name, why in found.not_found.items()]
    if _asked(settings):
        wanted = settings.init_weights or [*found.other_architecture, *found.not_found]
        absent = [name for name in wanted if name not in found.members]
        if absent:
            reasons = "; ".join([*others, *missing])
            raise UserError(f"init: no weights of {', '.join(absent)} to average ({reasons}); use init = 'backbone'")
        return "average", "as asked for"
    if others:
        return "backbone", "; ".join(others)
    if is_student(settings.backbone):
        return "backbone", "an earlier student"
    if not found.members or (missing and len(found.members) == 1):
        return "backbone", "; ".join(missing)
    return "average", "; ".join(["all that are here have the backbone's architecture", *missing])


def _shares(
    settings: TrainConfig,
    store: LabelStore,
    loader: DistillLoader,
    distributed: DistributedContext,
    members: Mapping[str, MergeMember],
) -> tuple[dict[str, float], Mix | None]:
    if settings.init_weights:
        return check_shares(settings.init_weights, members), None
    if len(members) == 1:
        return dict.fromkeys(members, 1.0), None
    linear = [HeadConfig(name=name) for name, member in members.items() if member.classifier is not None]
    if not linear:
        return dict.fromkeys(members, 1 / len(members)), None
    heads = [
        HeadConfig(name=head.name, temperature=1.0 if 1.0 in store.heads[head.name].temperatures else 0.0)
        for head in linear
    ]
    loss = MultiHeadKLLoss(
        store.heads, heads, tail=settings.tail, implementation="torch", device=distributed.device, announced=False
    )
    sample = collect(loader, held_out_first(loader, mix.CROPS), distributed.device, torch.clone)
    found = mix.search(members, loss, sample, autocast=partial(autocast, distributed.device, settings.precision))
    return found.shares, found


def _tell(start: Start, why: str, found: Found, heads: list[str], settings: TrainConfig) -> None:
    """One line on the backbone, one on the heads."""
    if start.shares:
        parts = " + ".join(f"{share:.2f} {name}" for name, share in start.shares.items() if share)
        chosen = "chosen by their stored labels" if start.search is not None else why
        line = f"start: mean of weights, {parts} ({chosen})"
    else:
        line = f"start: the weights of {settings.backbone} ({why})"
    console.print(line, highlight=False, markup=False, soft_wrap=True)
    if start.weights:
        told = ", ".join(f"{name} {weight:.2f}" for name, weight in start.weights.items())
        console.print(f"weights of the heads, balanced: {told}", highlight=False, markup=False, soft_wrap=True)
    cold = [name for name in heads if name not in start.warm and name not in start.warmed_up]
    of_teachers = {} if start.init == "students" else found.members
    nonlinear = [name for name, member in of_teachers.items() if member.classifier is None]
    parts = {
        "from the students" if start.init == "students" else "from their teachers' classifiers": start.warm,
        "learnt on the features of the start": start.warmed_up,
        "random": cold,
    }
    told = "; ".join(f"{what}: {', '.join(names)}" for what, names in parts.items() if names)
    odd = f"; not linear, so no start for a head: {', '.join(nonlinear)}" if nonlinear else ""
    projected = "; a projection has no classifier to start from" if settings.projection else ""
    console.print(f"heads: {told}{odd}{projected}", highlight=False, markup=False, soft_wrap=True)
