"""Push and pull against a stand-in of the hub's HTTP API on this machine (`hub_server`), through huggingface_hub."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from hub_server import TOKEN, Hub, running_hub
from store_builder import fill, snapshot, spec

import repcon
from repcon import cli
from repcon.labels.store import LabelStore
from repcon.models.factory import create_model
from repcon.models.identity import weight_hash
from repcon.models.preprocessing import preprocessing_of
from repcon.models.saved_model import save_model
from repcon.models.student import Student, load_student, save_student
from repcon.models.timm_import import timm
from repcon.runtime import extras
from repcon.runtime.errors import UserError
from repcon.sharing.address import parse_address
from repcon.sharing.bundle import ABOUT

SIZE = 32
SECRET = "print('code of a stranger')"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    import huggingface_hub

    with running_hub() as made:
        template = made.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", made.endpoint)
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield made


@pytest.fixture(scope="module")
def student_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a run, with other files beside the student."""
    torch.manual_seed(0)
    backbone = create_model("test_resnet", num_classes=0, pretrained=False)
    run = tmp_path_factory.mktemp("runs") / "run"
    teachers = [{"name": "birds", "licence": "CC-BY-4.0"}, {"name": "food", "licence": "CC-BY-4.0"}]
    inputs = preprocessing_of(backbone, SIZE)
    model = Student(backbone, {"birds": 5, "food": 7})
    save_student(model, run / "student", preprocessing=inputs, card={"name": "both", "teachers": teachers})
    (run / "student" / "helper.py").write_text(SECRET)
    (run / "metrics.jsonl").write_text("{}\n")
    return run


@pytest.fixture(scope="module")
def teacher_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(1)
    model = create_model("test_resnet", num_classes=3, pretrained=False)
    folder = tmp_path_factory.mktemp("teachers") / "birds"
    inputs = preprocessing_of(model, SIZE)
    save_model(model, folder, classes=["a", "b", "c"], preprocessing=inputs, extra={"licence": "CC0-1.0"})
    return folder


@pytest.fixture(scope="module")
def store_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stores") / "labels.zarr"
    fill(LabelStore.create(str(path), spec()))
    return path


def front(card: bytes) -> dict:
    """The YAML of a card's front matter."""
    _, matter, _ = card.decode().split("---\n", 2)
    return yaml.safe_load(matter)


def test_a_student_comes_back_as_it_was(
    hub: Hub, student_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    made = repcon.push(student_run, "hf://me/both")
    assert "next: repcon pull hf://me/both --out DIR" in capsys.readouterr().out
    names = {"README.md", ABOUT, "config.json", "model.safetensors", "heads.safetensors", "heads.json"}
    assert hub.files("me/both").keys() == names
    pulled = repcon.pull("hf://me/both", out=tmp_path / "deep" / "student")
    assert "next: repcon export" in capsys.readouterr().out
    assert (pulled["kind"], pulled["fingerprint"]) == ("student", made["fingerprint"])
    ours, theirs = load_student(student_run).state_dict(), load_student(tmp_path / "deep" / "student").state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["student"]
    assert {path.name for path in (tmp_path / "deep" / "student").iterdir()} == names


def test_cards_say_what_it_is(hub: Hub, student_run: Path, teacher_folder: Path, store_folder: Path) -> None:
    fingerprints = {
        "me/both": repcon.push(student_run, "hf://me/both")["fingerprint"],
        "me/birds": repcon.push(teacher_folder, "hf://me/birds")["fingerprint"],
    }
    card = hub.files("me/both")["README.md"]
    assert front(card) == {
        "license": "cc-by-4.0", "library_name": "timm", "tags": ["repcon", "image-feature-extraction"],
    }  # fmt: skip
    assert b"# both" in card and b"## Teachers" in card and fingerprints["me/both"].encode() in card
    card = hub.files("me/birds")["README.md"]
    assert front(card)["license"] == "cc0-1.0" and b"Classes: 3: a, b, c" in card
    assert fingerprints["me/birds"] == weight_hash(create_model(str(teacher_folder)))
    repcon.push(store_folder, "hf://datasets/me/labels")
    card = hub.files("me/labels", "dataset")["README.md"]
    assert front(card)["license"] == "apache-2.0" and front(card)["viewer"] is False
    store = LabelStore.open(str(store_folder))
    for fact in (
        store.fingerprint,
        "top 5 classes, values as float16",
        "Crops per image: 4",
        "Images: 100",
        "| wide |",
    ):
        assert fact in card.decode()


def test_timm_opens_what_was_pushed(hub: Hub, teacher_folder: Path, student_run: Path) -> None:
    """As the card says, from the hub itself."""
    repcon.push(teacher_folder, "hf://me/birds")
    repcon.push(student_run, "hf://me/both")
    assert b'timm.create_model("hf-hub:me/birds", pretrained=True)' in hub.files("me/birds")["README.md"]
    opened = timm.create_model("hf-hub:me/birds", pretrained=True)
    assert weight_hash(opened) == weight_hash(create_model(str(teacher_folder)))
    backbone = timm.create_model("hf-hub:me/both", pretrained=True)
    assert weight_hash(backbone) == weight_hash(load_student(student_run).backbone)


def test_a_store_comes_back_as_it_was(hub: Hub, store_folder: Path, tmp_path: Path) -> None:
    repcon.push(store_folder, "hf://datasets/me/labels/v1", private=True)
    assert hub.repos["dataset", "me/labels"]["private"]
    pulled = repcon.pull("hf://datasets/me/labels/v1", out=tmp_path / "labels.zarr")
    assert pulled["kind"] == "store"
    held = snapshot(tmp_path / "labels.zarr")
    assert held.pop("README.md") and held.pop(ABOUT)
    assert held == snapshot(store_folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["labels.zarr"]


def test_pushed_again_the_old_files_are_gone(hub: Hub, store_folder: Path, tmp_path: Path) -> None:
    fill(LabelStore.create(str(tmp_path / "larger"), spec(images=200)))
    repcon.push(tmp_path / "larger", "hf://datasets/me/labels")
    hub.files("me/labels", "dataset")["notes.txt"] = b"of somebody"
    repcon.push(store_folder, "hf://datasets/me/labels")
    held = hub.files("me/labels", "dataset")
    assert held.pop("notes.txt") and held.pop("README.md") and held.pop(ABOUT)
    assert held == snapshot(store_folder)


def test_a_branch_is_pushed_and_pulled(hub: Hub, teacher_folder: Path, student_run: Path, tmp_path: Path) -> None:
    repcon.push(teacher_folder, "hf://me/mine")
    repcon.push(student_run, "hf://me/mine", revision="next")
    assert repcon.pull("hf://me/mine", out=tmp_path / "main")["kind"] == "teacher"
    assert repcon.pull("hf://me/mine", out=tmp_path / "next", revision="next")["kind"] == "student"


def _flip(files: dict[str, bytes], name: str) -> None:
    data = bytearray(files[name])
    data[-1] ^= 1
    files[name] = bytes(data)


@pytest.mark.parametrize("name", ["model.safetensors", "heads.safetensors"])
def test_other_weights_than_were_pushed_leave_nothing(hub: Hub, student_run: Path, tmp_path: Path, name: str) -> None:
    repcon.push(student_run, "hf://me/both")
    _flip(hub.files("me/both"), name)
    with pytest.raises(UserError, match=r"hf://me/both: its fingerprint is .*; nothing was kept"):
        repcon.pull("hf://me/both", out=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("change", ["shard", "marker", "manifest", "missing"])
def test_a_damaged_store_leaves_nothing(hub: Hub, store_folder: Path, tmp_path: Path, change: str) -> None:
    repcon.push(store_folder, "hf://datasets/me/labels")
    files = hub.files("me/labels", "dataset")
    shard = next(name for name in files if name.startswith("heads/") and "/c/" in name)
    marker = next(name for name in files if name.startswith("done/"))
    if change == "missing":
        del files[marker]
    else:
        _flip(files, {"shard": shard, "marker": marker, "manifest": "manifest.json"}[change])
    with pytest.raises(UserError, match="nothing was kept"):
        repcon.pull("hf://datasets/me/labels", out=tmp_path / "labels.zarr")
    assert list(tmp_path.iterdir()) == []


def test_nothing_that_could_run_is_downloaded(hub: Hub, teacher_folder: Path, tmp_path: Path) -> None:
    repcon.push(teacher_folder, "hf://me/birds")
    files = hub.files("me/birds")
    for name in ("model.py", "__init__.py", "pytorch_model.bin", "conftest.py", "done/x.py", "../escape.json"):
        files[name] = SECRET.encode()
    repcon.pull("hf://me/birds", out=tmp_path / "birds")
    held = {path.name for path in (tmp_path / "birds").rglob("*")}
    assert held == {"README.md", ABOUT, "config.json", "model.safetensors"}
    assert not any(name.endswith((".py", ".bin")) or ".." in name for name, _ in hub.downloads)


def test_a_store_with_a_name_that_leaves_its_folder_is_refused(hub: Hub, store_folder: Path, tmp_path: Path) -> None:
    repcon.push(store_folder, "hf://datasets/me/labels")
    hub.files("me/labels", "dataset")["heads/../../escape.json"] = b"{}"
    with pytest.raises(UserError, match=r"a file of the unusual name 'heads/\.\./\.\./escape\.json'"):
        repcon.pull("hf://datasets/me/labels", out=tmp_path / "a" / "labels.zarr")
    assert not list(tmp_path.rglob("escape.json")) and not (tmp_path / "a" / "labels.zarr").exists()


def test_a_connection_that_breaks_off_is_taken_up_where_it_broke(
    hub: Hub, teacher_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1000)
    repcon.push(teacher_folder, "hf://me/birds")
    hub.cut.add("model.safetensors")
    repcon.pull("hf://me/birds", out=tmp_path / "birds")
    half = len(hub.files("me/birds")["model.safetensors"]) // 2 // 1000 * 1000
    assert [asked for name, asked in hub.downloads if name == "model.safetensors"] == ["", f"bytes={half}-"]


def test_an_interrupted_pull_goes_on_with_the_files_that_it_has(hub: Hub, teacher_folder: Path, tmp_path: Path) -> None:
    repcon.push(teacher_folder, "hf://me/birds")
    hub.broken.add("model.safetensors")
    with pytest.raises(UserError, match="the same command goes on where it stopped"):
        repcon.pull("hf://me/birds", out=tmp_path / "birds")
    assert not (tmp_path / "birds").exists()
    (tmp_path / ".birds.0123456789ab.pulling").mkdir()  # of another commit
    hub.broken.clear()
    hub.downloads.clear()
    repcon.pull("hf://me/birds", out=tmp_path / "birds")
    assert "model.safetensors" in dict(hub.downloads) and ABOUT not in dict(hub.downloads)
    assert [path.name for path in tmp_path.iterdir()] == ["birds"]


@pytest.mark.parametrize(
    "text", ["me/birds", "hf://birds", "hf://me/", "hf://me/a b", "hf://me/birds/../x", "https://me/birds", "hf:///a/b"]
)
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="not an address of the hub; write hf://OWNER/NAME"):
        parse_address(text)


def test_what_cannot_be_done_is_one_line(
    hub: Hub, student_run: Path, store_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(says: str, call, *arguments: object, **options: object) -> None:
        with pytest.raises(UserError, match=says) as caught:
            call(*arguments, **options)
        assert "\n" not in str(caught.value)

    out = tmp_path / "out"
    refused("no such repository", repcon.pull, "hf://me/nothing", out=out)
    repcon.push(student_run, "hf://me/both")
    refused("no such revision", repcon.pull, "hf://me/both", out=out, revision="other")
    refused("nothing of that path", repcon.pull, "hf://me/both/deeper", out=out)
    refused("write hf://datasets/me/labels", repcon.push, store_folder, "hf://me/labels")
    refused("write hf://me/both", repcon.push, student_run, "hf://datasets/me/both")
    refused("repository is public", repcon.push, student_run, "hf://me/both", private=True)
    refused("holds no label store, student or teacher", repcon.push, tmp_path, "hf://me/both")
    hub.create("me/other")
    hub.files("me/other")["config.json"] = b"{}"
    refused("did not put it there", repcon.pull, "hf://me/other", out=out)
    assert not out.exists()
    out.mkdir()
    refused("is there already", repcon.pull, "hf://me/both", out=out)
    monkeypatch.setenv("HF_TOKEN", "hf_of_another")
    refused("make one with write access", repcon.push, student_run, "hf://me/mine")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    refused("no token of the hub; set HF_TOKEN", repcon.push, student_run, "hf://me/both")
    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    refused(r"pip install 'repcon\[hub\]'", repcon.push, student_run, "hf://me/both")


def test_an_unfinished_store_is_not_pushed(hub: Hub, tmp_path: Path) -> None:
    LabelStore.create(str(tmp_path / "labels.zarr"), spec())
    with pytest.raises(UserError, match="units were never finished"):
        repcon.push(tmp_path / "labels.zarr", "hf://datasets/me/labels")
    assert hub.repos == {}


def test_the_command_line_asks_the_endpoint_of_the_environment(hub: Hub, teacher_folder: Path, tmp_path: Path) -> None:
    """In processes of their own, where huggingface_hub reads HF_ENDPOINT."""
    names = {
        "HF_ENDPOINT": hub.endpoint,
        "HF_TOKEN": TOKEN,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_XET": "1",
    }
    for words in (["push", str(teacher_folder), "hf://me/birds"], ["pull", "hf://me/birds", "--out", "birds"]):
        command = [sys.executable, "-m", "repcon", *words, "--json", "figures.json"]
        done = subprocess.run(command, cwd=tmp_path, env=os.environ | names, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert len(done.stdout.strip().splitlines()) == 1 and "%" not in done.stderr
    assert json.loads((tmp_path / "figures.json").read_text())["kind"] == "teacher"
    assert cli.main(["export", str(tmp_path / "birds"), "--to", "torch"]) == 1  # a teacher is no student
