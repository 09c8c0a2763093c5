"""The consolidation benchmark leaks nothing: what is tested on reached no teacher, no proxy image and no student."""

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
import torch
from pictures import photograph

from benchmarks.experiments.consolidation import ablation, beyond, data, growth, other_sizes, study, summary
from benchmarks.experiments.consolidation import protocol as protocols
from benchmarks.experiments.consolidation.steps import Step
from benchmarks.experiments.consolidation.variants import VARIANTS
from repcon.config import ClassSubset, TrainConfig, dump
from repcon.images.pack import ImagePack, select_classes
from repcon.labels.store import LabelStore
from repcon.models.preprocessing import preprocessing_of
from repcon.models.saved_model import save_model
from repcon.models.timm_import import timm
from repcon.runtime.errors import UserError

AERIAL = ("airplane", "beach", "forest", "harbor", "river", "runway", "freeway", "chaparral")


def jpeg(seed: int) -> bytes:
    return simplejpeg.encode_jpeg(photograph(seed, 48 + seed % 5, 44, hue=seed), quality=92)


def write_tar(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five small tars with planted leaks: copies between and within sets, and a proxy class named like a domain's."""
    root = tmp_path_factory.mktemp("photographs")
    aerial = {f"{name}/{n}.jpg": jpeg(100 * c + n) for c, name in enumerate(AERIAL) for n in range(6)}
    aerial["beach/again.jpg"] = aerial["airplane/0.jpg"]
    birds = {
        f"{name}/{n}.jpg": jpeg(2000 + 100 * c + n) for c, name in enumerate(("Blue_Jay", "Mallard")) for n in (0, 1)
    }
    grocery = {f"{name}/{n}.jpg": jpeg(3000 + 100 * c + n) for c, name in enumerate(("Lemon", "Leek")) for n in (0, 1)}
    objects = {f"anchor/{n}.jpg": jpeg(4000 + n) for n in range(30)} | {"airplanes/0.jpg": jpeg(4500)}
    objects |= {"anchor/copy.jpg": aerial["river/3.jpg"], "anchor/twice.jpg": objects["anchor/0.jpg"]}
    imagenet = {"n01580077_jay/0.jpg": jpeg(5000), "n03000000_table/0.jpg": jpeg(5001)}
    sets = {"aerial": aerial, "birds": birds, "grocery": grocery, "objects": objects, "imagenet": imagenet}
    for name, files in sets.items():
        write_tar(root / f"{name}.tar", files)
    return root


def contents(path: Path) -> dict[str, bytes]:
    return {f"{folder}/{name}": content for folder, name, content in data.members(path)}


def test_copies_and_classes_of_the_domains_leave_the_proxy(photographs: Path, tmp_path: Path):
    counts = data.clean(photographs, tmp_path)
    assert counts["images"] == {"birds": 4, "grocery": 4, "aerial": 48, "proxy": 31, "proxy_available": 31}
    assert counts["dropped"] == {
        "repeated_in_domains": 1,
        "proxy_repeated": 1,
        "proxy_in_domains": 1,
        "proxy_named_images": 2,
        "proxy_named_classes": ["airplanes", "n01580077_jay"],
    }
    proxy = contents(tmp_path / "proxy.tar")
    for domain in data.DOMAINS:
        assert set(contents(tmp_path / f"{domain}.tar").values()).isdisjoint(proxy.values())
    assert not any("anchor" in name or "table" in name for name in proxy)  # No label survives in a name.


def test_a_larger_proxy_holds_the_smaller_one(photographs: Path, tmp_path: Path):
    few, more = tmp_path / "few", tmp_path / "more"
    data.clean(photographs, few, 5)
    data.clean(photographs, more, 20)
    assert set(contents(few / "proxy.tar")) < set(contents(more / "proxy.tar"))


@pytest.mark.parametrize(("one", "other", "alike"), [
    ("n01580077_jay", "Blue_Jay", True), ("airplanes", "airplane", True), ("sea_cucumber", "Cucumber", True),
    ("bass", "Brass_Band", False), ("n07749582_lemon", "Lemon", True), ("crab", "Crane", False),
])  # fmt: skip
def test_names_are_compared_by_words(one: str, other: str, alike: bool):
    assert data.named_alike(one, {data.words(other)}) is alike


def test_missing_photographs_are_named(tmp_path: Path):
    with pytest.raises(UserError, match=r"birds\.tar.*photos\.py"):
        data.clean(tmp_path, tmp_path / "out")


@pytest.fixture(scope="module")
def finished(photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[study.Study, dict]:
    """A whole study on one small domain, with timm's smallest network as the generalist."""
    torch.manual_seed(0)
    model = timm.create_model("test_efficientnet", num_classes=12)
    generalist = tmp_path_factory.mktemp("generalist")
    preprocessing = preprocessing_of(model, 32)
    save_model(model, generalist, classes=[f"c{i}" for i in range(12)], preprocessing=preprocessing, extra={})
    protocol = protocols.Protocol(
        name="tiny", model=str(generalist), domains=("aerial",), seeds=(4,), proxy_images=24, size=32, epochs=1,
        teacher_epochs=1, crops=2, freeze_blocks=1, batch_size=8, fewshot_trials=3, device="cpu",
    )  # fmt: skip
    run = study.Study(photographs, tmp_path_factory.mktemp("work"), protocol)
    return run, run.run()


def test_no_downstream_class_or_image_reaches_a_teacher(finished: tuple[study.Study, dict]):
    run, cells = finished
    downstream = set(cells[4, "aerial"]["class_names"])
    assert len(downstream) == 4
    pack = run.pack("aerial")
    tested = set(map(bytes, pack.hashes[select_classes(pack, ClassSubset(seed=4, start=0.5))[0]]))
    folders = sorted(path for path in (run.work / "teachers").iterdir() if path.is_dir())
    assert [folder.name for folder in folders] == ["aerial-4", "aerial-4-a", "aerial-4-b", "joint-aerial-4"]
    for folder in folders:
        taught = json.loads((folder / "results.json").read_text())["class_names"]
        taught = [name.removeprefix("aerial-") for name in taught]
        assert taught and downstream.isdisjoint(taught)
        rows = np.flatnonzero(np.isin(pack.labels, [pack.classes.index(name) for name in taught]))
        assert tested.isdisjoint(map(bytes, pack.hashes[rows]))


def test_no_downstream_image_reaches_the_proxy_and_so_no_student(finished: tuple[study.Study, dict]):
    run, _ = finished
    proxy, aerial = run.pack("proxy"), run.pack("aerial")
    assert proxy.classes == () and (proxy.labels == -1).all()
    assert set(map(bytes, proxy.hashes)).isdisjoint(map(bytes, aerial.hashes))
    store = LabelStore.open(str(run.work / "labels.zarr"))
    assert store.manifest.pack_fingerprint == proxy.fingerprint
    assert set(store.heads) == {"generalist", "aerial-4", "aerial-4-a", "aerial-4-b"}


def test_every_method_is_measured_and_summarised(finished: tuple[study.Study, dict], tmp_path: Path):
    run, cells = finished
    assert set(cells[4, "aerial"]["backbones"]) == set(protocols.METHODS)
    results = summary.summarise(cells, run.protocol, run.facts())
    backbones = cells[4, "aerial"]["backbones"]
    best = max(summary.accuracy(backbones["teacher"]), summary.accuracy(backbones["generalist"]))
    assert np.isclose(results["finding_2"], summary.accuracy(backbones["task_generalist"]) - best)
    assert np.isclose(
        results["finding_1"], summary.accuracy(backbones["generalist"]) - summary.accuracy(backbones["task"])
    )
    summary.show(results)
    summary.write(results, tmp_path, Namespace(record=False, json=str(tmp_path / "figures.json")))
    written = json.loads((tmp_path / "figures.json").read_text())
    assert written["finding_3_worst"] == results["finding_3_aerial"]
    assert results["finding_3_aerial"] in written["margins_of_runs"]["finding_3"].values()
    assert "student: task + generalist" in summary.markdown(results)


def test_one_student_of_all_domains_starts_from_those_of_each(photographs: Path, tmp_path: Path):
    """They are trained before it, whether or not they are rows; of one domain there is nothing to start from."""
    run = study.Study(photographs, tmp_path, protocols.USUAL.changed(seeds=(4,), methods=("tasks_generalist",)))
    cells = [(4, domain) for domain in run.protocol.domains]
    first, later = run._stages({cell: run.students(*cell) for cell in cells})
    own = [run.student(*cell, "task_generalist") for cell in cells]
    assert first == own and {step.out for step in later} == {run.student(*cells[0], "tasks_generalist").out}
    assert later[0].settings.init_students == tuple(str(step.out) for step in own)
    alone = study.Study(photographs, tmp_path, run.protocol.changed(domains=("birds",)))
    assert alone.student(4, "birds", "tasks_generalist") == alone.student(4, "birds", "task_generalist")


def test_margins_of_every_metric_stand_beside_the_probe_s(finished: tuple[study.Study, dict]):
    run, cells = finished
    results = summary.summarise(cells, run.protocol, run.facts())
    backbones = cells[4, "aerial"]["backbones"]
    for metric in ("shot_1", "knn_5"):  # Classes of six images have three to train on.
        best = max(summary.accuracy(backbones[name], metric) for name in ("teacher", "generalist"))
        margin = summary.accuracy(backbones["task_generalist"], metric) - best
        assert results[f"finding_2_{metric}"] == results[f"finding_2_{metric}_aerial"] == pytest.approx(margin)
        assert results[f"finding_2_{metric}_worst"] == results[f"finding_2_{metric}"]
        assert f"generalist_head_{metric}" in results and f"side_by_side_{metric}" in results
    assert "finding_2_shot_10" not in results
    apart = summary.accuracy(backbones["task_generalist"]) - summary.accuracy(backbones["ceiling"])
    assert results["side_by_side"] == pytest.approx(apart)
    apart = summary.accuracy(backbones["tasks_generalist"]) - summary.accuracy(backbones["joint"])
    assert results["over_joint"] == pytest.approx(apart)
    text = summary.markdown(results)
    assert text.index("points, linear probe") < text.index("points, 1-shot") < text.index("points, kNN 5")
    assert text.count("| side_by_side |") == 3


def test_margins_over_seeds_have_intervals_for_every_metric():
    def run(student: float) -> dict:
        values = {"teacher": 70.0, "generalist": 60.0, "task_generalist": student}
        figures = {name: {key: {"mean": mean} for key in summary.METRICS} for name, mean in values.items()}
        return {"backbones": {name: {"metrics": metrics} for name, metrics in figures.items()}}

    protocol = protocols.USUAL.changed(domains=("birds",), seeds=(0, 1))
    results = summary.summarise({(0, "birds"): run(72.0), (1, "birds"): run(73.0)}, protocol, {})
    for metric in ("", "_shot_1", "_shot_5", "_shot_10", "_knn_5"):
        assert results[f"finding_2{metric}"] == pytest.approx(2.5)
        assert results[f"finding_2{metric}_low"] < 2.5 < results[f"finding_2{metric}_high"]
        assert results[f"finding_2{metric}_birds_low"] == pytest.approx(results[f"finding_2{metric}_low"])


def test_the_jointly_trained_network_sees_every_domain_s_teacher_half_and_nothing_else(
    photographs: Path, finished: tuple[study.Study, dict], tmp_path: Path
):
    source = shutil.copytree(photographs, tmp_path / "photographs")
    birds = {f"{name}/{n}.jpg": jpeg(7000 + 10 * c + n) for c, name in enumerate("abcd") for n in range(3)}
    write_tar(source / "birds.tar", birds)
    protocol = replace(finished[0].protocol, domains=("aerial", "birds"))
    run = study.Study(source, tmp_path / "work", protocol)
    run.prepare()
    step = run.joint(4)
    joint = ImagePack.open(step.settings.data)
    assert step.settings.epochs == run.teacher("aerial", 4, "", (0.0, 0.5)).settings.epochs
    held, names = [], []
    for domain in ("aerial", "birds"):
        pack = run.pack(domain)
        rows, _, own = select_classes(pack, ClassSubset(seed=4, stop=0.5))
        held += list(map(bytes, pack.hashes[rows]))
        names += [f"{domain}-{name}" for name in own]
    assert sorted(map(bytes, joint.hashes)) == sorted(held) and set(joint.classes) == set(names)


def test_domain_images_in_the_proxy_come_from_the_teachers_half_only(finished: tuple[study.Study, dict]):
    """The other form in the same work folder: its own labels and students, the same teachers, and no leak."""
    usual, _ = finished
    methods = ("generalist", "teacher", "task", "task_generalist")
    protocol = replace(usual.protocol, domain_images=0, methods=methods)
    run = study.Study(usual.source, usual.work, protocol)
    cells = run.run()
    assert set(cells[4, "aerial"]["backbones"]) == {*methods, "ceiling"}
    student = run.student(4, "aerial", "task_generalist")
    mixed, aerial = ImagePack.open(student.settings.pack), run.pack("aerial")
    half = {part: set(map(bytes, aerial.hashes[select_classes(aerial, ClassSubset(seed=4, start=start, stop=stop))[0]]))
            for part, start, stop in (("taught", 0.0, 0.5), ("tested", 0.5, 1.0))}  # fmt: skip
    proxy = set(map(bytes, run.pack("proxy").hashes))
    assert set(map(bytes, mixed.hashes)) == proxy | half["taught"]
    assert half["tested"].isdisjoint(map(bytes, mixed.hashes)) and (mixed.labels == -1).all()
    assert student.out != usual.student(4, "aerial", "task_generalist").out
    assert LabelStore.open(student.settings.store).manifest.pack_fingerprint == mixed.fingerprint
    few = study.Study(usual.source, usual.work, replace(protocol, domain_images=6))
    some = set(map(bytes, few.pack(few.with_domains(4)).hashes)) - proxy
    assert len(some) == 6 and some == set(sorted(half["taught"])[:6])
    assert few.student(4, "aerial", "task").out != run.student(4, "aerial", "task").out


@pytest.mark.parametrize("twice", [{"seeds": (1, 1)}, {"domains": ("birds", "birds")}, {"methods": ("task", "task")}])
def test_what_is_named_twice_would_shrink_the_intervals(twice: dict[str, tuple]) -> None:
    with pytest.raises(UserError, match=f"{next(iter(twice))}: one is named twice"):
        protocols.USUAL.changed(**twice)


def test_a_negative_number_of_images_is_refused() -> None:
    with pytest.raises(UserError, match="domain_images = -5"):
        protocols.USUAL.changed(domain_images=-5)


def test_a_finished_study_does_nothing_twice_and_refuses_another_recipe(finished: tuple[study.Study, dict]):
    run, cells = finished
    again = study.Study(run.source, run.work, run.protocol)
    assert again.run() == cells
    with pytest.raises(UserError, match="other settings"):
        study.Study(run.source, run.work, run.protocol.changed(epochs=2)).run()


def test_the_students_recipes_differ_in_their_heads_start_and_rate_only():
    shipped = {
        name: protocols.recipe(TrainConfig, name, pack="", store="", out="") for name in protocols.STUDENTS.values()
    }
    plain = TrainConfig(pack="", store="", out="")
    start = {"heads": (), "init": "auto", "init_heads": True, "head_warmup_steps": plain.head_warmup_steps}
    assert len({dump(replace(settings, **start, optim=plain.optim)) for settings in shipped.values()}) == 1
    assert {name for name, settings in shipped.items() if settings.optim.lr != 6e-4} == {
        "consolidate-tasks-generalist", "consolidate-quarters-generalist",
    }  # fmt: skip
    for settings in shipped.values():  # the paper's students of task teachers alone start from the generalist's weights
        alone = "generalist" not in {head.name for head in settings.heads}
        assert settings.init == ("backbone" if alone else "auto")
    assert len({settings.heads for settings in shipped.values()}) == len(shipped)
    optims = {replace(settings.optim, lr=0.0) for settings in shipped.values()}
    assert optims == {replace(plain.optim, lr=0.0)}


def test_packs_that_share_an_image_stop_the_study(finished: tuple[study.Study, dict]):
    pack: ImagePack = finished[0].pack("proxy")
    with pytest.raises(UserError, match="share 24 images"):
        study.check_disjoint({"proxy": pack, "again": pack})


def test_variants_are_the_usual_student_but_for_one_setting(photographs: Path, tmp_path: Path, finished):
    protocol = finished[0].protocol.changed(methods=("task_generalist",), proxy_images=20)
    names = ("usual", "task_only", "k_4", "domain_images", "all_images", "lr_1e-3")
    variants = {name: VARIANTS[name] for name in names}
    run = ablation.Ablation(photographs, tmp_path, protocol)
    figures = ablation.summarise(run.compare(variants), variants, protocol)
    recipes = {name: run._student(4, name, variant).settings for name, variant in variants.items()}
    assert recipes["lr_1e-3"] == replace(
        recipes["usual"], out=recipes["lr_1e-3"].out, optim=replace(recipes["usual"].optim, lr=1e-3)
    )
    assert [head.name for head in recipes["task_only"].heads] == ["task"]
    assert LabelStore.open(recipes["k_4"].store).manifest.k == 4
    assert figures["usual_probe"] > 0 and "usual_probe_gain" not in figures
    assert figures["k_4_probe_gain"] == pytest.approx(figures["k_4_probe"] - figures["usual_probe"])
    assert ablation.markdown(figures, variants).count("\n") == 2 + 2 + len(names)
    pack = run.pack("aerial")
    tested = set(map(bytes, pack.hashes[select_classes(pack, ClassSubset(seed=4, start=0.5))[0]]))
    mixed = ImagePack.open(recipes["domain_images"].pack)
    assert len(mixed) == 20 + len(select_classes(pack, ClassSubset(seed=4, stop=0.5))[0])
    assert tested.isdisjoint(map(bytes, mixed.hashes))
    whole = ImagePack.open(recipes["all_images"].pack)
    assert len(whole) == 31 and set(map(bytes, run.pack("proxy").hashes)) < set(map(bytes, whole.hashes))
    assert tested.isdisjoint(map(bytes, whole.hashes))


def test_what_kept_labels_allow_beyond_the_paper(photographs: Path, tmp_path: Path, finished):
    run = beyond.Beyond(photographs, tmp_path, finished[0].protocol)
    figures = run.figures()
    store = LabelStore.open(str(tmp_path / "appended.zarr"))
    assert (
        list(store.heads) == ["generalist", "task"]
        and not store.completion.unfinished()
        and figures["append_left_bytes"] == 1
    )
    at_once = LabelStore.open(str(tmp_path / "at-once.zarr"))
    for name in store.heads:
        for one, other in zip(
            store.reader.crop_labels(1).labels[name], at_once.reader.crop_labels(1).labels[name], strict=True
        ):
            np.testing.assert_array_equal(one, other)
    assert figures["appended_probe_gain"] == pytest.approx(figures["appended_probe"] - figures["generalist_probe"])
    assert figures["online_next_epochs"] >= 1 and figures["online_first_epochs"] >= figures["online_next_epochs"]
    assert len(beyond.grid(figures).rows) == len(beyond.ROWS) and len(beyond.costs(figures).rows) == 3
    assert run.figures() == figures


def test_students_of_another_size_learn_from_the_other_ones_teachers(
    photographs: Path, tmp_path: Path, finished, monkeypatch
):
    protocol = finished[0].protocol
    large = timm.create_model("test_resnet", num_classes=12)
    preprocessing = preprocessing_of(large, 32)
    save_model(large, tmp_path / "large", classes=[f"c{i}" for i in range(12)], preprocessing=preprocessing, extra={})
    monkeypatch.setattr(other_sizes, "SIZES", {"small": protocol.model, "large": str(tmp_path / "large")})
    run = other_sizes.OtherSizes(photographs, tmp_path, protocol)
    figures = run.figures()
    for size, other in (("small", "large"), ("large", "small")):
        student = json.loads((tmp_path / "students" / f"4-{size}" / "results.json").read_text())
        store = LabelStore.open(str(tmp_path / f"labels-{other}.zarr"))
        assert store.heads["task"].metadata.model == str(tmp_path / "teachers" / f"aerial-4-{other}")
        assert student["init"]["init"] == "backbone"
        assert f"{size}_student_probe_gain" in figures and f"{size}_probe_gain" not in figures
    assert len(other_sizes.grid(figures).rows) == len(other_sizes.ROWS)
    assert run.figures() == figures


def test_margins_of_longer_training_stand_beside_the_first_length_s(
    photographs: Path, tmp_path: Path, finished, monkeypatch
):
    """Of the same teachers and labels."""
    methods = ("generalist", "teacher", "average", "task_generalist")
    protocol = replace(finished[0].protocol, methods=methods)
    monkeypatch.setattr(growth, "DRY", protocol)
    monkeypatch.setattr(growth, "LENGTHS", (1, 3, 3))
    places = ["--data", str(photographs), "--work", str(tmp_path), "--json", str(tmp_path / "figures.json")]
    monkeypatch.setattr(sys, "argv", ["growth", "--dry", *places])
    growth.main()
    figures = json.loads((tmp_path / "figures.json").read_text())
    first, longer = (figures["lengths"][times] for times in ("1", "3"))
    assert longer["protocol"]["epochs"] == 3 * first["protocol"]["epochs"]
    assert longer["aerial_teacher_probe"] == first["aerial_teacher_probe"] and "aerial_average_probe" not in longer
    assert figures["growth_3_finding_2"] == pytest.approx(longer["finding_2"] - first["finding_2"])
    work = tmp_path / protocol.name
    assert len(list(work.glob("teachers/*.done.json"))) == len(list(work.glob("*.zarr"))) == 1
    assert growth.table(figures).count("\n") == 2 + 2 + 1


def test_the_last_length_is_what_still_fits(photographs: Path, tmp_path: Path):
    run = growth.Growth(photographs, tmp_path, protocols.SHORT, jobs=1, seconds=100.0)
    run.took.update({1: 10.0, 5: 30.0})  # 5 seconds for each length more
    assert run.last(20) == 18 and run.last(6) == 6 and run.last(5) == 0
    run.took.update({5: 98.0})
    assert run.last(20) == 0


def test_an_error_of_a_step_that_runs_beside_others_reaches_the_user(
    finished: tuple[study.Study, dict], tmp_path: Path
):
    run, _ = finished
    steps = [run.teacher("aerial", 4, f"-{n}", (0.0, 0.5)) for n in range(2)]
    steps = [Step(settings=replace(step.settings, epochs=0), out=tmp_path / step.out.name) for step in steps]
    with pytest.raises(UserError, match="epochs: 0 makes no sense"):
        study.Study(run.source, run.work, run.protocol, jobs=2).do(steps)


def test_side_by_side_commands_end_with_the_study_that_is_killed(tmp_path: Path) -> None:
    program = tmp_path / "study.py"
    program.write_text(
        "import os, time\n"
        "from concurrent.futures import ProcessPoolExecutor\n"
        "from multiprocessing import get_context\n"
        "from benchmarks.experiments.consolidation.steps import end_with_parent\n"
        "if __name__ == '__main__':\n"
        "    pool = ProcessPoolExecutor(1, get_context('spawn'), initializer=end_with_parent)\n"
        "    print(pool.submit(os.getpid).result(), flush=True)\n"
        "    pool.submit(time.sleep, 60).result()\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen([sys.executable, program], stdout=subprocess.PIPE, env=environment) as parent:
        assert parent.stdout is not None
        worker = int(parent.stdout.readline())
        os.kill(worker, 0)
        parent.kill()
    deadline = time.monotonic() + 20
    while running(worker) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not running(worker)


def running(process: int) -> bool:
    """Whether it is there and no zombie, which has no command line any more."""
    try:
        return bool(Path(f"/proc/{process}/cmdline").read_bytes())
    except FileNotFoundError:
        return False
