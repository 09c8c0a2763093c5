"""FFCV's file: the pack's bytes, refused where it is not the pack's, damaged or changed."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from loader_case import SIDES, make_pack, request

from repcon import cli
from repcon.commands import pack as packing
from repcon.config import PackConfig
from repcon.decode.factory import open_loader
from repcon.decode.ffcv import write_beton
from repcon.decode.libraries import installed
from repcon.images.format import BETON
from repcon.images.pack import ImagePack
from repcon.runtime.errors import UserError

pytestmark = pytest.mark.skipif(not installed("ffcv"), reason="loader ffcv is not installed: run `make ffcv`")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pack(tmp_path_factory.mktemp("ffcv"))


@pytest.fixture
def path(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "pack"))


def test_the_file_holds_the_packs_bytes(path: Path) -> None:
    from repcon.decode.ffcv_format import BetonReader

    pack = ImagePack.open(path)
    ffcv_format = BetonReader(pack, path / BETON, SIDES)
    assert [bytes(ffcv_format.jpeg(row)) for row in range(len(pack))] == [pack.read(row) for row in range(len(pack))]


def test_importing_ffcv_leaves_torchs_threads_alone(path: Path) -> None:
    threads = torch.get_num_threads()
    open_loader("ffcv", ImagePack.open(path), SIDES).close()
    assert torch.get_num_threads() == threads


def test_images_larger_than_a_page(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from repcon.decode import ffcv_format

    pack = ImagePack.open(path)
    monkeypatch.setattr(ffcv_format, "MIN_PAGE_SIZE", 1 << 21)
    padded = ImagePack.open(path, check=False)
    monkeypatch.setattr(padded, "read", lambda row: pack.read(row) + bytes(9 << 20))
    padded.lengths = padded.lengths + (9 << 20)
    write_beton(padded, tmp_path / BETON)
    opened = ffcv_format.BetonReader(padded, tmp_path / BETON, SIDES)
    assert bytes(opened.jpeg(2)).startswith(pack.read(2))


def test_another_packs_file_is_refused(path: Path, tmp_path: Path) -> None:
    other = make_pack(tmp_path / "other", seed=1)
    shutil.copy(other / BETON, path / BETON)
    with pytest.raises(UserError, match=r"made from another pack .*delete it and run `repcon pack"):
        open_loader("ffcv", ImagePack.open(path), SIDES)


def test_a_missing_file_is_made_by_the_command_that_the_error_gives(path: Path) -> None:
    """Its source is gone: the pack is named as its own."""
    (path / BETON).unlink()
    with pytest.raises(UserError) as caught:
        open_loader("ffcv", ImagePack.open(path), SIDES)
    command = str(caught.value).split("`")[1].split()
    assert command == ["repcon", "pack", str(path), str(path), "--ffcv"]
    before = {file: file.stat().st_mtime_ns for file in path.iterdir()}
    (path / f".{BETON}.tmp").write_bytes(b"left by a run that was killed")
    assert cli.main(command[1:]) == 0
    assert {file: file.stat().st_mtime_ns for file in path.iterdir() if file.name != BETON} == before
    open_loader("ffcv", ImagePack.open(path), SIDES).close()


def test_a_file_that_cannot_be_written_is_named(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from repcon.decode import ffcv_format

    (path / BETON).unlink()

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ffcv_format, "handle_sample", full)
    with pytest.raises(UserError, match=rf"{BETON}: cannot be written \(No space left.*same command again"):
        packing.run(PackConfig(source=str(path), out=str(path), ffcv=True))
    assert not list(path.glob("*.tmp"))


@pytest.mark.parametrize("length", [0, 10, 5_000, -1])
def test_a_cut_off_file_is_refused(path: Path, length: int) -> None:
    data = (path / BETON).read_bytes()
    (path / BETON).write_bytes(data[:length])
    with pytest.raises(UserError, match=BETON):
        open_loader("ffcv", ImagePack.open(path), SIDES)


def test_any_file_is_refused_without_harm(path: Path) -> None:
    data = (path / BETON).read_bytes()
    generator = np.random.default_rng(0)
    for _ in range(25):
        broken = bytearray(data)
        for place in generator.integers(0, 3_000, 3):
            broken[place] = int(generator.integers(0, 256))
        (path / BETON).write_bytes(broken)
        pack = ImagePack.open(path)
        try:
            loader = open_loader("ffcv", pack, SIDES, num_workers=1)
        except UserError:
            continue
        try:
            list(loader.batches([request(pack, range(len(pack)), 2)]))
        except UserError as error:
            assert BETON in str(error)
        loader.close()


def test_changed_bytes_are_found_at_the_first_read(path: Path) -> None:
    pack = ImagePack.open(path)
    whole = bytearray((path / BETON).read_bytes())
    place = bytes(whole).index(pack.read(4)) + 700
    whole[place] ^= 1
    (path / BETON).write_bytes(whole)
    loader = open_loader("ffcv", pack, SIDES, num_workers=2)
    with pytest.raises(UserError, match="has changed") as caught:
        list(loader.batches([request(pack, range(len(pack)), 2)]))
    assert pack.keys[4] in str(caught.value)
    loader.close()


def test_bytes_that_cannot_be_decoded_name_the_image(path: Path) -> None:
    pack = ImagePack.open(path, check=False)
    whole = bytearray((path / BETON).read_bytes())
    jpeg = pack.read(4)
    place = bytes(whole).index(jpeg)
    whole[place : place + len(jpeg)] = bytes(len(jpeg))
    (path / BETON).write_bytes(whole)
    loader = open_loader("ffcv", pack, SIDES, num_workers=2)
    with pytest.raises(UserError, match="cannot be decoded") as caught:
        list(loader.batches([request(pack, range(len(pack)), 2)]))
    assert pack.keys[4] in str(caught.value)
    loader.close()


def test_a_failed_write_leaves_nothing(path: Path, tmp_path: Path) -> None:
    pack = ImagePack.open(path)
    (path / "shard-00000.tar").write_bytes(b"")
    with pytest.raises(UserError, match="shard-00000"):
        write_beton(ImagePack.open(path), tmp_path / "new.beton")
    assert pack is not None and not list(tmp_path.glob("*beton*"))


def test_ffcvs_own_decoder_reads_the_file(path: Path) -> None:
    from ffcv.fields.rgb_image import RGBImageField
    from ffcv.reader import Reader

    reader = Reader(str(path / BETON), {"image": RGBImageField})
    metadata = reader.metadata[reader.metadata.dtype.names[0]]
    assert metadata["width"].tolist() == ImagePack.open(path).sizes[:, 0].tolist()


@pytest.mark.parametrize("short", [True, False])
def test_short_memory_is_no_damage(path: Path, short: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from repcon.decode import ffcv_format

    def refuse(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(ffcv_format, "Reader", refuse)
    if short:
        monkeypatch.setattr(ffcv_format, "require_memory", refuse)
    with pytest.raises(MemoryError if short else UserError):
        open_loader("ffcv", ImagePack.open(path), SIDES)
