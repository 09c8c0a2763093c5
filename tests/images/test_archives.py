"""Tars as sources: WebDataset and plain ones, unsafe members, damage."""

import contextlib
import io
import tarfile
from pathlib import Path

import pytest
from pictures import photograph
from simplejpeg import encode_jpeg

from repcon.images import file_names, sources
from repcon.images.archives import SourceScan, add_tar
from repcon.runtime.errors import UserError

PICTURE = encode_jpeg(photograph(0, 16, 16))


def tar_of(path: Path, members: dict[str, bytes | tarfile.TarInfo], kind: int = tarfile.PAX_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=kind) as tar:
        for name, content in members.items():
            if isinstance(content, tarfile.TarInfo):
                tar.addfile(content)
                continue
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def link(name: str, target: str, kind: bytes) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_folders_in_a_tar_are_labels(tmp_path: Path, kind: int) -> None:
    path = tar_of(tmp_path / "a.tar", {f"{c}/{n}.jpg": PICTURE for c in ("cat", "dog") for n in range(2)}, kind)
    listing = sources.list_source(str(path))
    assert [item.key for item in listing.items] == ["cat/0", "cat/1", "dog/0", "dog/1"]
    assert [item.label for item in listing.items] == [0, 0, 1, 1] and listing.classes == ("cat", "dog")
    assert all(sources.read_item(item) == PICTURE for item in listing.items)


def test_cls_members_are_labels_and_sidecars_are_no_images(tmp_path: Path) -> None:
    members: dict[str, bytes | tarfile.TarInfo] = {}
    for number, label in enumerate([10, 9, 10]):
        members |= {f"./s{number}.jpg": PICTURE, f"./s{number}.cls": b"%d\n" % label, f"./s{number}.json": b"{}"}
    members |= {"./s3.png": PICTURE, "./s0.mask.png": PICTURE, "./readme.txt": b"text"}
    listing = sources.list_source(str(tar_of(tmp_path / "shard-000000.tar", members)))
    assert [item.key for item in listing.items] == ["s0", "s1", "s2", "s3"]
    assert listing.classes == ("9", "10") and [item.label for item in listing.items] == [1, 0, 1, -1]
    assert [reason for _, reason in listing.left_out] == [
        "a further file of its sample",
        "not an image's file name (.txt)",
    ]


def test_members_that_could_leave_the_archive_are_refused(tmp_path: Path) -> None:
    members: dict[str, bytes | tarfile.TarInfo] = {
        "../up.jpg": PICTURE,
        "cat/../../up.jpg": PICTURE,
        "/etc/absolute.jpg": PICTURE,
        "cat/soft.jpg": link("cat/soft.jpg", "/etc/passwd", tarfile.SYMTYPE),
        "cat/hard.jpg": link("cat/hard.jpg", "cat/fine.jpg", tarfile.LNKTYPE),
        "cat/device.jpg": link("cat/device.jpg", "", tarfile.CHRTYPE),
        "cat/fine.jpg": PICTURE,
        "cat/.hidden.jpg": PICTURE,
        "cat/empty.jpg": b"",
    }
    listing = sources.list_source(str(tar_of(tmp_path / "a.tar", members)))
    assert [item.key for item in listing.items] == ["cat/fine"]
    reasons = dict(listing.left_out)
    assert len(reasons) == 8
    for name in ("../up.jpg", "cat/../../up.jpg", "/etc/absolute.jpg"):
        assert reasons[f"a.tar: {name}"] == "a path that leaves the archive"
    assert reasons["a.tar: cat/soft.jpg"] == reasons["a.tar: cat/hard.jpg"] == "a link"
    assert reasons["a.tar: cat/device.jpg"] == "not a plain file"


@pytest.mark.parametrize("cut", [100, 700, 5000])
def test_a_truncated_tar_is_an_error_that_names_it(tmp_path: Path, cut: int) -> None:
    path = tar_of(tmp_path / "a.tar", {f"cat/{number}.jpg": PICTURE for number in range(40)})
    whole = sources.list_source(str(path)).items
    end = whole[-1].offset + whole[-1].length - cut
    path.write_bytes(path.read_bytes()[:end])
    left = sum(item.offset + item.length <= end for item in whole)
    for source in (path, tmp_path):  # by itself, and as one of a folder's
        with pytest.raises(UserError, match=rf"a\.tar: a truncated or damaged tar .* can be read: {left};"):
            sources.list_source(str(source))


@pytest.mark.parametrize("how", ["flipped", "zeroed", "cut before", "cut inside", "inserted", "joined"])
def test_a_tar_that_seems_to_end_early_is_refused(tmp_path: Path, how: str) -> None:
    """tarfile takes a header that it cannot read for the end, and says nothing."""
    path = tar_of(tmp_path / "a.tar", {f"cat/{number}.jpg": PICTURE for number in range(20)}, tarfile.USTAR_FORMAT)
    whole, tenth = path.read_bytes(), sources.list_source(str(path)).items[10].offset - tarfile.BLOCKSIZE
    rest = whole[tenth + tarfile.BLOCKSIZE :]
    damaged = {
        "flipped": whole[: tenth + 5] + bytes([whole[tenth + 5] ^ 255]) + whole[tenth + 6 :],
        "zeroed": whole[:tenth] + bytes(tarfile.BLOCKSIZE) + rest,
        "cut before": whole[:tenth],
        "cut inside": whole[: tenth + 300],
        "inserted": whole[:tenth] + b"x" * tarfile.BLOCKSIZE + whole[tenth:],
        "joined": whole + whole,
    }
    path.write_bytes(damaged[how])
    count = 20 if how == "joined" else 10
    with pytest.raises(UserError, match=rf"a\.tar: a truncated or damaged tar .* at byte .* can be read: {count};"):
        sources.list_source(str(path))


@pytest.mark.parametrize("kind", ["link to nothing", "text", "empty"])
def test_what_is_called_a_tar_and_is_none_is_refused(tmp_path: Path, kind: str) -> None:
    """Nobody knows how many images are missing."""
    (tmp_path / "fine.jpg").write_bytes(PICTURE)
    tar = tmp_path / "a.tar"
    if kind == "link to nothing":
        tar.symlink_to(tmp_path / "not_fetched.tar")
    else:
        tar.write_bytes(b"version https://git-lfs" if kind == "text" else b"")
    with pytest.raises(UserError, match=r"a\.tar: "):
        sources.list_source(str(tmp_path))


def test_damaged_headers_never_hang_or_escape(tmp_path: Path) -> None:
    """A flipped byte in each place of the first headers: the scan ends, and every item lies in the file."""
    path = tar_of(tmp_path / "a.tar", {"cat/" + "long" * 40 + f"{n}.jpg": PICTURE for n in range(3)})
    whole = path.read_bytes()
    for place in range(0, 2600, 7):
        damaged = bytearray(whole)
        damaged[place] ^= 0xFF
        path.write_bytes(damaged)
        scan = SourceScan()
        with contextlib.suppress(UserError):
            add_tar(path, "a.tar", scan)
        assert all(entry.offset > 0 and entry.offset + entry.length <= len(whole) for entry in scan.found)


def test_a_size_that_points_backwards_ends_the_scan(tmp_path: Path) -> None:
    """The member's size as a negative base-256 number: the next header would be this one again."""
    path = tar_of(tmp_path / "a.tar", {"cat/0.jpg": PICTURE, "cat/1.jpg": PICTURE}, tarfile.GNU_FORMAT)
    data = bytearray(path.read_bytes())
    data[124:136] = b"\xff" + (-512).to_bytes(11, "big", signed=True)
    data[148:156] = b"%06o\0 " % (sum(data[:148]) + 8 * 32 + sum(data[156:512]))
    path.write_bytes(data)
    with pytest.raises(UserError, match="damaged"):
        add_tar(path, "a.tar", SourceScan())


def test_refusals_by_name_and_size() -> None:
    assert file_names.rejection_reason("cat/photo.JPEG", 1) == ""
    assert file_names.rejection_reason("a/__MACOSX/x.jpg", 1) == "a hidden file"
    assert file_names.rejection_reason("cat/photo.jpg", file_names.MAX_FILE_BYTES + 1).startswith("too large a file")
