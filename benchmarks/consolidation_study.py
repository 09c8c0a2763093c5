"""The consolidation protocol as calls of repcon's commands: pack, teach, precompute, train, evaluate."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

import consolidation_data as data

from repcon import config, images, precompute, teach, train, transfer
from repcon.config import (
    ClassSubset,
    EvaluateConfig,
    HeadConfig,
    PackConfig,
    PrecomputeConfig,
    TeachConfig,
    TeacherConfig,
    TrainConfig,
)
from repcon.errors import UserError
from repcon.images import Pack
from repcon.record import console, write_json

Config = TypeVar("Config")

GENERALIST = "generalist"
TEACHER_HALF = (0.0, 0.5)
DOWNSTREAM_HALF = (0.5, 1.0)
QUARTERS = {"a": (0.0, 0.25), "b": (0.25, 0.5)}
"""Two teachers of one domain: each learns half of the teacher half."""

METHODS = {
    "generalist": "generalist",
    "teacher": "task teacher",
    "teacher_a": "teacher of a quarter",
    "teacher_b": "teacher of another quarter",
    "task": "student: task only",
    "generalist_only": "student: generalist only",
    "task_generalist": "student: task + generalist",
    "tasks": "student: all domains' tasks",
    "tasks_generalist": "student: all tasks + generalist",
    "quarters": "student: two quarters",
    "quarters_generalist": "student: two quarters + generalist",
}
"""Every row of the table and what it is called."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Protocol:
    """What is run; all methods share all of it."""

    name: str
    model: str = "package:efficientnet_lite0"
    """The generalist: the start of teachers and students, and a teacher itself."""
    domains: tuple[str, ...] = data.DOMAINS
    seeds: tuple[int, ...] = (0, 1, 2)
    methods: tuple[str, ...] = tuple(METHODS)
    proxy_images: int = 3000
    size: int = 128
    epochs: int = 8
    teacher_epochs: int = 8
    crops: int = 4
    freeze_blocks: int = 11
    batch_size: int = 64
    draws: int = 20
    device: config.Device = "auto"

    def changed(self, **changes: Any) -> "Protocol":
        """The protocol with those changes that are not None."""
        wanted = {name: value for name, value in changes.items() if value is not None}
        unknown = set(wanted.get("domains", ())) - set(data.DOMAINS)
        if unknown:
            raise UserError(f"domains: {', '.join(sorted(unknown))} unknown; there are {', '.join(data.DOMAINS)}")
        return replace(self, **wanted)


USUAL = Protocol(name="usual")
SHORT = Protocol(
    name="short", domains=("aerial",), seeds=(9,), methods=("generalist", "teacher", "task", "task_generalist"),
    proxy_images=400, size=64, epochs=1, teacher_epochs=1, crops=1, draws=3,
)  # fmt: skip
LONG = Protocol(
    name="long", seeds=tuple(range(5)), proxy_images=0, size=224, epochs=30, teacher_epochs=20, crops=15,
    freeze_blocks=0, batch_size=256, device="cuda",
)  # fmt: skip


def recipe(kind: type[Config], name: str, **fields: Any) -> Config:
    """A recipe of the package with the fields that it leaves open."""
    path = files("repcon") / "recipes" / f"{name}.toml"
    return config.parse(kind, config.read_toml(str(path)) | fields, name)


class Study:
    """One protocol in one work folder. Every step is skipped where the folder holds its finished result."""

    def __init__(self, source: Path, work: Path, protocol: Protocol) -> None:
        self.source, self.work, self.protocol = source, work, protocol
        self.counts: dict[str, Any] = {}
        self.seconds: dict[str, float] = {}
        self.generalist = protocol.model

    def run(self) -> dict[tuple[int, str], dict[str, Any]]:
        """Runs everything; gives {(seed, domain): evaluate's results}."""
        self.prepare()
        cells = {}
        for seed in self.protocol.seeds:
            teachers = self.teachers(seed)
            self.label(teachers)
            students = self.students(seed, teachers)
            for domain in self.protocol.domains:
                cells[seed, domain] = self.evaluate(seed, domain, teachers, students)
        return cells

    def facts(self) -> dict[str, Any]:
        """The counts of the data and the seconds per command."""
        return {"data": self.counts, "seconds": {name: round(value) for name, value in self.seconds.items()}}

    def prepare(self) -> None:
        """Cleans the photographs, packs them, and makes sure that the packs share no image."""
        marker = self.work / "clean" / "counts.json"
        if not marker.is_file():
            write_json_folder(marker, data.clean(self.source, marker.parent, self.protocol.proxy_images))
        self.counts = json.loads(marker.read_text())
        for name in ("proxy", *self.protocol.domains):
            out = self.work / "packs" / name
            self._step(images.run, PackConfig(source=str(marker.parent / f"{name}.tar"), out=str(out)), out)
        check_disjoint({name: self.pack(name) for name in ("proxy", *self.protocol.domains)})

    def pack(self, name: str) -> Pack:
        return Pack.open(str(self.work / "packs" / name))

    def teachers(self, seed: int) -> dict[str, Path]:
        """{head name: folder}: per domain the teacher of the half, and where asked for those of the quarters."""
        parts = {"": TEACHER_HALF}
        if any(method.startswith("quarters") for method in self.protocol.methods):
            parts |= {f"-{name}": part for name, part in QUARTERS.items()}
        taught = {}
        for domain in self.protocol.domains:
            for suffix, (start, stop) in parts.items():
                name = f"{domain}-{seed}{suffix}"
                out = self.work / "teachers" / name
                settings = recipe(TeachConfig, "teach", data=str(self.work / "packs" / domain), out=str(out))
                settings = replace(
                    settings,
                    model=self.generalist,
                    classes=ClassSubset(seed=seed, start=start, stop=stop),
                    epochs=self.protocol.teacher_epochs,
                    seed=seed,
                    **self._shared(),
                )
                self._step(teach.run, settings, out)
                taught[name] = out
        return taught

    def label(self, teachers: dict[str, Path]) -> None:
        """Adds the teachers' answers to the one store; the generalist's are computed once for all seeds."""
        models = {GENERALIST: self.generalist} | {name: str(folder) for name, folder in teachers.items()}
        out = self.work / "labels.zarr"
        settings = recipe(PrecomputeConfig, "label", pack=str(self.work / "packs" / "proxy"), out=str(out))
        settings = replace(
            settings,
            teachers=tuple(
                TeacherConfig(name=name, model=model, size=self.protocol.size) for name, model in models.items()
            ),
            crops=self.protocol.crops,
            device=self.protocol.device,
        )
        marker = self.work / f"labels-{'-'.join(sorted(teachers)[:1])}"
        self._step(precompute.run, settings, marker)

    def students(self, seed: int, teachers: dict[str, Path]) -> dict[str, dict[str, Path]]:
        """{domain: {method: folder}}; a student of all domains stands under each of them."""
        students: dict[str, dict[str, Path]] = {domain: {} for domain in self.protocol.domains}
        every = [f"{domain}-{seed}" for domain in self.protocol.domains]
        for domain in self.protocol.domains:
            heads = {
                "task": [f"{domain}-{seed}"],
                "generalist_only": [GENERALIST],
                "task_generalist": [f"{domain}-{seed}", GENERALIST],
                "tasks": every,
                "tasks_generalist": [*every, GENERALIST],
                "quarters": [f"{domain}-{seed}-a", f"{domain}-{seed}-b"],
                "quarters_generalist": [f"{domain}-{seed}-a", f"{domain}-{seed}-b", GENERALIST],
            }
            for method in (method for method in heads if method in self.protocol.methods):
                students[domain][method] = self.student(seed, heads[method])
        return students

    def student(self, seed: int, heads: list[str]) -> Path:
        """Trains the student of these heads, or finds it: one whose heads are the same is the same student."""
        out = self.work / "students" / f"{seed}-{'+'.join(heads)}"
        settings = recipe(
            TrainConfig, "consolidate", pack=str(self.work / "packs" / "proxy"), out=str(out),
            store=str(self.work / "labels.zarr"),
        )  # fmt: skip
        weights = {("generalist" if head.name == GENERALIST else "task"): head for head in settings.heads}
        wanted = tuple(
            HeadConfig(
                name=name,
                weight=weights["generalist" if name == GENERALIST and len(heads) > 1 else "task"].weight,
                temperature=weights["generalist" if name == GENERALIST else "task"].temperature,
            )
            for name in heads
        )
        settings = replace(
            settings, trunk=self.generalist, heads=wanted, epochs=self.protocol.epochs, seed=seed, **self._shared()
        )
        self._step(train.run, settings, out)
        return out

    def evaluate(
        self, seed: int, domain: str, teachers: dict[str, Path], students: dict[str, dict[str, Path]]
    ) -> dict[str, Any]:
        """Measures generalist, teachers and students on the domain's downstream half."""
        trunks = {"generalist": self.generalist, "teacher": str(teachers[f"{domain}-{seed}"])}
        for part in QUARTERS:
            if f"{domain}-{seed}-{part}" in teachers:
                trunks[f"teacher_{part}"] = str(teachers[f"{domain}-{seed}-{part}"])
        trunks |= {method: str(folder) for method, folder in students[domain].items()}
        start, stop = DOWNSTREAM_HALF
        out = self.work / "evaluate" / f"{domain}-{seed}"
        settings = EvaluateConfig(
            data=str(self.work / "packs" / domain),
            out=str(out),
            trunks=tuple(f"{name}={model}" for name, model in trunks.items()),
            classes=ClassSubset(seed=seed, start=start, stop=stop),
            size=self.protocol.size,
            draws=self.protocol.draws,
            cache=str(self.work / "features"),
            device=self.protocol.device,
            seed=seed,
        )
        return self._step(transfer.run, settings, out)

    def _shared(self) -> dict[str, Any]:
        protocol = self.protocol
        return {
            "size": protocol.size,
            "freeze_blocks": protocol.freeze_blocks,
            "batch_size": protocol.batch_size,
            "device": protocol.device,
        }

    def _step(self, command: Callable[[Any], dict[str, Any]], settings: Any, out: Path) -> dict[str, Any]:
        """Runs a command once: its settings, results and seconds are kept beside its output."""
        name = type(settings).__name__.removesuffix("Config").lower()
        done = out.with_name(f"{out.name}.done.json")
        wanted = config.dump(settings)
        held = json.loads(done.read_text()) if done.is_file() else None
        if held is None or held["settings"] != wanted:
            if held is not None:
                raise UserError(f"{out} was made with other settings; name another --work folder, or delete it")
            console.rule(f"{name} {out.name}")
            started = time.time()
            results = command(settings)
            held = {"settings": wanted, "results": results, "seconds": time.time() - started}
            write_json_folder(done, held)
        self.seconds[name] = self.seconds.get(name, 0.0) + held["seconds"]
        return held["results"]


def write_json_folder(path: Path, value: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, value)


def check_disjoint(packs: dict[str, Pack]) -> None:
    """Raises UserError where two packs share an image by its content hash."""
    names = list(packs)
    for place, first in enumerate(names):
        for second in names[place + 1 :]:
            shared = set(map(bytes, packs[first].hashes)) & set(map(bytes, packs[second].hashes))
            if shared:
                raise UserError(f"{first} and {second} share {len(shared)} images; the comparison would be worthless")
