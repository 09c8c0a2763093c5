"""What the consolidation benchmark runs: its methods, their recipes, and its three forms."""

from dataclasses import dataclass, replace
from importlib.resources import files
from typing import Any, TypeVar

from benchmarks.experiments.consolidation.data import DOMAINS
from repcon import config
from repcon.runtime.errors import UserError

Config = TypeVar("Config")

METHODS = {
    "generalist": "generalist",
    "teacher": "task teacher",
    "teacher_a": "teacher of a quarter",
    "teacher_b": "teacher of another quarter",
    "average": "mean of both models' weights, no training",
    "task": "student: task only",
    "generalist_only": "student: generalist only",
    "task_generalist": "student: task + generalist",
    "average_of_students": "mean of the domains' students, no more training",
    "tasks": "student: all domains' tasks",
    "tasks_generalist": "student: all tasks + generalist",
    "quarters": "student: two quarters",
    "quarters_generalist": "student: two quarters + generalist",
    "joint": "one network trained with all domains' labels",
    "ceiling": "task teacher and generalist side by side",
}
"""Titles of the consolidation benchmark's rows, by the names that its records have."""

GENERALIST = "generalist"
TEACHER_HALF = (0.0, 0.5)
DOWNSTREAM_HALF = (0.5, 1.0)
QUARTERS = {"a": (0.0, 0.25), "b": (0.25, 0.5)}
"""Two teachers of one domain: each learns half of the teacher half."""

STUDENTS = {
    "task": "consolidate-task",
    "generalist_only": "consolidate-generalist",
    "task_generalist": "consolidate",
    "tasks": "consolidate-tasks",
    "tasks_generalist": "consolidate-tasks-generalist",
    "quarters": "consolidate-quarters",
    "quarters_generalist": "consolidate-quarters-generalist",
}
"""The recipe of each student. ONE student of all domains' tasks and the generalist starts from those of each domain."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Protocol:
    """What is run; all methods share all of it."""

    name: str
    model: str = "package:efficientnet_lite0"
    """The generalist: the start of teachers and students, and a teacher itself."""
    domains: tuple[str, ...] = DOMAINS
    seeds: tuple[int, ...] = (0, 1, 2)
    methods: tuple[str, ...] = tuple(METHODS)
    proxy_images: int = 2500
    domain_images: int | None = None
    """So many unlabelled images of each domain's teacher half join the proxy; 0: all of them."""
    size: int = 128
    epochs: int = 5
    teacher_epochs: int = 6
    crops: int = 3
    freeze_blocks: int = 11
    batch_size: int = 64
    fewshot_trials: int = 20
    device: config.Device = "auto"
    loader: config.LoaderKind = "auto"

    def changed(self, **changes: Any) -> "Protocol":
        """The protocol with those changes that are not None."""
        wanted = {name: value for name, value in changes.items() if value is not None}
        for name, known in (("domains", DOMAINS), ("methods", METHODS)):
            if unknown := set(wanted.get(name, ())) - set(known):
                raise UserError(f"{name}: {', '.join(sorted(unknown))} unknown; there are {', '.join(known)}")
        for name in ("seeds", "domains", "methods"):
            given = wanted.get(name, ())
            if len(set(given)) < len(given):
                raise UserError(f"{name}: one is named twice; each counts once")
        if wanted.get("domain_images", 0) < 0:
            raise UserError(f"domain_images = {wanted['domain_images']}: give a number of images, or 0 for all")
        return replace(self, **wanted)


USUAL = Protocol(
    name="usual", domains=("birds", "grocery"), seeds=tuple(range(6)),
    methods=(
        "generalist", "teacher", "average", "task", "task_generalist", "average_of_students", "tasks",
        "tasks_generalist", "joint", "ceiling",
    ),
)  # fmt: skip
EPOCHS_WITH_ALL = 3
"""With all images of the domains the proxy is three times as large; students see about twice as many in all."""
SHORT = Protocol(
    name="short", domains=("aerial",), seeds=(9,), methods=("generalist", "teacher", "task", "task_generalist"),
    proxy_images=400, size=64, epochs=1, teacher_epochs=1, crops=1, fewshot_trials=3,
)  # fmt: skip
LONG = Protocol(
    name="long", seeds=tuple(range(5)), proxy_images=0, size=224, epochs=30, teacher_epochs=20, crops=15,
    freeze_blocks=0, batch_size=256, device="cuda",
)  # fmt: skip


def recipe(kind: type[Config], name: str, **fields: Any) -> Config:
    """A recipe of the package with the fields that it leaves open."""
    path = files("repcon") / "config" / "recipes" / f"{name}.toml"
    return config.parse(kind, config.read_toml(str(path)) | fields, name)
