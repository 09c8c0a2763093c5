"""Packs as their readers see them: bytes, identity, faults, classes, URLs, workers, and the command itself."""

import hashlib
import json
import multiprocessing
import os
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from object_servers import upload
from pictures import photograph

from repcon import cli
from repcon.commands import pack as packing
from repcon.config import ClassSubset, PackConfig
from repcon.images import format as pack_format
from repcon.images.jpeg import content_hash
from repcon.images.pack import ImagePack, select_classes
from repcon.images.packing import open_or_pack
from repcon.runtime.errors import UserError
from repcon.runtime.filesystem import open_filesystem


@pytest.fixture(scope="module")
def original(picture_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packs") / "original"
    packing.run(PackConfig(source=str(picture_folder), out=str(out), num_workers=2))
    return out


@pytest.fixture
def copy(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "copy"))


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 0x10
    path.write_bytes(data)


def test_what_a_pack_tells_of_itself(original: Path, picture_folder: Path) -> None:
    pack = ImagePack.open(original)
    assert len(pack) == len(pack.keys) == 32 and pack.keys[0] == "apple/00"
    assert pack.sizes.shape == (32, 2) and pack.sizes.dtype == np.int32
    assert pack.hashes.shape == (32, 16) and pack.labels.dtype == np.int32
    assert pack.labels.tolist() == [number // 8 for number in range(32)]
    for image, key in enumerate(pack.keys):
        data = pack.read(image)
        assert data == (picture_folder / f"{key}.jpg").read_bytes() and len(data) == pack.lengths[image]
        assert content_hash(data) == pack.hashes[image].tobytes()
        assert simplejpeg.decode_jpeg(data).shape[1::-1] == tuple(pack.sizes[image])


def test_the_fingerprint_is_that_of_contents_and_order(original: Path, picture_folder: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(picture_folder, tmp_path / "source"))
    (source / "apple").rename(source / "another name")
    renamed = open_or_pack(str(source), tmp_path / "cache")
    assert renamed.fingerprint == ImagePack.open(original).fingerprint
    (source / "cedar/03.jpg").unlink()
    assert open_or_pack(str(source), tmp_path / "cache").fingerprint != renamed.fingerprint


def test_a_source_is_packed_once_and_a_pack_is_opened(original: Path, picture_folder: Path, tmp_path: Path) -> None:
    first = open_or_pack(str(picture_folder), tmp_path)
    shard = next(tmp_path.glob("pack-*/shard-*.tar"))
    written = shard.stat().st_mtime_ns
    assert open_or_pack(str(picture_folder), tmp_path).fingerprint == first.fingerprint
    assert shard.stat().st_mtime_ns == written and len(list(tmp_path.iterdir())) == 1
    assert open_or_pack(str(original), tmp_path / "unused").fingerprint == first.fingerprint
    assert not (tmp_path / "unused").exists()


def test_changed_bytes_are_found_at_the_first_read(copy: Path) -> None:
    pack = ImagePack.open(copy)
    place = int(pack._offset[3]) + int(pack.lengths[3]) // 2
    flip(copy / "shard-00000.tar", place)
    with pytest.raises(UserError, match=r"copy: image apple/03 in shard-00000.tar has changed .*; restore"):
        pack.read(3)
    with pytest.raises(UserError, match="has changed"):
        pack.read(3)
    assert pack.read(2) and ImagePack.open(copy, check=False).read(3)


def test_every_flipped_byte_of_index_and_manifest_is_found(copy: Path) -> None:
    """Nothing opens that differs in what is read: identity, labels, sizes, offsets."""
    wanted = ImagePack.open(copy)
    for name in ("index.npz", "pack.json"):
        whole = (copy / name).read_bytes()
        for place in range(0, len(whole), 41):
            flip(copy / name, place)
            try:
                pack = ImagePack.open(copy)
            except UserError:
                pass
            else:  # a byte of the settings or of a class's name, which nothing depends on
                assert name == "pack.json" and pack.fingerprint == wanted.fingerprint
                assert (pack.labels == wanted.labels).all() and len(pack.classes) == len(wanted.classes)
            (copy / name).write_bytes(whole)


def test_truncated_and_missing_shards_are_named(copy: Path) -> None:
    pack = ImagePack.open(copy)
    shard = copy / "shard-00000.tar"
    whole = shard.read_bytes()
    shard.write_bytes(whole[: int(pack._offset[20]) + 10])
    assert pack.read(19)
    with pytest.raises(UserError, match=rf"image {pack.keys[20]} in shard-00000.tar is cut off: 10 of \d+ bytes"):
        pack.read(20)
    with pytest.raises(UserError, match="is cut off: 0 of"):
        pack.read(21)
    shard.unlink()
    with pytest.raises(UserError, match=r"cannot be read \(No such file"):
        ImagePack.open(copy).read(0)


def test_an_index_that_lies_about_a_header_is_found(copy: Path) -> None:
    """A stranger's pack: its hashes are right, but the JPEG claims 65,500 x 65,500 pixels."""
    manifest = json.loads((copy / "pack.json").read_text())
    columns = dict(pack_format.load_index((copy / "index.npz").read_bytes(), "copy"))
    start, length = int(columns["offset"][0]), int(columns["length"][0])
    shard = bytearray((copy / "shard-00000.tar").read_bytes())
    frame = shard.index(b"\xff\xc0", start)
    shard[frame + 5 : frame + 9] = b"\xff\xdc\xff\xdc"
    (copy / "shard-00000.tar").write_bytes(shard)
    hashes = columns["hash"].copy()
    hashes[0] = np.frombuffer(content_hash(bytes(shard[start : start + length])), np.uint8)
    columns["hash"] = hashes
    index = pack_format.dump_index(columns)
    (copy / "index.npz").write_bytes(index)
    manifest["index_sha256"] = hashlib.sha256(index).hexdigest()
    manifest["fingerprint"] = pack_format.fingerprint(hashes, columns["size"])
    (copy / "pack.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="is 65500 x 65500 pixels, not as the index says"):
        ImagePack.open(copy).read(0)


def test_a_manifest_of_a_terabyte_is_not_read(copy: Path) -> None:
    os.truncate(copy / "pack.json", 2**40)
    with pytest.raises(UserError, match="too many for a manifest"):
        ImagePack.open(copy)


def test_no_pack_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no finished pack there .*; make one with `repcon pack`"):
        ImagePack.open(tmp_path)
    with pytest.raises(UserError, match="no finished pack there"):
        ImagePack.open("memory://nothing/here")


@pytest.mark.parametrize("scheme", ["memory", "file"])
def test_packs_open_by_url(scheme: str, original: Path, tmp_path: Path) -> None:
    url = "memory://bucket/a pack" if scheme == "memory" else f"file://{original}"
    if scheme == "memory":
        upload(original, url)
    pack, local = ImagePack.open(url), ImagePack.open(original)
    assert pack.fingerprint == local.fingerprint and list(pack.keys) == list(local.keys)
    assert [pack.read(image) for image in range(32)] == [local.read(image) for image in range(32)]
    assert open_or_pack(url, tmp_path).fingerprint == local.fingerprint
    if scheme == "memory":
        files = open_filesystem(url)
        whole = files.read("shard-00000.tar")
        files.write("shard-00000.tar", whole[: int(pack._offset[5]) + 3])
        with pytest.raises(UserError, match="is cut off: 3 of"):
            pack.read(5)
        files.delete("shard-00000.tar")
        with pytest.raises(UserError, match="cannot be read"):
            pack.read(0)
        assert pickle.loads(pickle.dumps(pack)).fingerprint == pack.fingerprint


def read_in_worker(pack: ImagePack, image: int) -> bytes:
    return pack.read(image)


def test_workers_reopen_the_pack(original: Path, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(original.parent)
    pack = ImagePack.open(original.name, check=False)
    monkeypatch.chdir(copy)
    again = pickle.loads(pickle.dumps(pack))
    assert not again.check and again.read(1) == pack.read(1)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(read_in_worker, (pack, 5)) == pack.read(5)


def test_a_replaced_pack_is_not_reopened_for_the_old_one(copy: Path, picture_folder: Path) -> None:
    pickled = pickle.dumps(ImagePack.open(copy))
    source = Path(shutil.copytree(picture_folder, copy.parent / "source"))
    (source / "apple/00.jpg").unlink()
    shutil.rmtree(copy)
    packing.run(PackConfig(source=str(source), out=str(copy)))
    with pytest.raises(UserError, match="was replaced"):
        pickle.loads(pickled)


def test_threads_share_a_pack(original: Path) -> None:
    pack = ImagePack.open(original)
    wanted = [ImagePack.open(original).read(image) for image in range(32)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(pack.read, list(range(32)) * 20)) == wanted * 20


def test_more_shards_than_stay_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("repcon.runtime.local_files.MAX_OPEN_FILES", 1)
    (tmp_path / "source").mkdir()
    generator = np.random.default_rng(0)
    for number in range(4):
        pixels = generator.integers(0, 256, (480, 640, 3), dtype=np.uint8)
        data = simplejpeg.encode_jpeg(pixels, quality=98, colorsubsampling="444")
        (tmp_path / f"source/{number}.jpg").write_bytes(data)
    figures = packing.run(PackConfig(source=str(tmp_path / "source"), out=str(tmp_path / "pack"), shard_megabytes=1))
    assert figures["shards"] >= 2 and figures["classes"] == 0
    pack = ImagePack.open(tmp_path / "pack")
    for image in (3, 0, 3, 1, 2, 0):
        assert pack.read(image) == (tmp_path / f"source/{image}.jpg").read_bytes()


def test_class_halves_are_seeded_disjoint_and_whole(original: Path) -> None:
    pack = ImagePack.open(original)
    first, labels, names = select_classes(pack, ClassSubset(seed=5, stop=0.5))
    second, _, others = select_classes(pack, ClassSubset(seed=5, start=0.5))
    assert set(names) | set(others) == set(pack.classes) and len(names) == len(others) == 2
    assert sorted([*first, *second]) == list(range(32))
    assert [names[label] for label in labels] == [pack.classes[pack.labels[row]] for row in first]
    assert set(labels) == {0, 1} and (np.diff(first) > 0).all()
    assert select_classes(pack, ClassSubset())[2] == pack.classes
    halves = {select_classes(pack, ClassSubset(seed=seed, stop=0.5))[2] for seed in range(20)}
    assert len(halves) > 3
    assert select_classes(pack, ClassSubset(seed=0, stop=0.5))[2] == ("apple", "birch")


def test_class_subsets_that_cannot_be(original: Path, tmp_path: Path) -> None:
    pack = ImagePack.open(original)
    with pytest.raises(UserError, match="1 of its 4 classes chosen; at least two"):
        select_classes(pack, ClassSubset(stop=0.25))
    with pytest.raises(UserError, match="must rise"):
        select_classes(pack, ClassSubset(start=0.5, stop=0.5))
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat/1.jpg").write_bytes(simplejpeg.encode_jpeg(photograph(0, 20, 20)))
    with pytest.raises(UserError, match="have no labels"):
        select_classes(open_or_pack(str(tmp_path / "flat"), tmp_path), ClassSubset())


def test_classes_are_chosen_by_name_or_number(picture_folder: Path, tmp_path: Path) -> None:
    pack = open_or_pack(str(picture_folder), tmp_path)
    rows, labels, names = select_classes(pack, ClassSubset(names=("cedar", "0")))
    assert names == ("apple", "cedar") and set(labels.tolist()) == {0, 1}
    assert [pack.classes[label] for label in pack.labels[rows]] == [names[label] for label in labels]
    for subset, words in (
        (ClassSubset(names=("apple", "elm", "9")), r"classes: elm, 9: no class of .* it has apple, birch, cedar"),
        (ClassSubset(names=("apple", "0", "birch")), "apple is named twice"),
        (ClassSubset(names=("apple",)), "at least two are needed"),
        (ClassSubset(names=("apple", "birch"), start=0.5), "named together with start or stop"),
    ):
        with pytest.raises(UserError, match=words):
            select_classes(pack, subset)


def test_a_class_that_is_called_by_a_number_is_meant_by_its_name(picture_folder: Path, tmp_path: Path) -> None:
    for name, source in (("5", "apple"), ("1", "birch"), ("0", "cedar")):
        shutil.copytree(picture_folder / source, tmp_path / "digits" / name)
    pack = open_or_pack(str(tmp_path / "digits"), tmp_path)
    assert select_classes(pack, ClassSubset(names=("1", "5")))[2] == ("1", "5")


def test_the_command(picture_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = Path(shutil.copytree(picture_folder, tmp_path / "source"))
    (source / "apple/notes.txt").write_text("hello")
    shutil.copy(source / "apple/00.jpg", source / "birch/99.jpg")
    words = ["pack", str(source), str(tmp_path / "out"), "--json", str(tmp_path / "figures.json")]
    assert cli.main([*words, "--max-side", "90"]) == 0
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["images"] == 32 and figures["classes"] == 4 and figures["shards"] == 1
    assert figures["left_out"] == {"duplicate with another label": 1, "not an image's file name (.txt)": 1}
    assert figures["kept"] + sum(figures["re_encoded"].values()) == 32 and figures["re_encoded"]
    printed = capsys.readouterr().out
    assert "larger than max_side" in printed and "left_out.jsonl" in printed
    assert {"config.toml", "env.json", "metrics.jsonl", "results.json"} <= {
        p.name for p in (tmp_path / "out").iterdir()
    }
    assert cli.main(words) == 1
    assert "max_side = 90, not 1024" in capsys.readouterr().err
    assert "max_side = 90" in (tmp_path / "out/config.toml").read_text()
    assert cli.main(["pack", str(tmp_path / "nothing"), str(tmp_path / "other")]) == 1
    assert not (tmp_path / "other").exists()


def test_a_beton_is_made_of_the_same_pack(picture_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("ffcv", reason="FFCV is not installed", exc_type=ImportError)
    out = tmp_path / "out"
    plain = packing.run(PackConfig(source=str(picture_folder), out=str(out)))
    assert not (out / "images.beton").exists()
    again = packing.run(PackConfig(source=str(picture_folder), out=str(out), ffcv=True))
    assert again["fingerprint"] == plain["fingerprint"]
    beton = (out / "images.beton").read_bytes()
    assert all(ImagePack.open(out).read(image) in beton for image in range(32))
    assert not list(out.glob(".*"))
