"""Folders as sources: order, labels, keys, and what cannot be packed."""

import errno
import inspect
import os
import sys
from pathlib import Path

import pytest
from test_archives import PICTURE, tar_of

from repcon.images import sources
from repcon.runtime.errors import UserError


def folder_of(root: Path, names: list[str]) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(PICTURE)
    return root


def test_order_labels_and_keys(tmp_path: Path) -> None:
    names = ["dog/b.jpg", "cat/deep/1.png", "cat/a.JPEG", "cat/a.png", "loose.jpg", "cat/v1.2.jpg", "cat/v1_2.jpg"]
    listing = sources.list_source(str(folder_of(tmp_path, names)))
    assert listing.classes == ("cat", "dog")
    assert {item.name: (item.key, item.label) for item in listing.items} == {
        "loose.jpg": ("loose", -1),
        "cat/a.JPEG": ("cat/a", 0),
        "cat/a.png": ("cat/a~2", 0),
        "cat/v1.2.jpg": ("cat/v1_2", 0),
        "cat/v1_2.jpg": ("cat/v1_2~2", 0),
        "cat/deep/1.png": ("cat/deep/1", 0),
        "dog/b.jpg": ("dog/b", 1),
    }
    assert listing == sources.list_source(str(tmp_path))


def test_spaces_and_other_scripts_in_names(tmp_path: Path) -> None:
    listing = sources.list_source(str(folder_of(tmp_path, ["größe Katzen/猫 1.jpg", "собака/été (2).jpg"])))
    assert [item.key for item in listing.items] == ["größe Katzen/猫 1", "собака/été (2)"]
    assert listing.classes == ("größe Katzen", "собака")


def test_names_that_are_no_utf8(tmp_path: Path) -> None:
    try:
        (tmp_path / os.fsdecode(b"caf\xe9.jpg")).write_bytes(PICTURE)
    except OSError:
        pytest.skip("the file system takes UTF-8 names only")
    item = sources.list_source(str(tmp_path)).items[0]
    assert item.key == item.key.encode().decode() == "caf\ufffd"
    assert sources.read_item(item) == PICTURE


def test_a_folder_around_everything_is_no_class(tmp_path: Path) -> None:
    folder_of(tmp_path, ["photos/train/cat/1.jpg", "photos/train/dog/1.jpg"])
    assert sources.list_source(str(tmp_path)).classes == ("cat", "dog")


def test_tars_in_a_folder_have_their_own_roots(tmp_path: Path) -> None:
    tar_of(tmp_path / "a.tar", {"birds/wren/1.jpg": PICTURE, "birds/crow/1.jpg": PICTURE})
    tar_of(tmp_path / "b.tar", {"wren/1.jpg": PICTURE, "plum/1.jpg": PICTURE})
    listing = sources.list_source(str(tmp_path))
    assert listing.classes == ("crow", "plum", "wren")
    assert [item.label for item in listing.items] == [2, 0, 2, 1]


def test_a_tar_of_one_class_is_labelled_as_its_set_is(tmp_path: Path) -> None:
    """Classes do not depend on how a set was cut into tars."""
    for name in ("a", "b"):
        tar_of(tmp_path / "each" / f"{name}.tar", {f"{name}/images/{n}.jpg": PICTURE for n in range(2)})
    assert sources.list_source(str(tmp_path / "each")).classes == ("a", "b")
    tar_of(tmp_path / "shards" / "0.tar", {"train/a/images/0.jpg": PICTURE})
    tar_of(tmp_path / "shards" / "1.tar", {"train/a/images/1.jpg": PICTURE, "train/b/images/0.jpg": PICTURE})
    listing = sources.list_source(str(tmp_path / "shards"))
    assert listing.classes == ("a", "b") and [item.label for item in listing.items] == [0, 0, 1]
    tar_of(tmp_path / "more" / "0.tar", {"a/x/0.jpg": PICTURE, "a/y/0.jpg": PICTURE})
    tar_of(tmp_path / "more" / "1.tar", {"a/x/1.jpg": PICTURE, "b/x/0.jpg": PICTURE})
    assert sources.list_source(str(tmp_path / "more")).classes == ("a", "b")


def test_tars_that_are_hidden_or_no_files(tmp_path: Path) -> None:
    tar_of(tmp_path / ".trash" / "old.tar", {"dog/1.jpg": PICTURE})
    tar_of(tmp_path / "UPPER.TAR", {"cat/1.jpg": PICTURE})
    os.mkfifo(tmp_path / "pipe.tar")
    listing = sources.list_source(str(tmp_path))
    assert listing.classes == ("cat",)
    assert dict(listing.left_out) == {".trash/old.tar": "a hidden file", "pipe.tar": "not a plain file"}
    assert sources.list_source(str(tmp_path / "UPPER.TAR")).classes == ("cat",)


def test_links_are_followed_and_rings_end(tmp_path: Path) -> None:
    folder_of(tmp_path / "real", ["1.jpg"])
    root = tmp_path / "source"
    root.mkdir()
    (root / "cat").symlink_to(tmp_path / "real")
    (root / "cat2").symlink_to(tmp_path / "real")
    (root / "ring").symlink_to(root)
    (root / "file.jpg").symlink_to(tmp_path / "real" / "1.jpg")
    (root / "broken.jpg").symlink_to(tmp_path / "nothing.jpg")
    listing = sources.list_source(str(root))
    assert [item.name for item in listing.items] == ["file.jpg", "cat/1.jpg"]
    assert {name for name, reason in listing.left_out if "read before" in reason} == {"cat2/", "ring/"}
    assert {name for name, reason in listing.left_out if "No such file" in reason} == {"broken.jpg"}


def test_what_is_no_image_is_listed(tmp_path: Path) -> None:
    folder_of(tmp_path, ["cat/1.jpg", "cat/notes.txt", ".DS_Store", "cat/._1.jpg", "cat/README"])
    (tmp_path / "cat/none.jpg").write_bytes(b"")
    reasons = dict(sources.list_source(str(tmp_path)).left_out)
    assert reasons == {
        "cat/notes.txt": "not an image's file name (.txt)",
        ".DS_Store": "a hidden file",
        "cat/._1.jpg": "a hidden file",
        "cat/README": "not an image's file name (no suffix)",
        "cat/none.jpg": "an empty file",
    }


def test_the_identity_follows_names_sizes_and_times(tmp_path: Path) -> None:
    folder_of(tmp_path, ["cat/1.jpg", "cat/2.jpg"])
    seen = {sources.list_source(str(tmp_path)).identity}
    os.utime(tmp_path / "cat/1.jpg", (1, 1))
    seen.add(sources.list_source(str(tmp_path)).identity)
    (tmp_path / "cat/2.jpg").rename(tmp_path / "cat/3.jpg")
    seen.add(sources.list_source(str(tmp_path)).identity)
    assert len(seen) == 3


def test_sources_that_cannot_be_packed(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").mkdir()
    (tmp_path / "text/notes.txt").write_text("hello")
    (tmp_path / "zero.tar").write_bytes(b"")
    (tmp_path / "a.tar.gz").write_bytes(b"x")
    (tmp_path / "photo.jpg").write_bytes(PICTURE)
    (tmp_path / "pack").mkdir()
    (tmp_path / "pack/pack.json").write_text("{}")
    for name, message in {
        "empty": "holds no images",
        "text": r"holds no images \(notes.txt: not an image",
        "zero.tar": r"zero.tar: a truncated or damaged tar .* can be read: 0;",
        "a.tar.gz": "compressed",
        "photo.jpg": "neither a folder nor a .tar",
        "missing": "no such folder",
        "pack": "is a pack already",
    }.items():
        with pytest.raises(UserError, match=message):
            sources.list_source(str(tmp_path / name))
    with pytest.raises(UserError, match="local folders"):
        sources.list_source("s3://bucket/images")


def test_a_file_that_shrank_is_an_error(tmp_path: Path) -> None:
    item = sources.list_source(str(folder_of(tmp_path, ["1.jpg"]))).items[0]
    (tmp_path / "1.jpg").write_bytes(PICTURE[:100])
    with pytest.raises(OSError, match="100 of"):
        sources.read_item(item)


def test_what_is_no_file_is_left_out(tmp_path: Path) -> None:
    folder_of(tmp_path, ["cat/1.jpg"])
    os.mkfifo(tmp_path / "cat/pipe.jpg")
    (tmp_path / "cat/zero.png").symlink_to("/dev/zero")
    assert sources.list_source(str(tmp_path)).left_out == [
        ("cat/pipe.jpg", "not a plain file"),
        ("cat/zero.png", "not a plain file"),
    ]


def test_a_file_that_became_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    item = sources.list_source(str(folder_of(tmp_path, ["cat/1.jpg"]))).items[0]
    (tmp_path / "cat/1.jpg").unlink()
    os.mkfifo(tmp_path / "cat/1.jpg")
    with pytest.raises(OSError, match="a named pipe, not a plain file"):
        sources.read_item(item)


@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ESTALE])
def test_a_folder_that_cannot_be_read_is_no_single_file(
    number: int, hidden: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody knows how many images it holds; what is hidden would be left out anyway."""
    closed = str(tmp_path / ("lost+found" if hidden else "dog"))
    folder_of(tmp_path, ["cat/1.jpg", "dog/1.jpg", "lost+found/1.jpg"])
    scan = os.scandir

    def scandir(path: str) -> object:
        if path == closed:
            raise OSError(number, os.strerror(number), str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)
    if hidden:
        assert sources.list_source(str(tmp_path)).classes == ("cat", "dog")
    else:
        with pytest.raises(UserError, match=rf"dog: cannot be read \({os.strerror(number)}\); nothing is left out"):
            sources.list_source(str(tmp_path))


@pytest.mark.parametrize("number", [errno.EACCES, errno.EMFILE, errno.EIO])
def test_a_tar_that_cannot_be_opened_is_no_single_file(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tar_of(tmp_path / "a.tar", {"cat/1.jpg": PICTURE})

    def closed(path: Path) -> None:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr("repcon.images.archives.open_regular", closed)
    with pytest.raises(UserError, match=rf"a.tar: cannot be read \({os.strerror(number)}"):
        sources.list_source(str(tmp_path))


def test_the_identity_is_that_of_what_is_packed(tmp_path: Path) -> None:
    """A log that grows, a hidden file or a thumbnail makes no other pack of the same images."""
    folder_of(tmp_path, ["cat/1.jpg", "cat/@eaDir/1.jpg", "cat/.hidden.jpg"])
    tar_of(tmp_path / "pictures.tar", {"cat/2.jpg": PICTURE})
    tar_of(tmp_path / "texts.tar", {"a.txt": b"text"})
    identity = sources.list_source(str(tmp_path)).identity
    (tmp_path / "log.txt").write_text("more")
    (tmp_path / "cat/.hidden.jpg").write_bytes(b"another")
    (tmp_path / "cat/@eaDir/1.jpg").write_bytes(b"another")
    (tmp_path / ".DS_Store").write_bytes(b"new")
    tar_of(tmp_path / "texts.tar", {"a.txt": b"another text"})
    assert sources.list_source(str(tmp_path)).identity == identity
    os.utime(tmp_path / "pictures.tar", (1, 1))
    assert sources.list_source(str(tmp_path)).identity != identity


def test_folders_deeper_than_the_stack(tmp_path: Path) -> None:
    folder = str(tmp_path)
    for _ in range(200):
        folder += "/a"
        os.mkdir(folder)
    Path(folder, "1.jpg").write_bytes(PICTURE)
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack()) + 100)
    try:
        assert len(sources.list_source(str(tmp_path)).items) == 1
    finally:
        sys.setrecursionlimit(limit)
