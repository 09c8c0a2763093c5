"""Transfer of small backbones on real JPEGs: one split for all, paired differences, what is written."""

import tomllib
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from repcon import cli
from repcon.commands import evaluate
from repcon.config import ClassSubset, DatasetConfig, EvaluateConfig, TeachConfig, dump, parse
from repcon.evaluation.data_sets import parse_data_sets, split_images
from repcon.evaluation.features import ExtractConfig, extract
from repcon.evaluation.probes import linear_probe
from repcon.images.packing import open_or_pack
from repcon.models.preprocessing import preprocessing_of
from repcon.models.saved_model import save_model
from repcon.models.timm_import import timm
from repcon.runtime.console import progress
from repcon.runtime.errors import UserError


@pytest.fixture(scope="module")
def backbones(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    root = tmp_path_factory.mktemp("backbones")
    for seed, name in enumerate(("first", "second")):
        torch.manual_seed(seed)
        model = timm.create_model("test_efficientnet", num_classes=3)
        preprocessing = preprocessing_of(model, 32)
        save_model(model, root / name, classes=list("abc"), preprocessing=preprocessing, extra={})
    return f"first={root / 'first'}", f"second={root / 'second'}"


@pytest.fixture(scope="module")
def recipe(picture_folder: Path, backbones: tuple[str, ...]) -> EvaluateConfig:
    return EvaluateConfig(
        data=str(picture_folder), out="", backbones=backbones, size=32, fewshot_trials=5, loader="torch", device="cpu"
    )


@pytest.fixture(scope="module")
def evaluated(recipe: EvaluateConfig, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    out = tmp_path_factory.mktemp("evaluate") / "run"
    return out, evaluate.run(replace(recipe, out=str(out)))


def test_every_backbone_has_every_metric_and_differences_are_paired(evaluated: tuple[Path, dict]):
    out, results = evaluated
    assert results["baseline"] == "first" and list(results["backbones"]) == ["first", "second"]
    assert results["train_images"] == results["test_images"] == 16 and results["chance"] == 25
    for metric in ("knn_1", "knn_5", "knn_20", "probe", "shot_1"):
        first, second = (results["backbones"][name]["metrics"][metric] for name in ("first", "second"))
        difference = results["differences"]["second"][metric]
        assert 0 <= first["low"] <= first["mean"] <= first["high"] <= 100
        assert np.isclose(difference["mean"], second["mean"] - first["mean"])
    with np.load(out / "answers.npz") as answers:
        assert np.isclose(
            100 * answers["first/probe"].mean(), results["backbones"]["first"]["metrics"]["probe"]["mean"]
        )
        shares = answers["second/shot_1"]
        assert len(shares) == 16 and np.isclose(5 * shares, np.round(5 * shares)).all()
    for name in ("transfer", "differences"):
        assert ElementTree.parse(out / f"{name}.svg").getroot().tag == "{http://www.w3.org/2000/svg}svg"
    assert (out / "results.json").is_file()


def test_a_backbone_whose_features_are_no_numbers_is_refused(recipe: EvaluateConfig, tmp_path: Path):
    torch.manual_seed(0)
    model = timm.create_model("test_efficientnet", num_classes=3)
    with torch.no_grad():
        next(model.parameters())[0] = 3e38  # A number by itself; what follows from it is none.
    save_model(model, tmp_path / "broken", classes=list("abc"), preprocessing=preprocessing_of(model, 32), extra={})
    broken = replace(recipe, out=str(tmp_path / "out"), backbones=(f"broken={tmp_path / 'broken'}",), metrics=("knn",))
    with pytest.raises(UserError, match="no numbers"):
        evaluate.run(broken)
    assert not (tmp_path / "out" / "features").exists()


def test_a_name_that_looks_like_a_formula_is_drawn_as_it_is(recipe: EvaluateConfig, tmp_path: Path):
    backbone = recipe.backbones[0].partition("=")[2]
    evaluate.run(replace(recipe, out=str(tmp_path), backbones=(f"a$x_$={backbone}",), metrics=("knn",)))
    assert (tmp_path / "results.json").is_file() and (tmp_path / "transfer.svg").is_file()


def test_classes_that_were_taught_on_these_images_are_pointed_out(
    recipe: EvaluateConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    pack = open_or_pack(recipe.data, tmp_path)
    model = timm.create_model("test_efficientnet", num_classes=2)
    inputs, taught = preprocessing_of(model, 32), [pack.classes[0], "elsewhere"]
    for name, fingerprint in (("same", pack.fingerprint), ("other", "0" * 64)):
        save_model(
            model, tmp_path / name, classes=taught, preprocessing=inputs, extra={"data_fingerprint": fingerprint}
        )
    distilled = {"proxy_fingerprint": pack.fingerprint}
    save_model(model, tmp_path / "distilled", classes=(), preprocessing=inputs, extra=distilled)
    backbones = tuple(f"{name}={tmp_path / name}" for name in ("same", "other", "distilled"))
    evaluate.run(replace(recipe, out=str(tmp_path / "out"), backbones=backbones, metrics=("knn",)))
    said = " ".join(capsys.readouterr().out.split())
    assert f"1 of the 4 classes ({pack.classes[0]}) were taught to same" in said and "taught to other" not in said
    assert said.count("was distilled on") == 1 and "distilled was distilled on the images of this very pack" in said


def test_shots_beyond_the_smallest_class_are_left_out(evaluated: tuple[Path, dict]):
    metrics = evaluated[1]["backbones"]["first"]["metrics"]
    assert "shot_1" in metrics and "shot_5" not in metrics  # Four training images per class.
    assert evaluated[1]["shots_left_out"] == [5, 10]


def test_shots_that_are_left_out_are_said(recipe: EvaluateConfig, tmp_path: Path, capsys):
    evaluate.run(replace(recipe, backbones=recipe.backbones[:1], metrics=("fewshot",), out=str(tmp_path / "out")))
    said = " ".join(capsys.readouterr().out.split())
    assert "left out: 5-shot, 10-shot; the class " in said and "has 4 to train on" in said


def test_train_and_test_share_no_image(recipe: EvaluateConfig, tmp_path: Path):
    pack = open_or_pack(recipe.data, tmp_path)
    for folds, tested in ((0, 16), (2, 32), (3, 32)):
        split = split_images(pack, replace(recipe, folds=folds))
        assert len(split.folds) == (folds or 1) and len(np.unique(split.tested)) == len(split.tested) == tested
        for train, test in split.folds:
            assert np.intersect1d(train, test).size == 0 and len(train) + len(test) == 32
            assert (np.bincount(split.labels[train]) >= 4).all()
        assert (pack.labels[split.rows] == [pack.classes.index(split.classes[i]) for i in split.labels]).all()


def test_folds_test_every_image_once_by_probes_of_the_others(recipe: EvaluateConfig, tmp_path: Path):
    pack = open_or_pack(recipe.data, tmp_path)
    settings = replace(recipe, folds=2, out=str(tmp_path / "out"), metrics=("probe", "knn", "fewshot"))
    results = evaluate.run(settings)
    assert (results["test_images"], results["train_images"], results["folds"]) == (32, 16, 2)
    split = split_images(pack, settings)
    with np.load(tmp_path / "out" / "answers.npz") as answers, progress() as bars:
        assert (answers["test_rows"] == split.rows[split.tested]).all()
        # By hand: the second fold's answers are those of probes that were trained on the first fold alone.
        reading = ExtractConfig(size=32, batch_size=64, loader="torch", num_workers=1, device="cpu", cache=tmp_path)
        values = extract(recipe.backbones[0].partition("=")[2], pack, split.rows, reading, bars).values
        train, test = split.folds[1]
        predicted = linear_probe(values[train], split.labels[train], values[test], recipe.seed).predicted
        assert (answers["first/probe"][-len(test) :] == (predicted == split.labels[test])).all()
        assert len(answers["first/shot_1"]) == 32


def test_one_fold_is_refused(recipe: EvaluateConfig, tmp_path: Path):
    with pytest.raises(UserError, match="folds: 1 makes no sense; give 2 or more"):
        evaluate.run(replace(recipe, folds=1, out=str(tmp_path / "out")))


def test_two_classes_suffice_and_one_does_not(recipe: EvaluateConfig, tmp_path: Path):
    half = replace(recipe, classes=ClassSubset(seed=1, start=0.5), metrics=("knn",))
    results = evaluate.run(replace(half, out=str(tmp_path / "half")))
    assert results["classes"] == 2 and results["chance"] == 50
    with pytest.raises(UserError, match="class"):
        evaluate.run(replace(half, out=str(tmp_path / "one"), classes=ClassSubset(start=0.75)))


def test_a_class_with_one_image_is_left_out_by_name(recipe: EvaluateConfig, picture_folder: Path, tmp_path: Path):
    data = tmp_path / "data"
    for name, count in (("apple", 6), ("birch", 6), ("cedar", 1)):
        (data / name).mkdir(parents=True)
        for path in sorted((picture_folder / name).iterdir())[:count]:
            (data / name / path.name).write_bytes(path.read_bytes())
    results = evaluate.run(replace(recipe, data=str(data), out=str(tmp_path / "out"), metrics=("knn", "probe")))
    assert results["left_out"] == ["cedar"] and results["class_names"] == ["apple", "birch"]


def test_backbones_side_by_side(recipe: EvaluateConfig, backbones: tuple[str, ...], tmp_path: Path):
    first, second = (backbone.partition("=")[2] for backbone in backbones)
    both = replace(recipe, backbones=(*backbones, f"both={first} + {second}"), out=str(tmp_path / "out"))
    about = evaluate.run(both)["backbones"]
    assert about["both"]["dimensions"] == about["first"]["dimensions"] + about["second"]["dimensions"]
    values = np.random.default_rng(0).normal(size=(4, 3))
    joined, weights = evaluate.concatenate([(values, "a"), (values * 7, "b")])
    assert np.allclose(joined[:, :3], joined[:, 3:]) and weights == "a + b"


def test_fine_tuning_is_measured_on_the_same_test_images(recipe: EvaluateConfig, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(evaluate, "FINETUNE", replace(evaluate.FINETUNE, epochs=2))
    out = tmp_path / "out"
    results = evaluate.run(replace(recipe, metrics=("finetune",), out=str(out), batch_size=8))
    assert set(results["backbones"]["first"]["metrics"]) == {"finetune"}
    with np.load(out / "answers.npz") as answers:
        assert answers["first/finetune"].dtype == bool and len(answers["first/finetune"]) == results["test_images"]


@pytest.mark.parametrize(("change", "words"), [
    ({"backbones": ()}, "backbones"), ({"baseline": "third"}, "baseline"), ({"test": 1.0}, "test"),
    ({"backbones": ("a=x", "a=y")}, "'a'"), ({"backbones": ("a=no_such_model",)}, "no_such_model"),
])  # fmt: skip
def test_mistakes_are_named(recipe: EvaluateConfig, tmp_path: Path, change: dict, words: str):
    with pytest.raises(UserError, match=words):
        evaluate.run(replace(recipe, out=str(tmp_path / "out"), **change))


def test_a_backbone_of_a_function_is_measured_beside_timm_s(recipe, backbones, tmp_path, monkeypatch, capsys):
    (tmp_path / "own_backbones.py").write_text(
        "import torch\nfrom torch import nn\n"
        "TAKES = {'size': 16, 'mean': [0.5] * 3, 'std': [0.5] * 3}\n"
        "def pooled():\n    return nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten()), TAKES\n"
        "def classifier():\n    return nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 3)), TAKES\n"
        "def maps():\n    return nn.Identity(), TAKES\n"
        "def fixed():\n    return nn.Sequential(nn.Flatten(), nn.Linear(768, 2), nn.ReLU()), TAKES\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    both = replace(recipe, backbones=(backbones[0], "own=own_backbones:pooled"), out=str(tmp_path / "out"))
    about = evaluate.run(both)["backbones"]["own"]
    assert about["dimensions"] == 12 and about["model"] == "own_backbones:pooled"
    assert "warning" not in capsys.readouterr().out
    alone = replace(recipe, backbones=("own=own_backbones:classifier",), out=str(tmp_path / "alone"))
    evaluate.run(alone)
    assert "ends in a linear layer" in " ".join(capsys.readouterr().out.split())
    for change, words in (
        ({"backbones": ("own_backbones:maps",)}, r"shape \(.*not one vector per image"),
        ({"backbones": ("own_backbones:fixed",)}, "does not take inputs of 32 pixels"),
        ({"backbones": ("own_backbones:absent",)}, "backbone: own_backbones:absent failed"),
        ({"metrics": ("finetune",)}, "fine-tuning takes models of timm, and own is not"),
    ):
        with pytest.raises(UserError, match=words):
            evaluate.run(replace(alone, **change))


def test_a_folder_without_a_model_is_named(recipe: EvaluateConfig, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"config\.json"):
        evaluate.run(replace(recipe, out=str(tmp_path / "out"), backbones=(str(tmp_path / "empty"),)))


def test_several_data_sets_each_and_in_the_mean(recipe: EvaluateConfig, evaluated, picture_folder, tmp_path, capsys):
    """The same set under two names is its own mean; of another half of the classes it is another set."""
    half = DatasetConfig(name="half", data=str(picture_folder), classes=ClassSubset(seed=1, start=0.5))
    sets = (DatasetConfig(name="whole", data=str(picture_folder)), half)
    out = tmp_path / "out"
    results = evaluate.run(replace(recipe, data=(), datasets=sets, out=str(out)))
    assert results.keys() == {"datasets", "mean", "baseline", "size", "verdict"}
    alone = evaluated[1]
    for key in ("differences", "test_images", "class_names"):
        assert results["datasets"]["whole"][key] == alone[key]
    for name in ("first", "second"):
        assert results["datasets"]["whole"]["backbones"][name]["metrics"] == alone["backbones"][name]["metrics"]
        means = [one["backbones"][name]["metrics"]["probe"]["mean"] for one in results["datasets"].values()]
        assert results["mean"]["backbones"][name]["metrics"]["probe"]["mean"] == pytest.approx(np.mean(means))
    assert results["verdict"]["by_dataset"].keys() == {"whole", "half"}
    for name in ("whole", "half"):
        assert (out / name / "answers.npz").is_file() and (out / name / "transfer.svg").is_file()
    said = capsys.readouterr().out
    assert "Linear probe on 2 data sets" in said and "Transfer to half" in said
    assert said.rstrip().endswith(results["verdict"]["sentence"])


def test_one_data_set_keeps_its_shape_and_ends_with_the_verdict(recipe: EvaluateConfig, evaluated, tmp_path, capsys):
    _, results = evaluated
    assert {"backbones", "differences", "baseline", "classes", "class_names", "data", "verdict"} <= results.keys()
    assert results["verdict"]["subject"] in ("first", "second") and results["verdict"]["metric"] == "probe"
    asked = evaluate.run(replace(recipe, student="second", metrics=("knn",), out=str(tmp_path / "out")))
    assert asked["verdict"]["subject"] == "second" and asked["verdict"]["rival"] == "first"
    assert capsys.readouterr().out.rstrip().endswith(asked["verdict"]["sentence"])


def test_a_backbone_side_by_side_with_another_is_no_rival(recipe: EvaluateConfig, backbones, tmp_path):
    first, second = (backbone.partition("=")[2] for backbone in backbones)
    both = (*backbones, f"both={first} + {second}")
    found = evaluate.run(replace(recipe, backbones=both, metrics=("knn",), out=str(tmp_path / "out")))["verdict"]
    assert "both" not in (found["subject"], *found["differences"])


def test_each_backbone_is_measured_at_its_own_size(recipe: EvaluateConfig, backbones, tmp_path, capsys):
    model = timm.create_model("test_efficientnet", num_classes=3)
    save_model(model, tmp_path / "large", classes=list("abc"), preprocessing=preprocessing_of(model, 48), extra={})
    own = replace(recipe, size=0, backbones=(backbones[0], f"large={tmp_path / 'large'}"), metrics=("knn",))
    about = evaluate.run(replace(own, out=str(tmp_path / "own")))["backbones"]
    assert (about["first"]["input_size"], about["large"]["input_size"]) == ([32], [48])
    assert "own input size, in pixels: first 32, large 48" in " ".join(capsys.readouterr().out.split())
    about = evaluate.run(replace(own, size=32, out=str(tmp_path / "one")))["backbones"]
    assert about["large"]["input_size"] == [32]
    assert "own input size" not in capsys.readouterr().out


def test_data_sets_are_named(tmp_path: Path):
    (tmp_path / "a=b").mkdir()
    config = EvaluateConfig(out="", data=("birds=x/y", str(tmp_path / "a=b"), "s3://bucket/food?v=1"))
    with pytest.raises(UserError, match="no name for a data set"):
        parse_data_sets(config)
    found = parse_data_sets(replace(config, data=("birds=x/y", f"ab={tmp_path / 'a=b'}", "packs/food")))
    assert {name: one.data for name, one in found.items()} == {
        "birds": "x/y", "ab": str(tmp_path / "a=b"), "food": "packs/food"
    }  # fmt: skip
    with pytest.raises(UserError, match="two data sets are called 'food'"):
        parse_data_sets(replace(config, data=("packs/food", "food=other")))
    with pytest.raises(UserError, match="data: none given"):
        parse_data_sets(EvaluateConfig(out=""))
    with pytest.raises(UserError, match="together with `datasets`"):
        parse_data_sets(replace(config, datasets=(DatasetConfig(name="a", data="b"),)))


def test_a_recipe_names_one_data_set_or_several():
    for data in ("packs/a", ("a=packs/a", "b=packs/b")):
        config = EvaluateConfig(out="o", data=data)
        assert parse(EvaluateConfig, tomllib.loads(dump(config)), "recipe") == config
    with pytest.raises(UserError, match="data"):
        parse(EvaluateConfig, {"data": 3, "out": "o"}, "recipe")


def test_a_flag_may_be_repeated():
    words = ["--data", "a=x", "--out", "o", "--data", "b=y", "--backbones=t=1", "--backbones", "u=2", "v=3"]
    config = cli._settings("evaluate", EvaluateConfig, words, None)
    assert config == EvaluateConfig(out="o", data=("a=x", "b=y"), backbones=("t=1", "u=2", "v=3"))


def test_classes_are_named_by_a_flag_beside_the_slice():
    words = ["--data", "x", "--out", "o", "--classes", "5", "6", "birch"]
    config = cli._settings("evaluate", EvaluateConfig, words, None)
    assert config.classes == ClassSubset(names=("5", "6", "birch"))
    assert parse(EvaluateConfig, tomllib.loads(dump(config)), "recipe") == config
    config = cli._settings("teach", TeachConfig, ["--data", "x", "--out", "o", "--classes.stop", "0.5"], None)
    assert config.classes == ClassSubset(stop=0.5)
