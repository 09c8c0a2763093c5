"""start.py: the mean of the teachers' weights, chosen by their labels; warm heads; what is refused; resumes."""

import dataclasses
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from start_case import SIZE, make_case, save_teacher, start_settings
from training_case import lines, newest, stop_after

from repcon.commands import train
from repcon.config import HeadConfig, OptimConfig, TeacherConfig
from repcon.distill import weight_search
from repcon.distill.weight_search import Candidate
from repcon.labels.store import LabelStore
from repcon.models import teacher as teachers
from repcon.models.factory import create_model
from repcon.models.initial_weights import find_teacher_weights
from repcon.models.merge import average, split_classifier
from repcon.models.student import load_student
from repcon.runtime.console import console
from repcon.runtime.errors import UserError

STILL = OptimConfig(lr=1e-60, weight_decay=0.0)


@pytest.fixture(scope="session")
def related(tmp_path_factory: pytest.TempPathFactory, picture_folder: Path) -> Path:
    return make_case(tmp_path_factory.mktemp("related"), picture_folder)


def backbone_of(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "student" / "model.safetensors")


def mean_of(root: Path, shares: dict[str, float]) -> dict[str, torch.Tensor]:
    held = {name: split_classifier(create_model(str(root / name)), SIZE) for name in shares}
    return average(held, shares)


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_by_default_the_start_is_the_mean_that_the_labels_choose(related: Path, tmp_path: Path) -> None:
    """With a rate of nothing it comes out again, and each head is its teacher's own classifier."""
    out = tmp_path / "run"
    with console.capture() as told:
        results = train.run(start_settings(related, out, optim=STILL))
    start = results["init"]
    assert start["init"] == "average" and start["warm_heads"] == ["generalist", "birds"]
    assert sum(start["shares"].values()) == pytest.approx(1)
    assert_same(backbone_of(out), mean_of(related, start["shares"]))
    made = load_student(out)
    for name in ("generalist", "birds"):
        classifier = create_model(str(related / name)).get_classifier()  # pyright: ignore[reportCallIssue]
        assert torch.equal(made.answer.weight[made.head_slices[name]], classifier.weight)
    candidates = start["search"]["candidates"]
    assert len(candidates) == weight_search.GRID_STEPS + 1 and candidates[0]["shares"] == start["shares"]
    assert [each["score"] for each in candidates] == sorted(each["score"] for each in candidates)
    single = {each["shares"]["birds"]: each["kl"] for each in candidates}
    assert single[1.0]["birds"] < 0.05 < single[0.0]["birds"] and single[0.0]["generalist"] < 0.05
    begun = {head: values["kl"] for head, values in lines(out, "validation")[0]["heads"].items()}
    assert max(begun.values()) < 0.9 * max(single[0.0]["birds"], single[1.0]["generalist"])
    words = re.sub(r"\s+", " ", told.get())
    assert "start: mean of weights, " in words and "from their teachers' classifiers: generalist, birds" in words
    card = (out / "student" / "README.md").read_text()
    assert "the mean of weights" in card and "share of birds" in card
    saved = torch.load(newest(out), weights_only=True)["initialization"]
    assert saved == json.loads((out / "results.json").read_text())["init"]


def test_a_mix_of_the_recipe_s_is_taken(related: Path, tmp_path: Path) -> None:
    shares = {"generalist": 0.25, "birds": 0.75}
    results = train.run(start_settings(related, tmp_path / "run", optim=STILL, init_weights=shares))
    assert results["init"]["shares"] == shares and "search" not in results["init"]
    assert_same(backbone_of(tmp_path / "run"), mean_of(related, shares))


def test_the_backbone_s_own_weights_take_warm_heads_too(related: Path, tmp_path: Path) -> None:
    results = train.run(start_settings(related, tmp_path / "run", optim=STILL, init="backbone"))
    assert results["init"] | {"warm_heads": None} == {
        "init": "backbone", "shares": {}, "weights": {}, "warm_heads": None, "warmed_up_heads": []
    }  # fmt: skip
    assert results["init"]["warm_heads"] == ["generalist", "birds"]
    assert_same(backbone_of(tmp_path / "run"), mean_of(related, {"generalist": 1.0}))


@pytest.mark.parametrize(
    "changes",
    [{"freeze_blocks": 2}, {"projection": 8}, {"precision": "bf16", "heads": ()}],
    ids=["frozen", "projection", "bf16-all-heads"],
)
def test_frozen_blocks_projections_and_bf16(related: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    """Frozen blocks hold the mean; a projection leaves heads without a classifier; a teacher of another architecture
    leaves the backbone its own weights."""
    results = train.run(start_settings(related, tmp_path / "run", **changes))
    start = results["init"]
    if "heads" in changes:
        assert start["init"] == "backbone" and start["warmed_up_heads"] == ["other"]
        return
    assert start["init"] == "average"
    mean = mean_of(related, start["shares"])
    assert ("conv_stem.weight" in mean) and start["warm_heads"] == (
        [] if "projection" in changes else ["generalist", "birds"]
    )
    if "freeze_blocks" in changes:
        assert torch.equal(backbone_of(tmp_path / "run")["conv_stem.weight"], mean["conv_stem.weight"])


def test_random_heads_learn_on_the_features_first(related: Path, tmp_path: Path) -> None:
    """Of teachers of another architecture; with a projection too; the backbone stays."""
    begun = {}
    for steps in (0, 200):
        for projection in (0, 8):
            out = tmp_path / f"{steps}-{projection}"
            changes = {"heads": (HeadConfig(name="other"),), "head_warmup_steps": steps, "projection": projection}
            results = train.run(start_settings(related, out, optim=STILL, **changes))
            assert results["init"]["warmed_up_heads"] == (["other"] if steps else [])
            assert_same(backbone_of(out), mean_of(related, {"generalist": 1.0}))
            begun[steps, projection] = lines(out, "step")[0]["loss"]["other"]
    assert begun[200, 0] < 0.7 * begun[0, 0] and begun[200, 8] < 0.7 * begun[0, 8]


def test_heads_are_balanced_by_what_single_models_have(related: Path, tmp_path: Path) -> None:
    """Asked for, the losses of the first step are those of the plain run, times the weights."""
    plain = train.run(start_settings(related, tmp_path / "plain", optim=STILL))
    balanced = train.run(start_settings(related, tmp_path / "balanced", optim=STILL, balance_heads=True))
    largest = weight_search.largest_kl([
        Candidate(shares=each["shares"], kl=each["kl"])
        for each in plain["init"]["search"]["candidates"]
        if max(each["shares"].values()) == 1
    ])  # fmt: skip
    weights = balanced["init"]["weights"]
    assert weights == pytest.approx({head: min(largest.values()) / kl for head, kl in largest.items()})
    assert max(weights.values()) == 1 > min(weights.values()) and plain["init"]["weights"] == {}
    first = {run: lines(tmp_path / run, "step")[0]["loss"] for run in ("plain", "balanced")}
    assert first["balanced"] == pytest.approx({head: loss * weights[head] for head, loss in first["plain"].items()})


def test_a_resume_does_not_search_again(related: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends as an unbroken run, also where the teachers are gone meanwhile."""
    settings = {"epochs": 2, "balance_heads": True}
    whole = train.run(start_settings(related, tmp_path / "whole", **settings))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(5, patch)
        train.run(start_settings(related, tmp_path / "parts", **settings))
    with pytest.raises(UserError, match=r"init_weights.birds was None and is 1.0"):
        train.run(start_settings(related, tmp_path / "parts", **settings, init_weights={"birds": 1.0}))
    monkeypatch.setattr(weight_search, "search_shares", None)
    parts = train.run(start_settings(related, tmp_path / "parts", **settings))
    assert parts["init"] | {"search": None} == whole["init"] | {"search": None}
    assert_same(backbone_of(tmp_path / "parts"), backbone_of(tmp_path / "whole"))


@pytest.fixture
def moved(related: Path, tmp_path: Path) -> Iterator[Path]:
    """The case with the teacher `birds` in another place than its labels say."""
    (related / "birds").rename(tmp_path / "birds")
    yield tmp_path / "birds"
    (tmp_path / "birds").rename(related / "birds")


def test_teachers_that_moved(related: Path, tmp_path: Path, moved: Path) -> None:
    """Without them the backbone's own weights are taken and named; their place may be given; a mean that was asked for
    is not given up."""
    with console.capture() as told:
        results = train.run(start_settings(related, tmp_path / "without", optim=STILL))
    assert results["init"]["init"] == "backbone" and results["init"]["warmed_up_heads"] == ["birds"]
    assert "birds: " in told.get() and "no such folder" in re.sub(r"\s+", " ", told.get())
    named = train.run(start_settings(related, tmp_path / "named", optim=STILL, models=(f"birds={moved}",)))
    assert named["init"]["init"] == "average" and len(named["init"]["shares"]) == 2
    with pytest.raises(UserError, match="init: no weights of birds to average"):
        train.run(start_settings(related, tmp_path / "asked", init="average"))
    with pytest.raises(UserError, match="init: no weights of birds to average"):
        train.run(start_settings(related, tmp_path / "asked", init_weights={"birds": 0.5, "generalist": 0.5}))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"init_weights": {"birds": 0.5, "generalist": 0.4}}, "init_weights: the shares sum to 0.9"),
        ({"init_weights": {"birds": 0.5, "cars": 0.5}}, "init_weights: no weights of cars"),
        ({"init_weights": {"birds": 1.0}, "init": "backbone"}, "averages nothing"),
        ({"init": "average", "pretrained": False}, "pretrained is false"),
        ({"init": "average", "heads": ()}, "no weights of other to average .*another architecture"),
        ({"models": ("cars=x",)}, "models: 'cars=x' must be NAME=MODEL"),
        ({"models": ("birds",)}, "models: 'birds' must be NAME=MODEL"),
        ({"models": ("birds=nowhere/birds",)}, "nowhere/birds: no such folder"),
        ({"head_warmup_steps": -1}, "head_warmup_steps: -1"),
    ],
)
def test_mistakes_are_named(related: Path, tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        train.run(start_settings(related, tmp_path / "run", **changes))


def test_other_weights_than_the_labels_are_refused(related: Path, tmp_path: Path) -> None:
    other = save_teacher(tmp_path / "other-birds", 5, seed=9)
    with pytest.raises(UserError, match="is not the model that made the labels: weight_hash"):
        train.run(start_settings(related, tmp_path / "run", models=(f"birds={other}",)))


def test_a_teacher_is_found_relative_to_its_store(
    related: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the working folder holds another model of that name; only another one is refused."""
    shutil.copytree(related / "birds", tmp_path / "made" / "birds")
    metadata = teachers.load_teacher(TeacherConfig(name="birds", model=str(related / "birds")), "cpu").metadata
    metadata = dataclasses.replace(metadata, model="birds")
    backbone = create_model(str(related / "generalist"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    folder = tmp_path / "made" / "labels.zarr"
    assert list(find_teacher_weights([metadata], backbone, size=SIZE, models={}, folder=folder).members) == ["birds"]
    save_teacher(tmp_path / "here" / "birds", 5, seed=9)
    assert list(find_teacher_weights([metadata], backbone, size=SIZE, models={}, folder=folder).members) == ["birds"]
    with pytest.raises(UserError, match=r"weight_hash is .*; --models birds=MODEL names the right one"):
        find_teacher_weights([metadata], backbone, size=SIZE, models={}, folder=None)


def test_weights_that_are_no_numbers_are_refused(related: Path, tmp_path: Path) -> None:
    shutil.copytree(related / "birds", tmp_path / "broken")
    state = load_file(tmp_path / "broken" / "model.safetensors")
    state["bn1.running_mean"][0] = float("nan")
    save_file(state, tmp_path / "broken" / "model.safetensors", metadata={"format": "pt"})
    metadata = teachers.load_teacher(TeacherConfig(name="birds", model=str(related / "birds")), "cpu").metadata
    metadata = dataclasses.replace(metadata, model=str(tmp_path / "broken"))
    backbone = create_model(str(related / "generalist"))
    found = find_teacher_weights([metadata], backbone, size=SIZE, models={}, folder=None)
    assert not found.members and "bn1.running_mean has values that are not finite" in found.not_found["birds"]
    with pytest.raises(UserError, match=r"bn1.running_mean has values that are not finite"):
        find_teacher_weights([metadata], backbone, size=SIZE, models={"birds": metadata.model}, folder=None)


def test_three_models_are_walked_from_equal_shares(related: Path) -> None:
    """The score is the caller's: here one that is lowest at a known mix."""
    wanted = {"a": 0.6, "b": 0.4, "c": 0.0}

    def judged(shares: weight_search.Shares) -> Candidate:
        score = sum((shares[name] - wanted[name]) ** 2 for name in wanted)
        return Candidate(shares=shares, kl={}, score=score)

    tried = weight_search._greedy_search(list(wanted), judged)
    best = min(tried, key=lambda each: each.score)
    assert all(abs(best.shares[name] - share) < 0.11 for name, share in wanted.items())
    assert len(tried) <= 3 + weight_search.MAX_CANDIDATES
    assert {tuple(each.shares.values()) for each in tried} >= {(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)}
    assert all(sum(each.shares.values()) == pytest.approx(1) for each in tried)


def test_the_score_counts_each_head_over_its_worst() -> None:
    corners = [
        Candidate(shares={}, kl={"a": 4.0, "b": 0.1}),
        Candidate(shares={}, kl={"a": 0.0, "b": 2.0}),
    ]
    assert weight_search.balanced_score(Candidate(shares={}, kl={"a": 1.0, "b": 0.5}), corners) == pytest.approx(
        0.25 + 0.25
    )


def test_the_store_is_named_by_its_sections(related: Path) -> None:
    store = LabelStore.open(str(related / "labels.zarr"))
    assert [head.metadata.architecture for head in store.heads.values()] == ["test_efficientnet"] * 2 + ["test_resnet"]
