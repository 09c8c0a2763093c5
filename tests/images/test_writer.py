"""Writing packs: the shards' format, resuming after a kill, duplicates, other settings, a full disk."""

import errno
import json
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from pictures import photograph
from PIL import Image
from simplejpeg import encode_jpeg

from repcon.commands import pack as packing
from repcon.config import PackConfig
from repcon.images import sources, writer
from repcon.images.format import Manifest
from repcon.images.pack import ImagePack
from repcon.images.packing import open_or_pack
from repcon.runtime.errors import UserError

RESULTS = ("index.npz", "left_out.jsonl", "pack.json")


def pack(source: Path, out: Path, **settings: int) -> Manifest:
    return writer.write(writer.plan(PackConfig(source=str(source), out=str(out), **settings)))


def read_item(out: Path) -> dict[str, bytes]:
    assert not (out / "parts").exists() and not list(out.glob(".*"))
    return {path.name: path.read_bytes() for path in sorted(out.iterdir())}


@pytest.fixture(scope="module")
def noisy_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 6 MB in 60 files, so several shards of the smallest size; some duplicates, text and damage."""
    root = tmp_path_factory.mktemp("noisy")
    generator = np.random.default_rng(0)
    for number in range(60):
        folder = root / f"class {number % 3}"
        folder.mkdir(exist_ok=True)
        pixels = generator.integers(0, 256, (190, 250, 3), dtype=np.uint8)
        data = encode_jpeg(pixels, quality=95, colorsubsampling="444")
        (folder / f"{number:02d}.jpg").write_bytes(data if number % 10 else data[: len(data) // 2])
    for number in (7, 40):
        shutil.copy(root / "class 1/31.jpg", root / f"class 2/copy {number}.jpg")
    (root / "class 2/zz.jpg").write_bytes((root / "class 2/59.jpg").read_bytes())
    (root / "notes.txt").write_text("hello")
    return root


@pytest.fixture(scope="module")
def unbroken(noisy_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("unbroken") / "pack"
    pack(noisy_folder, out, shard_megabytes=1)
    return read_item(out)


def test_shards_are_webdataset_tars(picture_folder: Path, tmp_path: Path) -> None:
    pack(picture_folder, tmp_path / "pack")
    opened = ImagePack.open(tmp_path / "pack")
    with tarfile.open(tmp_path / "pack/shard-00000.tar") as tar:
        members = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
    names = list(members)
    assert len(names) == 2 * len(opened)
    for image, key in enumerate(opened.keys):
        assert names[2 * image : 2 * image + 2] == [f"{key}.jpg", f"{key}.cls"]
        assert members[f"{key}.jpg"] == opened.read(image) == (picture_folder / f"{key}.jpg").read_bytes()
        assert members[f"{key}.cls"] == b"%d" % opened.labels[image]
    assert opened.classes == ("apple", "birch", "cedar", "daisy")


def test_a_pack_of_tars_equals_that_of_their_folder(picture_folder: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for path in sorted(picture_folder.rglob("*.jpg")):
            tar.add(path, path.relative_to(picture_folder).as_posix())
    pack(picture_folder, tmp_path / "of folder")
    pack(tmp_path / "a.tar", tmp_path / "of tar")
    pack(tmp_path / "of folder/shard-00000.tar", tmp_path / "of pack")
    first = read_item(tmp_path / "of folder")
    assert first["shard-00000.tar"] == read_item(tmp_path / "of tar")["shard-00000.tar"]
    assert first["shard-00000.tar"] == read_item(tmp_path / "of pack")["shard-00000.tar"]


@pytest.mark.parametrize("num_workers", [1, 3, 16])
def test_the_bytes_do_not_depend_on_workers(
    num_workers: int, noisy_folder: Path, unbroken: dict[str, bytes], tmp_path: Path
) -> None:
    pack(noisy_folder, tmp_path / "pack", shard_megabytes=1, num_workers=num_workers)
    assert read_item(tmp_path / "pack") == unbroken
    assert sum(name.startswith("shard-") for name in unbroken) >= 4


def test_left_out_and_duplicates_are_listed(unbroken: dict[str, bytes]) -> None:
    entries = [json.loads(line) for line in unbroken["left_out.jsonl"].splitlines()]
    reasons = {entry["name"]: entry["reason"] for entry in entries}
    assert reasons.pop("notes.txt") == "not an image's file name (.txt)"
    assert reasons.pop("class 2/zz.jpg") == "duplicate: of class 2/59"
    assert reasons.pop("class 2/copy 7.jpg") == "duplicate with another label: of class 1/31"
    assert reasons.pop("class 2/copy 40.jpg") == "duplicate with another label: of class 1/31"
    assert len(reasons) == 6 and all(reason.startswith("truncated: ") for reason in reasons.values())
    summary = json.loads(unbroken["pack.json"])["summary"]
    assert summary == {
        "re_encoded": {},
        "left_out": {
            "duplicate": 1,
            "duplicate with another label": 2,
            "not an image's file name (.txt)": 1,
            "truncated": 6,
        },
    }


def test_killed_packs_go_on_and_end_the_same(noisy_folder: Path, unbroken: dict[str, bytes], tmp_path: Path) -> None:
    """Killed as each shard's record appears, then somewhere within the next shard."""
    out = tmp_path / "pack"
    config = PackConfig(source=str(noisy_folder), out=str(out), shard_megabytes=1, num_workers=1)
    # Slow enough that a shard is never finished between the record of the last one and the kill.
    program = f"""
import time
from repcon.config import PackConfig
from repcon.images.packing import open_or_pack
from repcon.images import writer
add = writer._add
def slowly(*arguments):
    time.sleep(0.005)
    add(*arguments)
writer._add = slowly
writer.write(writer.plan({config!r}))
"""
    killed, generator = 0, np.random.default_rng(0)
    for number in range(4):
        process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            if (out / f"parts/{number:05d}.json").is_file():
                time.sleep(generator.uniform(0, 0.02))
                process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
    assert killed >= 3
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("shard-*.tar")}
    finished = len(list((out / "parts").glob("*.json"))) - 1
    pack(noisy_folder, out, shard_megabytes=1)
    assert read_item(out) == unbroken
    after = {path.name: path.stat().st_mtime_ns for path in out.glob("shard-*.tar")}
    kept = [name for name in sorted(before) if after[name] == before[name]]
    assert len(kept) >= finished >= 3


def test_a_shard_lost_while_unfinished_is_made_again(
    noisy_folder: Path, unbroken: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "pack"
    started = writer.plan(PackConfig(source=str(noisy_folder), out=str(out), shard_megabytes=1))
    (out / "parts").mkdir(parents=True)
    parts, _ = writer._shards(started)
    (out / "shard-00001.tar").write_bytes(b"torn")
    assert len(writer._finished_shards(out)) == 1 < len(parts)
    writer.write(started)
    assert read_item(out) == unbroken


def test_a_finished_pack_is_left_as_it_is(noisy_folder: Path, unbroken: dict[str, bytes], tmp_path: Path) -> None:
    pack(noisy_folder, tmp_path / "pack", shard_megabytes=1)
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "pack").iterdir()}
    pack(noisy_folder, tmp_path / "pack", shard_megabytes=1)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "pack").iterdir()} == times


def test_a_finished_pack_that_is_asked_for_again_keeps_its_record(picture_folder: Path, tmp_path: Path) -> None:
    recipe = PackConfig(source=str(picture_folder), out=str(tmp_path / "pack"))
    figures = packing.run(recipe)
    env = (tmp_path / "pack" / "env.json").read_bytes()
    assert packing.run(recipe) == figures and (tmp_path / "pack" / "env.json").read_bytes() == env


def test_two_packers_wait_for_one_another(noisy_folder: Path, unbroken: dict[str, bytes], tmp_path: Path) -> None:
    """Threads here, processes in life: the lock is on an open file, so it holds between both."""
    started = writer.plan(PackConfig(source=str(noisy_folder), out=str(tmp_path / "pack"), shard_megabytes=1))
    threads = [threading.Thread(target=writer.write, args=(started,)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert read_item(tmp_path / "pack") == unbroken


@pytest.mark.parametrize("finished", [True, False])
def test_other_settings_or_sources_are_refused_by_name(finished: bool, picture_folder: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "pack"
    shutil.copytree(picture_folder, source)
    started = writer.plan(PackConfig(source=str(source), out=str(out)))
    if finished:
        writer.write(started)
    else:
        (out / "parts").mkdir(parents=True)
        (out / "parts/settings.json").write_text(json.dumps(started.settings))
    with pytest.raises(UserError, match="max_side = 1024, not 64"):
        pack(source, out, max_side=64)
    with pytest.raises(UserError, match="jpeg_quality = 95, not 80"):
        pack(source, out, jpeg_quality=80)
    (source / "apple/00.jpg").unlink()
    with pytest.raises(UserError, match="made of other files"):
        pack(source, out)


def test_a_full_disk_is_one_message_and_can_be_mended(
    noisy_folder: Path, unbroken: dict[str, bytes], tmp_path: Path
) -> None:
    """A limit on the size of files stands in for the disk's: the write fails with the system's own error."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    former = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (700_000, limits[1]))
    try:
        with pytest.raises(UserError, match=r"cannot write the pack .* goes on after the last finished shard"):
            pack(noisy_folder, tmp_path / "pack", shard_megabytes=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, former)
    pack(noisy_folder, tmp_path / "pack", shard_megabytes=1)
    assert read_item(tmp_path / "pack") == unbroken


def test_when_nothing_can_be_packed_the_list_says_why(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source/1.jpg").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"not one image could be packed; .*left_out.jsonl"):
        pack(tmp_path / "source", tmp_path / "pack")
    assert "not an image in a known format" in (tmp_path / "pack/left_out.jsonl").read_text()


def test_all_kinds_of_pictures_in_one_pack(tmp_path: Path) -> None:
    source = tmp_path / "source ü"
    (source / "ein Ordner").mkdir(parents=True)
    pixels = photograph(0, 90, 60)
    Image.fromarray(pixels).save(source / "ein Ordner/猫 1.png")
    Image.fromarray(pixels).convert("CMYK").save(source / "ein Ordner/cmyk.jpg")
    Image.fromarray(pixels).convert("L").save(source / "ein Ordner/gray.jpg")
    Image.fromarray(pixels[:1, :1]).save(source / "ein Ordner/one.jpg", subsampling=0)
    Image.new("RGB", (20_000, 10), "red").save(source / "ein Ordner/strip.jpg")
    (source / "ein Ordner/text.jpg").write_text("not a picture")
    manifest = pack(source, tmp_path / "pack", max_side=512)
    opened = ImagePack.open(tmp_path / "pack")
    assert list(opened.keys) == [f"ein Ordner/{name}" for name in ("cmyk", "gray", "one", "strip", "猫 1")]
    assert opened.sizes.tolist() == [[90, 60], [90, 60], [1, 1], [512, 1], [90, 60]]
    assert manifest.summary["re_encoded"] == {"CMYK": 1, "PNG": 1, "grayscale": 1, "larger than max_side": 1}
    assert manifest.summary["left_out"] == {"not an image in a known format": 1}
    for image in range(len(opened)):
        opened.read(image)


@pytest.mark.parametrize(
    ("name", "value"),
    [("jpeg_quality", 0), ("jpeg_quality", 101), ("max_side", -1), ("num_workers", -1), ("shard_megabytes", 0)],
)
def test_senseless_settings_are_refused_by_name(name: str, value: int, picture_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"{name}: {value} makes no sense"):
        pack(picture_folder, tmp_path / "pack", **{name: value})


def test_a_pack_inside_its_source_is_refused(picture_folder: Path) -> None:
    with pytest.raises(UserError, match="lies inside"):
        pack(picture_folder, picture_folder / "pack")


def test_an_unfinished_pack_is_not_taken_for_images(tmp_path):
    (tmp_path / "pack").mkdir()
    (tmp_path / "pack" / "command").write_text("pack\n")
    (tmp_path / "pack" / "shard-00000.tar").write_bytes(bytes(10_240))
    with pytest.raises(UserError, match="a pack that was begun and not finished"):
        open_or_pack(str(tmp_path / "pack"), tmp_path / "cache")


@pytest.mark.parametrize(
    "error", [MemoryError(), OSError(errno.EMFILE, "Too many open files"), OSError(errno.EIO, "I")]
)
def test_what_passes_leaves_no_image_out(
    error: Exception, noisy_folder: Path, unbroken: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory that is short, descriptors, a disk or network that fails: the run stops, and goes on afterwards."""
    contents_of, calls = sources.read_item, []

    def fails(item: sources.SourceItem) -> bytes:
        calls.append(item)
        if len(calls) == 40:
            raise error
        return contents_of(item)

    monkeypatch.setattr(sources, "read_item", fails)
    with pytest.raises(UserError, match=r"class . ?.*jpg: .*; no image is left out for that: .* run the same command"):
        pack(noisy_folder, tmp_path / "pack", shard_megabytes=1, num_workers=1)
    assert not (tmp_path / "pack/pack.json").exists()
    pack(noisy_folder, tmp_path / "pack", shard_megabytes=1)
    assert read_item(tmp_path / "pack") == unbroken


def test_a_file_that_may_not_be_read_is_left_out(
    noisy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def closed(item: sources.SourceItem) -> bytes:
        if item.name == "class 1/31.jpg":
            raise PermissionError(errno.EACCES, "Permission denied")
        return contents_of(item)

    contents_of = sources.read_item
    monkeypatch.setattr(sources, "read_item", closed)
    assert pack(noisy_folder, tmp_path / "pack").summary["left_out"]["cannot be read"] == 1


@pytest.mark.parametrize("name", ["00000.json", "00000.npz", "settings.json"])
@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000, b'{"left_out": 3}'])
def test_damaged_records_of_an_unfinished_pack(
    name: str, damage: bytes, noisy_folder: Path, unbroken: dict[str, bytes], tmp_path: Path
) -> None:
    """As a power cut leaves them."""
    out = tmp_path / "pack"
    started = writer.plan(PackConfig(source=str(noisy_folder), out=str(out), shard_megabytes=1))
    (out / "parts").mkdir(parents=True)
    writer._shards(started)
    (out / "parts" / name).write_bytes(damage)
    if name == "settings.json":
        wanted = "of other" if damage.startswith(b'{"') else "settings.json: damaged"
        with pytest.raises(UserError, match=wanted):
            pack(noisy_folder, out, shard_megabytes=1)
    else:
        pack(noisy_folder, out, shard_megabytes=1)
        assert read_item(out) == unbroken


@pytest.mark.parametrize("damage", [b"", b"{}", b"\xff", b"[]", b'{"images": 3}'])
def test_a_damaged_record_of_a_finished_pack_is_made_again(damage: bytes, picture_folder: Path, tmp_path: Path) -> None:
    recipe = PackConfig(source=str(picture_folder), out=str(tmp_path / "pack"))
    figures = packing.run(recipe)
    (tmp_path / "pack/results.json").write_bytes(damage)
    again = packing.run(recipe)
    assert {**again, "seconds": 0} == {**figures, "seconds": 0}
    assert packing.run(recipe) == again


def test_figures_that_an_earlier_record_lacks_are_added(picture_folder: Path, tmp_path: Path) -> None:
    recipe = PackConfig(source=str(picture_folder), out=str(tmp_path / "pack"))
    figures = packing.run(recipe)
    path = tmp_path / "pack/results.json"
    path.write_text(json.dumps({"fingerprint": figures["fingerprint"], "seconds": 7.5}))
    assert packing.run(recipe) == figures | {"seconds": 7.5}


def test_a_users_file_called_command_is_no_record(picture_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(picture_folder, tmp_path / "source")
    for content in (b"\xff\xfe\x00", b"#!/bin/sh\nls\n", b""):
        (tmp_path / "source/command").write_bytes(content)
        assert len(open_or_pack(str(tmp_path / "source"), tmp_path / "cache")) > 0


def test_warnings_are_shown_and_among_the_figures(
    picture_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for split in ("train", "val"):
        shutil.copytree(picture_folder, tmp_path / "source" / split)
    figures = packing.run(PackConfig(source=str(tmp_path / "source"), out=str(tmp_path / "pack")))
    assert "the classes are train/, val/, which look like splits" in figures["warnings"][0]
    assert f"warning: {figures['warnings'][0]}" in capsys.readouterr().out
