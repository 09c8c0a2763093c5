import errno
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest

from repcon.images.files import files_below
from repcon.runtime.errors import UserError
from repcon.runtime.filesystem import open_files


@pytest.fixture(params=["path", "file", "local", "memory"])
def files(request, tmp_path):
    places = {"path": tmp_path / "root", "file": f"file://{tmp_path}/root", "local": f"local://{tmp_path}/root"}
    return open_files(str(places.get(request.param, f"memory://{tmp_path.name}")))


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
    assert files.part("a/b", 3, 4) == b"3456" and files.part("a/b", 8, 100) == b"89"
    files.write("a/b", b"other")
    assert files.part("a/b", 0, 3) == b"oth"
    files.delete("a/b")
    with pytest.raises(FileNotFoundError):
        files.part("a/b", 0, 3)


def test_few_files_stay_open_and_none_after_the_last_use(tmp_path, monkeypatch):
    monkeypatch.setattr("repcon.runtime.open_files.MOST", 3)
    files = open_files(str(tmp_path))
    before = len(os.listdir("/proc/self/fd"))
    for name in "abcde":
        files.write(name, name.encode())
        assert files.part(name, 0, 1) == name.encode()
    for name in "abcde":
        assert files.part(name, 0, 1) == name.encode()
    assert len(os.listdir("/proc/self/fd")) == before + 3
    del files
    assert len(os.listdir("/proc/self/fd")) == before


def test_listing_and_deleting(files):
    files.write("a/one", b"1")
    files.write("a/two", b"2")
    assert files.names("a") == ["one", "two"] and files.names("") == ["a"]
    files.delete("a/one")
    files.delete("a/one")
    assert files.names("a") == ["two"] and files.size("a/one") is None and files.names("nothing") == []
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
            open_files(str(root)).read(name)


def test_a_root_that_is_itself_a_link_is_fine(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "root").symlink_to(tmp_path / "disk")
    files = open_files(str(tmp_path / "root"))
    files.write("a", b"1")
    assert files.read("a") == b"1"


def test_an_unknown_protocol_is_the_users_mistake():
    with pytest.raises(UserError, match="nonsense"):
        open_files("nonsense://bucket/x")


@pytest.mark.parametrize(
    "url",
    [
        "reference::http://127.0.0.1:9/x.json", "simplecache::memory://x", "memory://x::file://y", "zip://a::memory://b",
        "reference:///tmp/x.json", "cached://x", "dir://x", "ftp://127.0.0.1:9/x", "sftp://h/x", "github://a:b@main/",
        "data://x", "libarchive://x", "jupyter://h/x", "S3://bucket/x", "filecache://x", "generic://x", "::memory://x",
    ],
)  # fmt: skip
def test_chained_and_other_protocols_are_refused_before_they_are_made(url, monkeypatch):
    import fsspec

    monkeypatch.setattr(fsspec, "url_to_fs", lambda *_, **__: pytest.fail("made"))
    with pytest.raises(UserError, match="not opened"):
        open_files(url)
    with pytest.raises(UserError, match="not opened"):
        files_below(url)


def test_writers_of_the_same_file_leave_one_of_the_contents(tmp_path):
    files = open_files(str(tmp_path / "root"))
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: files.write("a/b", bytes([i]) * 100_000), range(40)))
    assert len(set(files.read("a/b"))) == 1 and len(files.read("a/b")) == 100_000
    assert os.listdir(tmp_path / "root" / "a") == ["b"]


def test_sweep_takes_what_the_dead_left_and_nothing_of_the_living(tmp_path):
    files = open_files(str(tmp_path))
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / ".left.0.tmp").write_bytes(b"half")
    holder = "import fcntl,sys; f=open(sys.argv[1],'wb'); fcntl.flock(f, 2); print(flush=True); sys.stdin.read()"
    command = ["python3", "-c", holder, str(tmp_path / "a" / ".alive.0.tmp")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as living:
        assert living.stdout is not None
        living.stdout.readline()
        files.sweep()
        assert os.listdir(tmp_path / "a") == [".alive.0.tmp"]
        living.kill()
    files.sweep()
    assert os.listdir(tmp_path / "a") == []


def test_a_full_disk_is_told_and_leaves_the_old_file(tmp_path, monkeypatch):
    files = open_files(str(tmp_path))
    files.write("a", b"old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="disk is full"):
        files.write("a", b"new")
    assert files.read("a") == b"old" and os.listdir(tmp_path) == ["a"]
