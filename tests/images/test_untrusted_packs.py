"""Packs and tars from strangers, changed at random: one line of error or a right result, never a traceback."""

import hashlib
import io
import json
import shutil
import tarfile
import tempfile
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_archives import PICTURE

from repcon.commands import pack as packing
from repcon.config import ClassSubset, PackConfig
from repcon.images import format as pack_format
from repcon.images import sources
from repcon.images.format import COLUMNS, KEY_TEXT
from repcon.images.jpeg import content_hash
from repcon.images.pack import ImagePack, select_classes
from repcon.runtime.errors import UserError

ODD = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([10**400, -1, 2**63])
    | st.floats()
    | st.text(st.sampled_from("ab\ud800\udcff\x1bé"), max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
COLUMN = st.sampled_from([*COLUMNS, KEY_TEXT])
EDIT = st.tuples(st.floats(0, 1), st.binary(min_size=0, max_size=9), st.integers(0, 9))
"""Where, what is put in, how many bytes are taken away."""
FUZZ = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
MOST_BYTES = 64 << 20


@pytest.fixture(scope="module")
def whole(picture_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "pack"
    packing.run(PackConfig(source=str(picture_folder), out=str(out)))
    return out


@pytest.fixture
def bounded() -> Iterator[None]:
    tracemalloc.start()
    yield
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < MOST_BYTES


def use(folder: Path) -> None:
    """Reads all of a pack. What is given must be right: each image is what its content hash says."""
    try:
        pack = ImagePack.open(folder)
        select_classes(pack, ClassSubset())
        ", ".join([*pack.keys, *pack.classes]).encode()
        for image in range(len(pack)):
            assert content_hash(pack.read(image)) == pack.hashes[image].tobytes()
    except UserError as error:
        assert str(error)


def edited(data: bytes, edit: tuple[float, bytes, int]) -> bytes:
    place = int(edit[0] * len(data))
    return data[:place] + edit[1] + data[place + edit[2] :]


def with_index(whole: Path, folder: Path, index: bytes, **changes: Any) -> None:
    """A pack with this index, whose checksum the manifest vouches for."""
    shutil.copytree(whole, folder)
    manifest = json.loads((folder / "pack.json").read_text())
    (folder / "index.npz").write_bytes(index)
    manifest |= {"index_sha256": hashlib.sha256(index).hexdigest(), **changes}
    (folder / "pack.json").write_text(json.dumps(manifest))


@given(name=st.sampled_from(["images", "classes", "shard_bytes", "settings", "summary", "fingerprint"]), value=ODD)
@FUZZ
def test_manifests(whole: Path, name: str, value: object) -> None:
    with tempfile.TemporaryDirectory() as place:
        with_index(whole, Path(place, "pack"), (whole / "index.npz").read_bytes(), **{name: value})
        use(Path(place, "pack"))


@given(edit=EDIT)
@FUZZ
def test_bytes_of_an_index(whole: Path, edit: tuple[float, bytes, int]) -> None:
    with tempfile.TemporaryDirectory() as place:
        with_index(whole, Path(place, "pack"), edited((whole / "index.npz").read_bytes(), edit))
        use(Path(place, "pack"))


@given(name=COLUMN, row=st.integers(0, 3), value=st.integers(-(2**63), 2**63 - 1))
@FUZZ
def test_numbers_of_an_index(whole: Path, name: str, row: int, value: int) -> None:
    columns = {
        key: array.copy() for key, array in pack_format.load_index((whole / "index.npz").read_bytes(), "").items()
    }
    columns[name].reshape(-1)[row] = np.array([value]).astype(columns[name].dtype)[0]
    fingerprint = pack_format.fingerprint(columns["hash"], columns["size"])
    with tempfile.TemporaryDirectory() as place:
        with_index(whole, Path(place, "pack"), pack_format.dump_index(columns), fingerprint=fingerprint)
        use(Path(place, "pack"))


@given(edit=EDIT)
@FUZZ
def test_bytes_of_a_shard(whole: Path, edit: tuple[float, bytes, int]) -> None:
    with tempfile.TemporaryDirectory() as place:
        shutil.copytree(whole, Path(place, "pack"))
        shard = Path(place, "pack/shard-00000.tar")
        shard.write_bytes(edited(shard.read_bytes(), edit))
        use(Path(place, "pack"))


def a_tar(members: list[tuple[str, bytes]], kind: int) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=kind) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


NAMES = st.text(st.sampled_from("ab./0é"), min_size=1, max_size=8).map(lambda name: name.strip("/") or "a")
MEMBERS = st.lists(
    st.tuples(
        st.builds("{}{}".format, NAMES, st.sampled_from([".jpg", ".cls", ".fine.cls", ".png", ".json", ".tar", ""])),
        st.sampled_from([PICTURE, b"1", b"x" * 300, b"\xff\xfe", b""]),
    ),
    max_size=8,
)
KINDS = st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])


@given(members=MEMBERS, kind=KINDS, edits=st.lists(EDIT, max_size=3))
@FUZZ
def test_source_tars(members: list[tuple[str, bytes]], kind: int, edits: list[tuple[float, bytes, int]]) -> None:
    """Whatever is listed lies in the file, has a key of its own, and a class that is there."""
    data = a_tar(members, kind)
    for edit in edits:
        data = edited(data, edit)
    with tempfile.TemporaryDirectory() as place:
        path = Path(place, "a.tar")
        path.write_bytes(data)
        try:
            listing = sources.list_source(str(path))
        except UserError as error:
            assert str(error)
            return
        assert all(len(sources.read_item(item)) == item.length for item in listing.items)
        assert len({item.key for item in listing.items}) == len(listing.items)
        assert all(-1 <= item.label < len(listing.classes) for item in listing.items)
        json.dumps([listing.left_out, listing.classes, listing.warnings], ensure_ascii=False).encode()


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE])
@pytest.mark.parametrize("size", [1 << 24, 1 << 35, 1 << 45, 1 << 62])
def test_headers_that_claim_much_take_no_memory(kind: bytes, size: int, bounded: None, tmp_path: Path) -> None:
    def header(name: str, size: int, kind: bytes) -> bytes:
        info = tarfile.TarInfo(name)
        info.size, info.type = size, kind
        return info.tobuf(tarfile.GNU_FORMAT)

    fine = header("c/ok.jpg", len(PICTURE), tarfile.REGTYPE) + PICTURE + bytes(-len(PICTURE) % 512)
    path = tmp_path / "a.tar"
    path.write_bytes(fine + header("././@LongLink", size, kind) + b"x" * 512 + bytes(1024))
    with path.open("r+b") as file:
        file.truncate(1 << 26)  # so that there is something to be read
    with pytest.raises(UserError, match=r"damaged tar .* can be read: 1;"):
        sources.list_source(str(path))
