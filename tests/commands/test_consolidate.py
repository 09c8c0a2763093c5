"""From images and teachers to a student and a report in one command; it goes on, and refuses what cannot come out."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import simplejpeg
from pictures import photograph
from precompute_case import contents, teacher_folders  # noqa: F401  (a fixture)

import repcon
from repcon import cli
from repcon.commands import consolidate, outcome, train
from repcon.config import (
    ClassSubset,
    ConsolidateConfig,
    EvaluateConfig,
    PrecomputeConfig,
    TeachConfig,
    TrainConfig,
)
from repcon.models.student import head_names
from repcon.models.timm_import import timm
from repcon.runtime.errors import UserError


@pytest.fixture(scope="session")
def proxies(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Twelve and six unlabelled images in two folders."""
    root = tmp_path_factory.mktemp("proxies")
    for name, count, seed in (("one", 12, 900), ("two", 6, 950)):
        (root / name).mkdir()
        for number in range(count):
            pixels = photograph(seed + number, 48, 40, hue=number)
            (root / name / f"{number}.jpg").write_bytes(simplejpeg.encode_jpeg(pixels, quality=90))
    return root / "one", root / "two"


@pytest.fixture
def config(
    proxies: tuple[Path, Path],
    teacher_folders: dict[str, Path],  # noqa: F811
    picture_folder: Path,
    tmp_path: Path,
) -> ConsolidateConfig:
    """Two teachers that are there and one that is made, of one half of the classes; measured on the other half."""
    five = str(teacher_folders["five"])
    return ConsolidateConfig(
        proxy=tuple(map(str, proxies)),
        teachers=(f"five={five}", f"nine={teacher_folders['nine']}"),
        teach=(f"plants={picture_folder}",),
        evaluate=(f"plants={picture_folder}",),
        out=str(tmp_path / "run"),
        size=32,
        crops=2,
        epochs=1,
        device="cpu",
        teaching=TeachConfig(
            data="",
            out="",
            model=five,
            classes=ClassSubset(stop=0.5),
            epochs=1,
            batch_size=4,
            num_workers=1,
            loader="torch",
        ),
        labelling=PrecomputeConfig(pack="", out="", temperatures=(1.0, 2.0), k=4, num_workers=1, loader="torch"),
        training=TrainConfig(
            pack="",
            store="",
            out="",
            batch_size=4,
            val_fraction=0.2,
            head_warmup_steps=2,
            num_workers=1,
            loader="torch",
        ),
        evaluation=EvaluateConfig(
            out="", classes=ClassSubset(start=0.5), fewshot_trials=2, num_workers=1, loader="torch"
        ),
    )


def test_images_and_teachers_become_a_student_and_a_report(
    config: ConsolidateConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = consolidate.run(config)
    run = tmp_path / "run"
    outcome.show("consolidate", config, results)
    last = capsys.readouterr().out.rstrip().splitlines()[-1]
    assert last.startswith(f"student: {run}/student/student; report: {run}/report/report.html; next: ")
    assert set(head_names(results["student"])) == {"five", "nine", "plants"}
    assert set(results["transfer"]["backbones"]) == {"five", "nine", "plants teacher", "student"}
    assert [(row["head"], row["held_out"]) for row in results["transfer"]["heads"]] == [("plants", True)]
    report = (run / "report" / "report.md").read_text().splitlines()
    assert report[0] == "# One backbone of five, nine, plants"
    assert report[2].startswith("student ") and "points of linear probe" in report[2]
    assert timm.create_model(f"local-dir:{results['student']}", pretrained=True, num_classes=0).num_features
    assert json.loads((run / "results.json").read_text())["backbone"].endswith("nine")  # that of most classes
    # The same command again makes nothing anew, also where more is measured by now.
    before = contents(run / "student" / "student") | contents(run / "labels.zarr")
    again = consolidate.run(replace(config, evaluate=(*config.evaluate, config.evaluate[0].replace("plants", "same"))))
    assert list(again["transfer"]["datasets"]) == ["plants", "same"]
    assert contents(run / "student" / "student") | contents(run / "labels.zarr") == before


def test_stopped_before_any_step_it_goes_on_to_the_same_student(
    config: ConsolidateConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(config, teach=())
    whole = consolidate.run(replace(config, out=str(tmp_path / "whole"), evaluate=()))

    def stop(settings: object) -> None:
        raise KeyboardInterrupt

    for step in (consolidate.precompute, consolidate.inspect, consolidate.train, consolidate.evaluate):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(step, "run", stop)
            consolidate.run(config)
    results = consolidate.run(config)
    weights = "model.safetensors"
    assert contents(results["student"])[weights] == contents(whole["student"])[weights]
    assert set(results["transfer"]["backbones"]) == {"five", "nine", "student"}


def test_without_labelled_images_the_report_says_what_the_student_learnt(
    config: ConsolidateConfig, tmp_path: Path
) -> None:
    results = consolidate.run(replace(config, teach=(), evaluate=()))
    assert results["transfer"] == {} and "distilled from five, nine on 18 images" in results["sentence"]
    report = (tmp_path / "run" / "report" / "report.md").read_text().splitlines()
    assert "distilled from five, nine on 18 images" in report[2]


def test_the_plan_and_the_estimate_make_nothing(
    config: ConsolidateConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = consolidate.run(replace(config, dry_run=True))
    assert [row["step"] for row in figures["plan"]] == ["pack", "teach", "precompute", "train", "evaluate", "report"]
    assert not (tmp_path / "run").exists()
    assert consolidate.run(replace(config, estimate=True))["total_crops"] == 36
    assert not (tmp_path / "run" / "labels.zarr").exists() and not (tmp_path / "run" / "student").exists()
    assert "plants is not taught yet" in capsys.readouterr().out


def test_bad_input_is_refused_before_anything_is_made(
    config: ConsolidateConfig, picture_folder: Path, tmp_path: Path
) -> None:
    five = config.teachers[0].partition("=")[2]
    refusals = [
        ({"proxy": ()}, "proxy: no images named"),
        ({"teachers": (), "teach": ()}, "teachers: none named"),
        ({"teachers": ("five",)}, "must be NAME=MODEL"),
        ({"teachers": (f"a={five}", f"a={five}")}, "two are called 'a'"),
        ({"teachers": (f"plants={five}",)}, "teach: plants is among the teachers too"),
        ({"teachers": (f"student={five}",)}, "is what the result is called"),
        ({"teachers": (f"a={tmp_path}/gone", "b=no_such_model", f"c={five}")}, "gone.*no_such_model"),
        ({"backbone": "no_such_model"}, "backbone: model no_such_model"),
        ({"evaluate": config.evaluate * 2}, "two are called 'plants'"),
        ({"teachers": (f"a b={five}",)}, "a b"),
        ({"epochs": -1}, "epochs"),
    ]
    for changes, told in refusals:
        with pytest.raises(UserError, match=f"(?s){told}"):
            consolidate.run(replace(config, **changes))
        assert not (tmp_path / "run").exists(), told
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="holds other files"):
        consolidate.run(config)


def test_a_proxy_that_holds_measured_images_is_refused(
    config: ConsolidateConfig, picture_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(picture_folder, tmp_path / "copy")
    config = replace(config, proxy=(str(tmp_path / "copy"), config.proxy[0]), teach=())
    with pytest.raises(UserError, match=r"--proxy .*/copy .*: holds 16 of the images that plants is measured on"):
        consolidate.run(config)
    assert not (tmp_path / "run" / "labels.zarr").exists()
    # Other images in its place are no other run: nothing was made of the first.
    shutil.rmtree(tmp_path / "run" / "packs" / "proxy")
    consolidate.run(replace(config, proxy=config.proxy[1:]))
    shutil.rmtree(tmp_path / "run")
    consolidate.run(replace(config, allow_overlap=True))
    assert "holds 16 of the images" in capsys.readouterr().out.replace("\n", " ")


def test_another_run_in_the_same_folder_is_refused_by_its_field(
    config: ConsolidateConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(config, teach=(), evaluate=())
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "run", lambda settings: (_ for _ in ()).throw(KeyboardInterrupt))
        consolidate.run(config)
    for changes, told in (
        ({"teachers": config.teachers[:1]}, "teachers is"),
        ({"proxy": config.proxy[:1]}, "proxy is"),
        ({"crops": 3}, "crops is 3 now and 2 there"),
        ({"training": replace(config.training, freeze_blocks=1)}, "training.freeze_blocks is 1 now and 0 there"),
    ):
        with pytest.raises(UserError, match=told):
            consolidate.run(replace(config, **changes))


def test_a_recipe_holds_all_of_it_and_flags_go_over_it(tmp_path: Path) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text(
        'proxy = ["p"]\nteachers = ["a=b"]\nepochs = 4\n'
        "[training]\nfreeze_blocks = 3\n[training.optim]\nclip_norm = 2.0\n"
    )
    settings = cli._settings("consolidate", ConsolidateConfig, ["--out", "o", "--epochs", "7"], str(recipe))
    assert (settings.out, settings.epochs, settings.training.freeze_blocks) == ("o", 7, 3)
    rate = TrainConfig(pack="", store="", out="").optim.lr  # not that of OptimConfig
    assert (settings.training.optim.lr, settings.training.optim.clip_norm) == (rate, 2.0)
    assert settings.labelling.temperatures == (1.0, 2.0)


def test_the_same_in_python(config: ConsolidateConfig, teacher_folders: dict[str, Path], tmp_path: Path) -> None:  # noqa: F811
    figures = repcon.consolidate(
        proxy=[Path(path) for path in config.proxy],
        teachers={"five": teacher_folders["five"], "nine": teacher_folders["nine"]},
        out=tmp_path / "run",
        crops=2,
        training={"batch_size": 4},
        labelling=config.labelling,
        dry_run=True,
    )
    assert figures["backbone"] == str(teacher_folders["nine"])
    for wrong, told in (({"epoch": 3}, "unknown key epoch"), ({"training": {"epoch": 3}}, "epoch")):
        with pytest.raises(UserError, match=told):
            repcon.consolidate(proxy=config.proxy, out=tmp_path / "run", **wrong)
