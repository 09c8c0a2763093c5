import errno
import fcntl
import os
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from repcon.images.pack import ImagePack
from repcon.runtime.atomic_files import fsync_folder
from repcon.runtime.errors import UserError
from repcon.runtime.filesystem import open_filesystem


@pytest.fixture(params=["path", "file", "local", "memory"])
def files(request, tmp_path):
    places = {"path": tmp_path / "root", "file": f"file://{tmp_path}/root", "local": f"local://{tmp_path}/root"}
    return open_filesystem(str(places.get(request.param, f"memory://{tmp_path.name}")))


def test_what_is_written_is_read_in_whole_and_in_part(files):
    files.write("a/b/c", b"0123456789")
    assert files.read("a/b/c") == b"0123456789"
    assert files.read("a/b/c", 3, 4) == b"3456"
    assert files.read("a/b/c", 8, 100) == b"89"
    assert files.size("a/b/c") == 10
    files.write("a/b/c", b"new")
    assert files.read("a/b/c") == b"new"


def test_a_part_is_of_what_was_written_last(files):
    files.write("a/b", b"0123456789")
    assert files.read_range("a/b", 3, 4) == b"3456" and files.read_range("a/b", 8, 100) == b"89"
    files.write("a/b", b"other")
    assert files.read_range("a/b", 0, 3) == b"oth"
    files.delete("a/b")
    with pytest.raises(FileNotFoundError):
        files.read_range("a/b", 0, 3)


def test_few_files_stay_open_and_none_after_the_last_use(tmp_path, monkeypatch):
    monkeypatch.setattr("repcon.runtime.local_files.MAX_OPEN_FILES", 3)
    files = open_filesystem(str(tmp_path))
    before = len(os.listdir("/proc/self/fd"))
    for name in "abcde":
        files.write(name, name.encode())
        assert files.read_range(name, 0, 1) == name.encode()
    for name in "abcde":
        assert files.read_range(name, 0, 1) == name.encode()
    assert len(os.listdir("/proc/self/fd")) == before + 3
    del files
    assert len(os.listdir("/proc/self/fd")) == before


def test_listing_and_deleting(files):
    files.write("a/one", b"1")
    files.write("a/two", b"2")
    assert files.list_names("a") == ["one", "two"] and files.list_names("") == ["a"]
    files.delete("a/one")
    files.delete("a/one")
    assert files.list_names("a") == ["two"] and files.size("a/one") is None and files.list_names("nothing") == []
    with pytest.raises(FileNotFoundError):
        files.read("a/one")


@pytest.mark.parametrize(
    "name", ["../x", "/etc/passwd", "a/../../x", "a//b", ".hidden", "a\nb", "a/./b", "~/x", "a\\b"]
)
def test_a_name_that_could_leave_the_root_is_refused(files, name):
    for act in (lambda: files.read(name), lambda: files.write(name, b""), lambda: files.size(name)):
        with pytest.raises(UserError, match="not one that a store may use"):
            act()


def test_a_link_out_of_the_root_is_refused(tmp_path):
    (tmp_path / "secret").write_text("s")
    root = tmp_path / "root"
    root.mkdir()
    (root / "inside").symlink_to(tmp_path / "secret")
    (root / "folder").symlink_to(tmp_path)
    for name in ("inside", "folder/secret"):
        with pytest.raises(UserError, match="leads out"):
            open_filesystem(str(root)).read(name)


def test_a_root_that_is_itself_a_link_is_fine(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "root").symlink_to(tmp_path / "disk")
    files = open_filesystem(str(tmp_path / "root"))
    files.write("a", b"1")
    assert files.read("a") == b"1"


def test_an_unknown_protocol_is_the_users_mistake():
    with pytest.raises(UserError, match="nonsense"):
        open_filesystem("nonsense://bucket/x")


@pytest.mark.parametrize(
    "url",
    [
        "reference::http://127.0.0.1:9/x.json", "simplecache::memory://x", "memory://x::file://y", "zip://a::memory://b",
        "reference:///tmp/x.json", "cached://x", "dir://x", "ftp://127.0.0.1:9/x", "sftp://h/x", "github://a:b@main/",
        "data://x", "libarchive://x", "jupyter://h/x", "S3://bucket/x", "filecache://x", "generic://x", "::memory://x",
    ],
)  # fmt: skip
def test_chained_and_other_protocols_are_refused_before_they_are_made(url, monkeypatch):
    for name in ("S3Store", "GCSStore", "AzureStore", "HTTPStore", "LocalStore", "MemoryStore"):
        monkeypatch.setattr(f"obstore.store.{name}", lambda *_, **__: pytest.fail("made"))
    with pytest.raises(UserError, match="not opened"):
        open_filesystem(url)
    with pytest.raises(UserError, match="not opened"):
        ImagePack.open(url)


def test_writers_of_the_same_file_leave_one_of_the_contents(tmp_path):
    files = open_filesystem(str(tmp_path / "root"))
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: files.write("a/b", bytes([i]) * 100_000), range(40)))
    assert len(set(files.read("a/b"))) == 1 and len(files.read("a/b")) == 100_000
    assert os.listdir(tmp_path / "root" / "a") == ["b"]


HOLDER = "import fcntl,sys; f=open(sys.argv[1],'wb'); fcntl.flock(f, 2); print(flush=True); sys.stdin.read()"
LEFT, ALIVE = (f".left.{digit * 32}.repcon.tmp" for digit in "ab")


def test_sweep_takes_what_the_dead_left_and_nothing_of_the_living(tmp_path):
    files = open_filesystem(str(tmp_path))
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / LEFT).write_bytes(b"half")
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "a" / ALIVE)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as living:
        assert living.stdout is not None
        living.stdout.readline()
        files.remove_abandoned()
        assert os.listdir(tmp_path / "a") == [ALIVE]
        living.kill()
    files.remove_abandoned()
    assert os.listdir(tmp_path / "a") == []


@pytest.mark.parametrize(
    "name",
    [".notes.tmp", ".cache/.draft.tmp", f".0.{'a' * 32}.tmp", f"0.{'a' * 32}.repcon.tmp", ".repcon.tmp", "x.tmp"],
)
def test_sweep_takes_no_file_that_another_program_made(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("precious")
    open_filesystem(str(tmp_path)).remove_abandoned()
    assert (tmp_path / name).read_text() == "precious"


def test_sweep_follows_no_link_and_waits_for_no_pipe(tmp_path):
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / LEFT).write_text("precious")
    root = tmp_path / "root"
    root.mkdir()
    (root / "folder").symlink_to(tmp_path / "outside")
    (root / ALIVE).symlink_to(tmp_path / "outside" / LEFT)
    os.mkfifo(root / LEFT)
    open_filesystem(str(root)).remove_abandoned()
    assert (tmp_path / "outside" / LEFT).read_text() == "precious"


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK])
def test_a_file_system_without_locks_is_written_to_and_swept_a_day_later(tmp_path, monkeypatch, code):
    def no_locks(*arguments):
        raise OSError(code, "no locks here")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    files = open_filesystem(str(tmp_path))
    files.write("a/b", b"1")
    assert files.read("a/b") == b"1"
    (tmp_path / LEFT).write_bytes(b"of another writer, perhaps")
    files.remove_abandoned()
    assert (tmp_path / LEFT).exists()
    os.utime(tmp_path / LEFT, (0, 0))
    files.remove_abandoned()
    assert not (tmp_path / LEFT).exists()


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP, errno.EACCES])
def test_folders_that_cannot_be_synced_are_passed_over(tmp_path, monkeypatch, code):
    def fsync(descriptor: int, really=os.fsync) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(code, "not for folders")
        really(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    files = open_filesystem(str(tmp_path))
    files.write("a/b", b"1")
    assert files.read("a/b") == b"1"


def test_a_disk_that_fails_to_sync_a_folder_is_named(tmp_path, monkeypatch):
    def fsync(descriptor: int, really=os.fsync) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EIO, "Input/output error")
        really(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError) as caught:
        fsync_folder(tmp_path)
    assert caught.value.filename == str(tmp_path)
    with pytest.raises(UserError, match=f"{tmp_path}/a/b: cannot write"):
        open_filesystem(str(tmp_path)).write("a/b", b"1")


@pytest.mark.timeout(20)
def test_a_pipe_in_a_files_place_is_an_error_and_no_wait(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    files = open_filesystem(str(tmp_path))
    for name in ("pipe", "folder"):
        for act in (files.read, lambda name: files.read_range(name, 0, 1)):
            with pytest.raises(OSError, match="not a plain file") as caught:
                act(name)
            assert caught.value.filename == str(tmp_path / name)


def test_a_full_disk_is_told_and_leaves_the_old_file(tmp_path, monkeypatch):
    files = open_filesystem(str(tmp_path))
    files.write("a", b"old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="disk is full"):
        files.write("a", b"new")
    assert files.read("a") == b"old" and os.listdir(tmp_path) == ["a"]
