"""Files that stay open: one limit for all of a process, descriptors that run out, and what is no plain file."""

import errno
import os
import resource
import signal
from pathlib import Path

import pytest

from repcon.images.pack import ImagePack
from repcon.runtime.errors import UserError
from repcon.runtime.filesystem import open_filesystem
from repcon.runtime.local_files import OpenFile, OpenFileCache, error_reason, is_transient


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture
def few_descriptors():
    """Room for 40 descriptors more than are open now."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 41, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_all_objects_share_one_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("repcon.runtime.local_files._limit", lambda: 6)
    OpenFileCache.forget_all()
    before, several = descriptors(), [OpenFileCache() for _ in range(3)]
    for number in range(12):
        (tmp_path / str(number)).write_bytes(b"%d" % number)
        for files in several:
            assert files.read(str(tmp_path / str(number)), 0, 9) == b"%d" % number
    assert descriptors() == before + 6
    OpenFileCache.forget_all()
    assert descriptors() == before


def test_where_descriptors_run_out_the_held_ones_are_given_up(
    tmp_path: Path, few_descriptors: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("repcon.runtime.local_files._limit", lambda: 1000)
    files = OpenFileCache()
    for number in range(100):
        (tmp_path / str(number)).write_bytes(b"%d" % number)
    for number in [*range(100), *range(100)]:
        assert files.read(str(tmp_path / str(number)), 0, 9) == b"%d" % number


def test_no_descriptor_left_is_not_called_damage(picture_folder: Path, tmp_path: Path) -> None:
    from repcon.commands import pack as packing
    from repcon.config import PackConfig

    packing.run(PackConfig(source=str(picture_folder), out=str(tmp_path / "pack")))
    pack = ImagePack.open(tmp_path / "pack")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    held: list[int] = []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 3, limits[1]))
        OpenFileCache.forget_all()
        while True:
            try:
                held.append(os.open("/dev/null", os.O_RDONLY))
            except OSError:
                break
        with pytest.raises(UserError, match=r"cannot be read now \(Too many open files: raise .*ulimit -n") as caught:
            pack.read(0)
        assert "pack the images again" not in str(caught.value) and isinstance(caught.value.__cause__, OSError)
        with pytest.raises(UserError, match="the pack cannot be read now"):
            ImagePack.open(tmp_path / "pack")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        for descriptor in held:
            os.close(descriptor)
    assert pack.read(0)


@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_what_is_no_plain_file_is_refused_at_once(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    signal.alarm(20)
    try:
        with pytest.raises(OSError, match=f"a {'named ' if kind == 'pipe' else ''}{kind}, not a plain file") as caught:
            OpenFile(path)
        assert not is_transient(caught.value)
        with pytest.raises(OSError, match="not a plain file"):
            open_filesystem(str(tmp_path)).read_range("file", 0, 10)
        with pytest.raises(OSError, match="not a plain file"):
            open_filesystem(str(tmp_path)).read("file")
    except UserError as error:  # a link that leads out of a store
        assert kind == "device" and "is a link that leads out" in str(error)
    finally:
        signal.alarm(0)


@pytest.mark.parametrize("name", ["pack.json", "index.npz", "shard-00000.tar"])
def test_a_pipe_in_a_pack_does_not_hang(name: str, picture_folder: Path, tmp_path: Path) -> None:
    from repcon.commands import pack as packing
    from repcon.config import PackConfig

    packing.run(PackConfig(source=str(picture_folder), out=str(tmp_path / "pack")))
    (tmp_path / "pack" / name).unlink()
    os.mkfifo(tmp_path / "pack" / name)
    signal.alarm(20)
    with pytest.raises(UserError, match="a named pipe, not a plain file"):
        ImagePack.open(tmp_path / "pack").read(0)
    signal.alarm(0)


def test_which_errors_pass() -> None:
    for number in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO, errno.ENOSPC, errno.ESTALE, errno.ETIMEDOUT):
        assert is_transient(OSError(number, os.strerror(number)))
    for number in (errno.ENOENT, errno.EACCES, errno.ELOOP, errno.EISDIR):
        assert not is_transient(OSError(number, os.strerror(number)))
    assert (
        not is_transient(OSError("a library's own")) and error_reason(OSError("a library's own")) == "a library's own"
    )
