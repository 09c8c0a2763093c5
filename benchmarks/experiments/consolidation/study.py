"""The consolidation protocol as calls of repcon's commands: pack, teach, precompute, train, evaluate."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.experiments.consolidation import data
from benchmarks.experiments.consolidation import steps as consolidation_steps
from benchmarks.experiments.consolidation.protocol import (
    DOWNSTREAM_HALF,
    GENERALIST,
    QUARTERS,
    STUDENTS,
    TEACHER_HALF,
    Protocol,
    recipe,
)
from benchmarks.experiments.consolidation.steps import AverageConfig, Step
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
from repcon.images.pack import ImagePack, count_shared_images, select_classes
from repcon.runtime.errors import UserError
from repcon.runtime.run_dir import write_json


class Study:
    """One protocol in one work folder. Every step is skipped where the folder holds its finished result."""

    def __init__(self, source: Path, work: Path, protocol: Protocol, jobs: int = 1) -> None:
        """`jobs` commands run side by side."""
        self.source, self.work, self.protocol, self.jobs = source, work, protocol, jobs
        self.counts: dict[str, Any] = {}
        self.seconds: dict[str, float] = {}
        self.generalist = protocol.model

    def run(self) -> dict[tuple[int, str], dict[str, Any]]:
        """Runs everything; gives {(seed, domain): evaluate's results}."""
        teachers = self.label()
        cells = [(seed, domain) for seed in self.protocol.seeds for domain in self.protocol.domains]
        students = {cell: self.students(*cell) for cell in cells}
        for stage in self._stages(students):
            self.do(stage)
        averages = {cell: self.averages(cell[0], teachers, students[cell]) for cell in cells}
        self.do([step for methods in averages.values() for step in methods.values()])
        backbones = {cell: self.backbones(*cell, teachers, students[cell] | averages[cell]) for cell in cells}
        results = self.do([self.measure(*cell, backbones[cell]) for cell in cells])
        return dict(zip(cells, results, strict=True))

    def label(self) -> dict[str, Step]:
        """Packs, teachers and labels; gives the teachers by head name."""
        self.prepare()
        by_seed = {seed: self.teachers(seed) for seed in self.protocol.seeds}
        teachers = {name: step for steps in by_seed.values() for name, step in steps.items()}
        self.do([*teachers.values(), *self._joints()])
        for step in self._all_labels(by_seed):
            self.do([step])
        return teachers

    def facts(self) -> dict[str, Any]:
        """The counts of the data and the seconds per command, added up over what ran side by side."""
        return {"data": self.counts, "seconds": {name: round(value) for name, value in self.seconds.items()}}

    def do(self, steps: Sequence[Step]) -> list[dict[str, Any]]:
        """Each step's results, from the work folder where it was done before."""
        held = consolidation_steps.run(steps, self.jobs)
        for step, one in {step.out: (step, one) for step, one in zip(steps, held, strict=True)}.values():
            self.seconds[step.command] = self.seconds.get(step.command, 0.0) + one["seconds"]
        return [one["results"] for one in held]

    def prepare(self) -> None:
        """Cleans the photographs, packs them, and makes sure that the packs share no image."""
        marker = self.work / "clean" / "counts.json"
        if not marker.is_file():
            counts = data.clean(self.source, marker.parent, self.protocol.proxy_images)
            write_json(marker, counts)
        self.counts = json.loads(marker.read_text())
        for name in ("proxy", *self.protocol.domains):
            out = self.work / "packs" / name
            source = marker.parent / f"{name}.tar"
            self.do([Step(settings=PackConfig(source=str(source), out=str(out)), out=out)])
        check_disjoint({name: self.pack(name) for name in ("proxy", *self.protocol.domains)})

    def pack(self, name: str) -> ImagePack:
        return ImagePack.open(str(self.work / "packs" / name))

    def teachers(self, seed: int) -> dict[str, Step]:
        """{head name: step}: per domain the teacher of the half, and where asked for those of the quarters."""
        parts = {"": TEACHER_HALF}
        if any(method.startswith("quarters") for method in self.protocol.methods):
            parts |= {f"-{name}": part for name, part in QUARTERS.items()}
        return {
            f"{domain}-{seed}{suffix}": self.teacher(domain, seed, suffix, part)
            for domain in self.protocol.domains
            for suffix, part in parts.items()
        }

    def teacher(self, domain: str, seed: int, suffix: str, part: tuple[float, float]) -> Step:
        """The teacher of a part of a domain's classes, given as a share of them."""
        out = self.work / "teachers" / f"{domain}-{seed}{suffix}"
        settings = recipe(TeachConfig, "teach", data=str(self.work / "packs" / domain), out=str(out))
        settings = replace(
            settings,
            model=self.generalist,
            classes=ClassSubset(seed=seed, start=part[0], stop=part[1]),
            epochs=self.protocol.teacher_epochs,
            seed=seed,
            **self.shared(),
        )
        return Step(settings=settings, out=out)

    def _joints(self) -> list[Step]:
        """The networks trained jointly, where they are asked for."""
        return [self.joint(seed) for seed in self.protocol.seeds] if "joint" in self.protocol.methods else []

    def joint(self, seed: int) -> Step:
        """One network trained with the labels of all domains' teacher halves at once: what teachers of the same epochs
        know together. Only the images' number differs from a teacher's training."""
        name = f"joint-{'-'.join(self.protocol.domains)}"
        step = self.teacher(name, seed, "", (0.0, 1.0))
        return replace(step, settings=replace(step.settings, data=str(self._joint_pack(f"{name}-{seed}", seed))))

    def _joint_pack(self, name: str, seed: int) -> Path:
        """The domains' teacher halves as one labelled pack; a class is named by its domain and its own name."""
        out, folder = self.work / "packs" / name, self.work / "clean" / name
        written = folder.with_name(f"{name}.written")
        if not written.exists():
            half = ClassSubset(seed=seed, start=TEACHER_HALF[0], stop=TEACHER_HALF[1])
            for domain in self.protocol.domains:
                pack = self.pack(domain)
                rows, labels, names = select_classes(pack, half)
                for label, own in enumerate(names):
                    (folder / f"{domain}-{own}").mkdir(parents=True, exist_ok=True)
                    _write_images(folder / f"{domain}-{own}", domain, pack, rows[labels == label])
            written.touch()
        self.do([Step(settings=PackConfig(source=str(folder), out=str(out)), out=out)])
        return out

    def labels(self, teachers: Mapping[str, Path], name: str = "labels", pack: str = "proxy") -> Step:
        """One store of all teachers' answers and the generalist's, to which more teachers can be appended later."""
        models = {GENERALIST: self.generalist} | {name: str(folder) for name, folder in teachers.items()}
        out = self.work / f"{name}.zarr"
        settings = recipe(PrecomputeConfig, "label", pack=str(self.work / "packs" / pack), out=str(out))
        settings = replace(
            settings,
            teachers=tuple(
                TeacherConfig(name=name, model=model, size=self.protocol.size) for name, model in models.items()
            ),
            crops=self.protocol.crops,
            device=self.protocol.device,
            loader=self.protocol.loader,
            processes=1 if self.protocol.device == "cuda" else self.jobs,
        )
        seeds = "-".join(map(str, self.protocol.seeds))
        return Step(settings=settings, out=out.with_name(f"{out.name}-{seeds}"))

    def _all_labels(self, teachers: Mapping[int, Mapping[str, Step]]) -> list[Step]:
        """One store of all seeds' teachers; where each seed has images of its own, a store for each."""
        if self.protocol.domain_images is None:
            return [self.labels({name: step.out for steps in teachers.values() for name, step in steps.items()})]
        return [
            self.labels({name: step.out for name, step in steps.items()}, self._names(seed)[1], self.with_domains(seed))
            for seed, steps in teachers.items()
        ]

    def _names(self, seed: int) -> tuple[str, str]:
        """Of the pack that students learn from, and of its labels."""
        if self.protocol.domain_images is None:
            return "proxy", "labels"
        return self._mixed(seed), f"labels-{seed}{self._form}"

    def _mixed(self, seed: int) -> str:
        images = f"-{self.protocol.domain_images}" if self.protocol.domain_images else ""
        return f"proxy-{'-'.join(self.protocol.domains)}-{seed}{images}"

    def with_domains(self, seed: int) -> str:
        """The proxy and unlabelled images of the domains' teacher halves, as one pack; its name.

        Where not all are taken, their contents choose, so that a larger number holds a smaller one.
        """
        name = self._mixed(seed)
        out, folder = self.work / "packs" / name, self.work / "clean" / name
        written = folder.with_name(f"{name}.written")
        if not written.exists():
            folder.mkdir(parents=True, exist_ok=True)
            half = ClassSubset(seed=seed, start=TEACHER_HALF[0], stop=TEACHER_HALF[1])
            for domain in self.protocol.domains:
                pack = self.pack(domain)
                rows = sorted(select_classes(pack, half)[0], key=lambda row, pack=pack: pack.hashes[row].tobytes())
                _write_images(folder, domain, pack, rows[: self.protocol.domain_images or None])
            _write_images(folder, "proxy", self.pack("proxy"), range(len(self.pack("proxy"))))
            written.touch()
        self.do([Step(settings=PackConfig(source=str(folder), out=str(out)), out=out)])
        return name

    def students(self, seed: int, domain: str) -> dict[str, Step]:
        """{method: step}; a student of all domains stands under each of them."""
        methods = [method for method in STUDENTS if method in self.protocol.methods]
        return {method: self.student(seed, domain, method) for method in methods}

    def _stages(self, students: Mapping[tuple[int, str], Mapping[str, Step]]) -> list[list[Step]]:
        """The students in the order of their starts: those that start from others after these."""
        steps = [step for methods in students.values() for step in methods.values()]
        later = [step for step in steps if step.settings.init_students]
        # Whether or not these are among the methods.
        starts = [self.student(*cell, "task_generalist") for cell in students] if later else []
        return [[*starts, *(step for step in steps if not step.settings.init_students)], later]

    def averages(self, seed: int, teachers: Mapping[str, Step], students: Mapping[str, Step]) -> dict[str, Step]:
        """{method: step}: the means of weights that students started from, by the shares that they chose."""
        steps = {}
        for method, student in {"average": "task_generalist", "average_of_students": "tasks_generalist"}.items():
            held = students[student].held() if {method, student} <= set(self.protocol.methods) else None
            if held is None or held["results"]["init"]["init"] not in ("average", "students"):
                continue
            shares: dict[str, float] = held["results"]["init"]["shares"]
            places = {GENERALIST: self.generalist} | {name: str(step.out) for name, step in teachers.items()}
            models = {name: places.get(name, name) for name in shares}
            out = self.work / "averages" / students[student].out.name
            settings = AverageConfig(models=models, shares=shares, out=str(out), size=self.protocol.size)
            steps[method] = Step(settings=settings, out=out)
        return steps

    def student(self, seed: int, domain: str, method: str) -> Step:
        """A method's student by its recipe; ONE student of all domains, where there is but one, is that domain's."""
        alone = {"tasks": "task", "tasks_generalist": "task_generalist"} if len(self.protocol.domains) == 1 else {}
        method = alone.get(method, method)
        pack, store = self._names(seed)
        settings = recipe(
            TrainConfig, STUDENTS[method], pack=str(self.work / "packs" / pack), out="",
            store=str(self.work / f"{store}.zarr"),
        )  # fmt: skip
        heads = self._heads(settings.heads, seed, domain)
        starts: tuple[str, ...] = ()
        if method == "tasks_generalist":
            starts = tuple(str(self.student(seed, each, "task_generalist").out) for each in self.protocol.domains)
        out = self.work / "students" / f"{seed}-{'+'.join(head.name for head in heads)}{self._form}"
        settings = replace(
            settings, out=str(out), backbone=self.generalist, heads=heads, init_students=starts,
            epochs=self.protocol.epochs, seed=seed, **self.shared(),
        )  # fmt: skip
        return Step(settings=settings, out=out)

    def _heads(self, heads: tuple[HeadConfig, ...], seed: int, domain: str) -> tuple[HeadConfig, ...]:
        """The recipe's heads by their names in this study's store; domains that are not run are left out."""
        names = {"task": f"{domain}-{seed}", GENERALIST: GENERALIST}
        names |= {f"task-{part}": f"{domain}-{seed}-{part}" for part in QUARTERS}
        names |= {other: f"{other}-{seed}" for other in self.protocol.domains}
        return tuple(replace(head, name=names[head.name]) for head in heads if head.name in names)

    def backbones(
        self, seed: int, domain: str, teachers: Mapping[str, Step], students: Mapping[str, Step]
    ) -> dict[str, str]:
        """{method: model} of all that is compared on a domain."""
        backbones = {"generalist": self.generalist, "teacher": str(teachers[f"{domain}-{seed}"].out)}
        for part in QUARTERS:
            if f"{domain}-{seed}-{part}" in teachers:
                backbones[f"teacher_{part}"] = str(teachers[f"{domain}-{seed}-{part}"].out)
        backbones |= {method: str(step.out) for method, step in students.items()}
        if "joint" in self.protocol.methods:
            backbones["joint"] = str(self.joint(seed).out)
        return backbones | {"ceiling": f"{backbones['teacher']} + {backbones['generalist']}"}

    def measure(self, seed: int, domain: str, backbones: Mapping[str, str], baseline: str = "") -> Step:
        """Backbones, {name: model}, on the domain's downstream half."""
        start, stop = DOWNSTREAM_HALF
        out = self.work / "evaluate" / f"{domain}-{seed}{self._form}"
        settings = EvaluateConfig(
            data=str(self.work / "packs" / domain),
            out=str(out),
            backbones=tuple(f"{name}={model}" for name, model in backbones.items()),
            baseline=baseline,
            classes=ClassSubset(seed=seed, start=start, stop=stop),
            size=self.protocol.size,
            fewshot_trials=self.protocol.fewshot_trials,
            cache=str(self.work / "features"),
            device=self.protocol.device,
            loader=self.protocol.loader,
            seed=seed,
        )
        return Step(settings=settings, out=out)

    @property
    def _form(self) -> str:
        """Keeps what depends on the proxy apart where several forms share a work folder."""
        return {None: "", 0: "-domains"}.get(self.protocol.domain_images, f"-domains-{self.protocol.domain_images}")

    def shared(self) -> dict[str, Any]:
        """What teachers and students have in common."""
        protocol = self.protocol
        return {
            "size": protocol.size,
            "freeze_blocks": protocol.freeze_blocks,
            "batch_size": protocol.batch_size,
            "device": protocol.device,
            "loader": protocol.loader,
        }


def _write_images(folder: Path, prefix: str, pack: ImagePack, rows: Iterable[int]) -> None:
    for row in rows:
        (folder / f"{prefix}-{int(row):07d}.jpg").write_bytes(pack.read(int(row)))


def check_disjoint(packs: dict[str, ImagePack]) -> None:
    """Raises UserError where two packs share an image by its content hash."""
    names = list(packs)
    for place, first in enumerate(names):
        for second in names[place + 1 :]:
            if shared := count_shared_images(packs[first].hashes, packs[second].hashes):
                raise UserError(f"{first} and {second} share {shared} images; the comparison would be worthless")
