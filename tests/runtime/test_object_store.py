"""Objects below URLs: the contract of each kind of server, errors as a disk gives them, credentials, processes."""

import errno
import http.server
import multiprocessing
import os
import re
import signal
import socket
import sys
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import ClassVar

import object_servers
import pytest

from repcon.runtime import object_client
from repcon.runtime.errors import UserError
from repcon.runtime.filesystem import open_filesystem
from repcon.runtime.object_store import ObjectStore

pytest.importorskip("moto.server")


@pytest.fixture(scope="module")
def server():
    with object_servers.s3_server() as url:
        object_servers.s3_client().create_bucket(Bucket="objects")
        yield url


@pytest.fixture(params=["memory", "s3"])
def objects(request, server):
    name = uuid.uuid4().hex
    return ObjectStore(f"memory://{name}/a b" if request.param == "memory" else f"s3://objects/{name}/a b")


def test_ranges_past_the_end_and_empty_objects(objects):
    objects.write("x/y", b"0123456789")
    objects.write("empty", b"")
    ranges = [(0, 10), (0, 11), (2, 3), (8, 50), (10, 5), (50, 5), (3, 0), (7, None), (10, None)]
    for start, length in ranges:
        assert objects.read("x/y", start, length) == b"0123456789"[start : None if length is None else start + length]
    assert objects.read("empty") == objects.read("empty", 0, 5) == b"" and objects.size("empty") == 0


def test_what_is_not_there(objects):
    for act in (lambda: objects.read("x"), lambda: objects.read("x", 5, 5)):
        with pytest.raises(FileNotFoundError, match="there is no such object") as caught:
            act()
        assert caught.value.errno == errno.ENOENT and caught.value.filename == f"{objects.url}/x"
    assert objects.size("x") is None and objects.list_names("x") == objects.list_names("") == []
    objects.delete("x")


def test_lists_have_files_and_folders_and_not_the_folders_own_mark(objects):
    for name in ("b/c/d", "b/z", "bb/x", "b/é %41", "a"):
        objects.write(name, b"1")
    assert objects.list_names("") == ["a", "b", "bb"] and objects.list_names("b") == ["c", "z", "é %41"]
    if objects.url.startswith("s3"):
        key = objects.url.removeprefix("s3://objects/")
        object_servers.s3_client().put_object(Bucket="objects", Key=f"{key}/empty/", Body=b"")
        assert objects.list_names("empty") == []


def test_only_one_creates_and_only_one_replaces(objects):
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda i: objects.create("claim", b"%d" % i), range(8)))
        assert sum(made) == 1 and objects.read("claim") == b"%d" % made.index(True)
        old = objects.read("claim")
        put = list(pool.map(lambda i: objects.replace("claim", old, b"new %d" % i), range(8)))
    assert sum(put) == 1 and objects.read("claim") == b"new %d" % put.index(True)
    assert not objects.replace("claim", b"other", b"x") and not objects.replace("nothing", b"", b"x")


def test_a_server_without_conditional_writes_has_claims_all_the_same(server, monkeypatch):
    monkeypatch.setenv("AWS_CONDITIONAL_PUT", "disabled")
    objects = ObjectStore(f"s3://objects/{uuid.uuid4().hex}")
    assert objects.create("claim", b"1") and not objects.create("claim", b"2")
    assert not objects.replace("claim", b"2", b"3") and objects.replace("claim", b"1", b"3")
    assert objects.read("claim") == b"3"


class _NoConditions(http.server.BaseHTTPRequestHandler):
    """An S3 server that refuses conditional writes, with an object at every other request."""

    asked: ClassVar[list[str]] = []

    def log_message(self, *_: object) -> None:
        pass

    def do_PUT(self) -> None:
        self.asked.append(self.headers.get("If-None-Match") or self.headers.get("If-Match", ""))
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_error(501)

    def do_GET(self) -> None:
        self.send_response(200)
        for name, value in (("Content-Length", "1"), ("ETag", '"e"'), ("Last-Modified", self.date_time_string())):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(b"1")


def test_a_server_that_refuses_conditional_writes_is_asked_once(server, monkeypatch):
    _NoConditions.asked.clear()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _NoConditions) as refusing:
        threading.Thread(target=refusing.serve_forever, daemon=True).start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{refusing.server_port}")
        objects = ObjectStore("s3://objects")
        for act in (lambda: objects.create("x", b"2"), lambda: objects.replace("x", b"1", b"2")):
            with pytest.raises(OSError, match="has no conditional writes: set AWS_CONDITIONAL_PUT=disabled") as caught:
                act()
            assert caught.value.errno == errno.ENOSYS and caught.value.filename == "s3://objects/x"
        refusing.shutdown()
    assert _NoConditions.asked == ["*", '"e"']


def test_a_conditional_write_is_repeated_where_its_request_is_lost(objects, monkeypatch):
    def lost(*_, **__):
        from obstore.exceptions import GenericError

        raise GenericError("the connection broke off")

    monkeypatch.setattr(objects, "_without_retries", type("Losing", (), {"put": lost})())
    assert objects.create("claim", b"1") and objects.replace("claim", b"1", b"2") and objects.read("claim") == b"2"


def test_a_missing_bucket_is_named_as_such(server):
    objects = ObjectStore("s3://missing-bucket/folder")
    for act in (lambda: objects.read("x"), lambda: objects.write("x", b""), lambda: objects.create("x", b"")):
        with pytest.raises(FileNotFoundError, match="there is no such bucket"):
            act()
    assert objects.size("x") is None and open_filesystem(objects.url).list_names("") == []
    with pytest.raises(UserError, match=r"s3://missing-bucket/folder/x: cannot write \(there is no such bucket"):
        open_filesystem("s3://missing-bucket/folder").write("x", b"")


@pytest.mark.parametrize("url", ["s3://", "gs:///folder", "az://container", "http://"])
def test_urls_that_name_too_little_are_the_users_mistake(url, monkeypatch):
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_NAME", raising=False)
    with pytest.raises(UserError, match=re.escape(url)):
        ObjectStore(url)


def test_schemes_without_a_server_here_are_opened(monkeypatch):
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
    for url in ("s3a://Old_Bucket/x", "gs://b/x", "gcs://b/x", "az://c/x", "abfs://c@account.dfs.core.windows.net/x"):
        assert ObjectStore(url).url == url


def test_a_refused_connection_names_the_server_soon(monkeypatch):
    monkeypatch.setitem(object_client.RETRY, "max_retries", 1)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    with pytest.raises(OSError, match="error sending request") as caught:
        ObjectStore("s3://bucket").read("x")
    assert "http://127.0.0.1:9/bucket/x" in str(caught.value) and caught.value.errno == errno.EIO
    assert "error sending request (Connection refused)" in str(caught.value)
    with pytest.raises(OSError, match=r"gives no list of files .*refused.*: 'http://127\.0\.0\.1:9/x/'"):
        ObjectStore("http://127.0.0.1:9/x").list_names("")


@pytest.mark.timeout(60)
def test_a_server_that_never_answers_is_not_waited_for_long(monkeypatch):
    monkeypatch.setitem(object_client._CLIENT, "read_timeout", timedelta(seconds=0.2))
    monkeypatch.setitem(object_client.RETRY, "retry_timeout", timedelta(seconds=1))
    with socket.create_server(("127.0.0.1", 0)) as silent:
        started = time.monotonic()
        with pytest.raises(OSError, match=r"error sending request \(TimedOut\)"):
            ObjectStore(f"http://127.0.0.1:{silent.getsockname()[1]}").read("x")
    assert time.monotonic() - started < 15


def test_ctrl_c_is_not_held_up_by_a_server_that_never_answers():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
        started = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            ObjectStore(f"http://127.0.0.1:{silent.getsockname()[1]}").read("x")
    assert time.monotonic() - started < 15


def test_an_answer_that_breaks_off_is_an_oserror(server, monkeypatch):
    def breaks(*_):
        from obstore.exceptions import GenericError

        raise GenericError("the connection broke off")

    objects = ObjectStore(f"s3://objects/{uuid.uuid4().hex}")
    answer = type("Answer", (), {"bytes": breaks, "meta": {}})()
    monkeypatch.setattr(objects, "_store", type("Breaking", (), {"get": lambda *_, **__: answer})())
    for act in (lambda: objects.read("x"), lambda: objects.replace("x", b"", b"")):
        with pytest.raises(OSError, match="broke off"):
            act()


def test_an_unknown_certificate_is_named():
    debug = "InvalidCertificate(\n        UnknownIssuer,\n    )"
    error = Exception(f"HTTP error: error sending request\n\nDebug source:\n{debug}")
    assert object_client._reason(error) == "HTTP error: error sending request (Certificate UnknownIssuer)"


def test_errors_are_one_line_without_xml(server, monkeypatch):
    def refused(*_, **__):
        from obstore.exceptions import PermissionDeniedError

        raise PermissionDeniedError(
            "403 Forbidden: <?xml version='1.0'?>\n<Error><Code>AccessDenied</Code><Message>Access\nDenied</Message>"
            "<RequestId>1</RequestId></Error>\n\nDebug source:\nPermissionDenied {}"
        )

    objects = ObjectStore("s3://objects")
    monkeypatch.setattr(objects, "_store", type("Refusing", (), {"head": refused})())
    with pytest.raises(PermissionError, match=r"\] 403 Forbidden: AccessDenied, Access Denied: 's3://objects/x'$"):
        objects.size("x")


def test_profiles_give_endpoint_region_and_credentials(server, tmp_path, monkeypatch):
    for name in ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name)
    (tmp_path / "config").write_text(f"[profile other]\nregion = eu-west-3\nendpoint_url = {server}\n")
    (tmp_path / "credentials").write_text("[other]\naws_access_key_id = a\naws_secret_access_key = b\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_PROFILE", "other")
    objects = ObjectStore(f"s3://objects/{uuid.uuid4().hex}")
    objects.write("x", b"1")
    assert objects.read("x") == b"1" and objects._store.config["region"] == "eu-west-3"
    monkeypatch.setenv("AWS_PROFILE", "none")
    with pytest.raises(UserError, match="none"):
        ObjectStore("s3://objects")


def test_a_profile_is_read_once_until_its_files_or_the_environment_change(tmp_path, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    times, read = [], object_client._read_profile
    monkeypatch.setattr(object_client, "_read_profile", lambda: times.append(1) or read())

    def write(key: str) -> None:
        text = "[{}]\naws_access_key_id = {}\naws_secret_access_key = b\n"
        (tmp_path / "credentials").write_text(text.format("default", key) + text.format("other", "o"))

    def key() -> str:
        return ObjectStore("s3://objects")._store.credential_provider()["access_key_id"]

    write("a")
    assert (key(), key(), len(times)) == ("a", "a", 1)
    write("renewed")
    assert (key(), key(), len(times)) == ("renewed", "renewed", 2)
    monkeypatch.setenv("AWS_PROFILE", "other")
    assert (key(), key(), len(times)) == ("o", "o", 3)


def test_a_profile_without_boto3_names_the_extra(monkeypatch):
    monkeypatch.setenv("AWS_PROFILE", "other")
    monkeypatch.setattr("repcon.runtime.extras.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"AWS_PROFILE needs boto3: pip install 'repcon\[s3\]'"):
        ObjectStore("s3://objects")


def test_a_forked_process_is_told_and_a_spawned_one_reads(server):
    objects = ObjectStore(f"s3://objects/{uuid.uuid4().hex}")
    objects.write("x", b"1")
    with pytest.raises(UserError, match="forked from one that reads URLs"):
        _run("fork", objects.url)
    assert _run("spawn", objects.url) == b"1"


def _run(start_method: str, url: str) -> bytes:
    with multiprocessing.get_context(start_method).Pool(1) as pool:
        return pool.apply(_read, (url,))


def _read(url: str) -> bytes:
    return ObjectStore(url).read("x")


def test_a_web_servers_folder_is_read_and_listed(tmp_path, monkeypatch):
    monkeypatch.setitem(object_client.RETRY, "max_retries", 0)
    folder = tmp_path / "a b" / "c"
    folder.mkdir(parents=True)
    (folder / "x").write_bytes(b"0123456789")
    (folder / "empty").touch()
    (folder / "d & e").mkdir()
    with object_servers.web_server(tmp_path) as url:
        for place in ("a b", "a%20b/"):
            objects = ObjectStore(f"{url}/{place}")
            assert objects.list_names("c") == ["d & e", "empty", "x"] and objects.list_names("") == ["c"]
            assert objects.list_names("nothing") == objects.list_names("c/d & e") == []
            assert objects.read("c/x") == b"0123456789" and objects.read("c/x", 3, 4) == b"3456"
            assert objects.read("c/x", 8, 9) == b"89" and objects.read("c/x", 10, 9) == b""
            assert objects.read("c/empty", 0, 9) == b"" and objects.size("c/x") == 10 and objects.size("c/y") is None
            with pytest.raises(FileNotFoundError):
                objects.read("c/y")
            with pytest.raises(UserError, match="c/x: cannot write"):
                open_filesystem(objects.url).write("c/x", b"")


def test_a_name_and_password_in_a_url_are_sent_to_a_web_server(tmp_path):
    (tmp_path / "x").write_bytes(b"1")
    with object_servers.web_server(tmp_path, user="me:a b") as url:
        objects = ObjectStore(url.replace("://", "://me:a%20b@"))
        assert objects.list_names("") == ["x"] and objects.read("x") == b"1"
        with pytest.raises(OSError, match=r"gives no list of files .*401"):
            ObjectStore(url).list_names("")


def test_nothing_of_obstore_is_imported_for_local_files(tmp_path):
    code = f"import sys; from repcon.runtime.filesystem import open_filesystem; open_filesystem({str(tmp_path)!r})"
    code += "; sys.exit('obstore' in sys.modules or 'boto3' in sys.modules)"
    assert os.spawnl(os.P_WAIT, sys.executable, sys.executable, "-c", code) == 0
