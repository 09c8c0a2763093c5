"""The consolidation protocol as calls of repcon's commands: pack, teach, precompute, train, evaluate."""

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import consolidation_data as data
from consolidation_protocol import DOWNSTREAM_HALF, GENERALIST, QUARTERS, STUDENTS, TEACHER_HALF, Protocol, recipe

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
            students = self.students(seed)
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

    def students(self, seed: int) -> dict[str, dict[str, Path]]:
        """{domain: {method: folder}}; a student of all domains stands under each of them."""
        methods = [method for method in STUDENTS if method in self.protocol.methods]
        return {
            domain: {method: self.student(seed, domain, method) for method in methods}
            for domain in self.protocol.domains
        }

    def student(self, seed: int, domain: str, method: str) -> Path:
        """Trains a method's student by its recipe; one whose heads another has already is that other."""
        settings = recipe(
            TrainConfig, STUDENTS[method], pack=str(self.work / "packs" / "proxy"), out="",
            store=str(self.work / "labels.zarr"),
        )  # fmt: skip
        heads = self._heads(settings.heads, seed, domain)
        out = self.work / "students" / f"{seed}-{'+'.join(head.name for head in heads)}"
        settings = replace(
            settings, out=str(out), trunk=self.generalist, heads=heads, epochs=self.protocol.epochs, seed=seed,
            **self._shared(),
        )  # fmt: skip
        self._step(train.run, settings, out)
        return out

    def _heads(self, heads: tuple[HeadConfig, ...], seed: int, domain: str) -> tuple[HeadConfig, ...]:
        """The recipe's heads by their names in this study's store; domains that are not run are left out."""
        names = {"task": f"{domain}-{seed}", GENERALIST: GENERALIST}
        names |= {f"task-{part}": f"{domain}-{seed}-{part}" for part in QUARTERS}
        names |= {other: f"{other}-{seed}" for other in self.protocol.domains}
        return tuple(replace(head, name=names[head.name]) for head in heads if head.name in names)

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
