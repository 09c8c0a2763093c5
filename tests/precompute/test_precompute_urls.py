"""The whole command with pack, store and claims in a bucket: the same bytes as on a disk, and no local copy."""

import json
import os
import uuid
from dataclasses import replace
from pathlib import Path

import object_servers
import pytest
from precompute_case import contents, pack_path, recipe, teacher_folders, with_teachers

from repcon import cli, config
from repcon.commands import precompute
from repcon.images.pack import ImagePack
from repcon.labels.store import LabelStore
from repcon.precompute.output_store import lease_folder

pytest.importorskip("moto.server")
FIXTURES = Path(__file__).parents[1] / "fixtures"
__all__ = ["pack_path", "recipe", "teacher_folders"]


@pytest.fixture(scope="module")
def server():
    with object_servers.s3_server():
        yield


@pytest.fixture
def bucket(server, tmp_path, monkeypatch):
    """A bucket of the test's own; what the command records of a run on a bucket goes to the working folder."""
    name = f"bucket-{uuid.uuid4().hex}"
    object_servers.s3_client().create_bucket(Bucket=name)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return f"s3://{name}"


@pytest.fixture
def there(bucket, recipe, pack_path):
    """The recipe with its pack and store in the bucket."""
    object_servers.upload(pack_path, f"{bucket}/pack")
    return replace(recipe, pack=f"{bucket}/pack", out=f"{bucket}/runs/labels.zarr", loader="torch")


def command(settings, *words):
    """`repcon precompute` on these settings; gives the exit code."""
    Path("recipe.toml").write_text(config.dump(settings))
    return cli.main(["precompute", "--recipe", "recipe.toml", "--json", "figures.json", *words])


def downloaded(url: str) -> dict[str, str]:
    object_servers.download(url, "copy")
    return contents("copy")


def test_pack_and_store_in_a_bucket_give_the_bytes_of_a_disk(there, recipe, pack_path, capsys):
    assert command(there) == 0
    figures = json.loads(Path("figures.json").read_text())
    assert figures["crops"] == figures["total_crops"] == 8 * 32 and figures["written_bytes"] > 0
    assert "labels of 256 crops: s3://" in capsys.readouterr().out
    precompute.run(replace(recipe, loader="torch"))
    assert downloaded(there.out) == contents(recipe.out)
    assert not object_servers.objects_below(lease_folder(there.out))  # No claim is left behind.
    kept = sorted(path.name for path in Path("labels.zarr.run").iterdir())
    assert kept == ["command", "config.toml", "env.json", "metrics.jsonl", "results.json"]
    assert not list(Path.cwd().rglob("*.tar"))


def test_several_processes_share_a_bucket_and_a_further_run_extends_it(there, recipe, teacher_folders, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(FIXTURES), os.environ.get("PYTHONPATH", "")]))
    assert command(there, "--processes", "2") == 0
    assert command(there) == 0 and json.loads(Path("figures.json").read_text())["crops"] == 0
    assert command(with_teachers(there, teacher_folders, "nine")) == 0
    local = with_teachers(replace(recipe, loader="torch"), teacher_folders, "nine")
    precompute.run(replace(recipe, loader="torch"))
    precompute.run(local)
    assert downloaded(there.out) == contents(recipe.out)


def test_the_store_in_the_bucket_is_read_from_there(there, pack_path):
    assert command(there) == 0
    store, pack = LabelStore.open(there.out), ImagePack.open(there.pack)
    assert store.completion.unfinished() == [] and len(pack) == 32
    assert store.manifest.pack_fingerprint == pack.fingerprint == ImagePack.open(pack_path).fingerprint


def test_a_pack_that_is_not_there_is_one_clear_line(there, capsys):
    assert command(replace(there, pack=f"{there.pack}-gone")) == 1
    assert "no finished pack there" in capsys.readouterr().err.replace("\n", " ")


def test_a_misspelt_bucket_is_named_and_not_made(there, capsys):
    other = f"s3://other-{uuid.uuid4().hex}"
    assert command(replace(there, out=f"{other}/labels.zarr")) == 1
    said = capsys.readouterr().err.replace("\n", " ")
    assert other in said and "there is no such bucket" in said
    held = [bucket["Name"] for bucket in object_servers.s3_client().list_buckets()["Buckets"]]
    assert other.removeprefix("s3://") not in held


def test_no_network_is_one_line(there, capsys, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    assert command(there) == 1
    said = capsys.readouterr().err
    assert "Traceback" not in said and "error sending request" in said and "http://127.0.0.1:9" in said
