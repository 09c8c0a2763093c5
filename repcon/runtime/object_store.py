"""Objects below a URL, by obstore: reads by range, lists, conditional writes. Every failure is an OSError."""

import contextlib
import errno
import functools
import html
import os
import re
import threading
import urllib.request
from base64 import b64encode
from collections.abc import Callable
from concurrent.futures import Future
from datetime import timedelta
from http.client import HTTPException
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar
from urllib.error import HTTPError
from urllib.parse import quote, unquote, urljoin, urlsplit

from repcon.runtime.errors import UserError
from repcon.runtime.extras import require_extra

SCHEMES = ("file", "local", "memory", "http", "https", "s3", "s3a", "gs", "gcs", "abfs", "abfss", "az")
"""The schemes that are opened; the first two are those of local folders."""

_CLIENT = {
    "allow_http": True,  # for an endpoint whose URL says http://
    "connect_timeout": timedelta(seconds=5),
    "read_timeout": timedelta(seconds=60),  # without any answer; a part that is uploaded is answered at its end
    "timeout": timedelta(minutes=10),
}
_RETRY = {
    "max_retries": 10,  # about 7 s where connections are refused
    "backoff": {"init_backoff": timedelta(milliseconds=200), "max_backoff": timedelta(seconds=5), "base": 2},
    "retry_timeout": timedelta(seconds=30),
}
_PARALLEL_PARTS = 4
"""Parts of 5 MB that are uploaded at a time: over 3 Mbit/s they are answered within the read timeout."""
_CREDENTIALS_LIFETIME = timedelta(minutes=10)
"""After this boto3 is asked again, which renews those that expire within it."""
_MISSING = {"NoSuchBucket": "there is no such bucket", "ContainerNotFound": "there is no such container"}
_PAST_THE_END = ("416 Range Not Satisfiable", "Wanted range starting at")
"""What servers, and obstore's memory, say of a range that begins at the end of an object or later."""
_CAUSE = re.compile(r'(?:message|error): "([^"]+)"|Invalid(Certificate)\(\s*(\w+)|(TimedOut|IncompleteMessage)')
"""Why a request was lost, in Rust's representation of the error."""
_NOT_IMPLEMENTED = "501 Not Implemented"
"""How S3 servers without conditional writes answer one."""
_METADATA_SERVER = "169.254.169.254"
"""Where obstore asks for a machine's own credentials when it was given none."""

Found = TypeVar("Found")


class ObjectStore:
    """Objects below a URL; their names are relative and use `/`. Thread-safe. Raises OSError that names the URL.

    Forked processes cannot use it, nor open another, once their parent has: obstore's threads are not forked.
    """

    def __init__(self, url: str) -> None:
        """Raises UserError where the scheme is none of `SCHEMES`, the URL is a chain of several, or is malformed."""
        self.url = url
        self._is_http = url.startswith(("http://", "https://"))
        self._store, self._root = _open(url)

    def read(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        """Bytes [start, start + length), fewer at the end of the object. Raises FileNotFoundError."""
        if length == 0:
            return b""
        options = None
        if start or length is not None:
            options = {"range": {"offset": start} if length is None else (start, start + length)}
        try:
            return self._call(name, lambda path: self._store.get(path, options=options).bytes().to_bytes())
        except OSError as error:
            if error.errno == errno.ERANGE:
                return b""
            raise

    def size(self, name: str) -> int | None:
        """Bytes of the object, None where there is none."""
        try:
            return int(self._call(name, self._store.head)["size"])
        except FileNotFoundError:
            return None

    def list_names(self, folder: str) -> list[str]:
        """Names directly in the folder, sorted; none where there is no such folder. Raises where there is no bucket."""
        if self._is_http:
            return self._linked_names(folder)
        found = self._call(folder, lambda path: self._store.list_with_delimiter(path or None))
        paths = [*found["common_prefixes"], *(entry["path"] for entry in found["objects"])]
        start = self._path(folder) + "/" if self._path(folder) else ""
        # An object of the folder's own name marks an empty folder.
        return sorted(path.removeprefix(start) for path in paths if path.startswith(start))

    def write(self, name: str, data: bytes) -> None:
        """Writes the object whole, in place of an earlier one."""
        self._call(name, lambda path: self._store.put(path, data, max_concurrency=_PARALLEL_PARTS))

    def create(self, name: str, data: bytes) -> bool:
        """Writes the object; False where it exists. Atomic where the store has conditional writes (S3 has).

        False also where the answer to its own write was lost and the request repeated: `read` tells.
        """
        try:
            self._put_if(name, data, "create")
            return True
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno != errno.ENOTSUP:
                raise
        if self.size(name) is not None:
            return False
        self.write(name, data)
        return self.read(name) == data  # another may have done the same

    def replace(self, name: str, old: bytes, new: bytes) -> bool:
        """Writes `new` over the content `old`; False where the content is another by then. Atomic as `create`."""
        try:
            content, meta = self._call(name, self._content)
            if content != old:
                return False
            if version := {key: meta[key] for key in ("e_tag", "version") if meta[key]}:
                self._put_if(name, new, version)
                return True
        except (FileNotFoundError, FileExistsError):
            return False
        except OSError as error:
            if error.errno != errno.ENOTSUP:
                raise
        self.delete(name)
        return self.create(name, new)

    def delete(self, name: str) -> None:
        """Deletes the object if it is there."""
        with contextlib.suppress(FileNotFoundError):
            self._call(name, self._store.delete)

    def _put_if(self, name: str, data: bytes, mode: Any) -> None:
        """A conditional write. Raises FileExistsError where the condition fails.

        The first request is sent without obstore's retries, which would repeat one that the server does not implement.
        """
        try:
            self._call(name, lambda path: self._without_retries.put(path, data, mode=mode))
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            if _NOT_IMPLEMENTED in str(error):
                reason = "the server has no conditional writes: set AWS_CONDITIONAL_PUT=disabled"
                raise OSError(errno.ENOSYS, f"{reason} ({_NOT_IMPLEMENTED})", f"{self.url}/{name}") from error
            self._call(name, lambda path: self._store.put(path, data, mode=mode))

    @functools.cached_property
    def _without_retries(self) -> Any:
        return _open(self.url, _RETRY | {"max_retries": 0})[0]

    def _content(self, path: str) -> tuple[bytes, Any]:
        """The bytes of an object and what the server says of it."""
        found = self._store.get(path)
        return found.bytes().to_bytes(), found.meta

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}".strip("/") if name else self._root

    def _call(self, name: str, method: Callable[[str], Found]) -> Found:
        from obstore.exceptions import BaseError

        _require_same_process(self.url)
        try:
            return _interruptible(lambda: method(self._path(name)))
        except (BaseError, OSError, ValueError, NotImplementedError) as error:
            raise _os_error(error, f"{self.url}/{name}") from error

    def _linked_names(self, folder: str) -> list[str]:
        """The names that a web server's page of the folder links to, as nginx, Apache and Python's http.server do."""
        base = f"{self.url.rstrip('/')}/{folder}".rstrip("/") + "/"
        try:
            place, login = _with_login(quote(base, safe=":/%[]@"))
            with urllib.request.urlopen(urllib.request.Request(place, headers=login), timeout=60) as page:
                text = page.read().decode("utf-8", "replace")
        except (OSError, HTTPException, ValueError) as error:
            if isinstance(error, HTTPError) and error.code in (404, 410):
                return []
            raise OSError(errno.EIO, f"the server gives no list of files ({error})", base) from error
        links = (unquote(urljoin(base, html.unescape(link))) for link in re.findall(r'href="([^"?#]+)"', text))
        names = {link.removeprefix(unquote(base)).rstrip("/") for link in links if link.startswith(unquote(base))}
        return sorted(name for name in names if name and "/" not in name)


def _interruptible(act: Callable[[], Found]) -> Found:
    """Acts in another thread than the main one, which would not see Ctrl-C until obstore returned, after a minute."""
    if threading.current_thread() is not threading.main_thread():
        return act()
    done: Future[Found] = Future()

    def run() -> None:
        try:
            done.set_result(act())
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=run, name="repcon-objects", daemon=True).start()
    return done.result()


def _with_login(url: str) -> tuple[str, dict[str, str]]:
    """A web server's URL without the name and password before the server, and the header in which they are sent."""
    parts = urlsplit(url)
    user, _, server = parts.netloc.rpartition("@")
    login = {"Authorization": f"Basic {b64encode(unquote(user).encode()).decode()}"} if user else {}
    return parts._replace(netloc=server).geturl(), login


def _open(url: str, retry: dict[str, Any] = _RETRY) -> tuple[Any, str]:
    """The obstore of a URL's server and bucket, and the path in it."""
    scheme, _, place = url.partition("://")
    if "::" in url or scheme not in SCHEMES[2:]:
        what = "chains of URLs" if "::" in url else f"{scheme} URLs"
        raise UserError(f"{url}: {what} are not opened, only {', '.join(SCHEMES)}; copy it to a local folder")
    if scheme == "memory":
        return _memory(), place.strip("/")
    bucket, _, root = place.partition("/")
    if not bucket:
        raise UserError(f"{url}: names no bucket or server; write {scheme}://NAME/FOLDER")
    from obstore import store
    from obstore.exceptions import BaseError

    options: dict[str, Any] = {"client_options": _CLIENT, "retry_config": retry}
    try:
        if scheme in ("http", "https"):
            server, login = _with_login(url)
            options["client_options"] = _CLIENT | {"default_headers": login}
            return store.HTTPStore.from_url(server, **options), ""
        if scheme in ("s3", "s3a"):
            return store.S3Store(bucket, **options | _s3_options()), root.strip("/")
        if scheme in ("gs", "gcs"):
            return store.GCSStore(bucket, **options), root.strip("/")
        return store.AzureStore.from_url(f"{scheme}://{bucket}", **options), root.strip("/")
    except (BaseError, OSError, ValueError) as error:
        raise UserError(f"{url}: {_reason(error)}") from error


@functools.cache
def _memory() -> Any:
    """The objects below `memory://`, which all users of this process share."""
    from obstore.store import MemoryStore

    return MemoryStore()


def _s3_options() -> dict[str, Any]:
    """What obstore does not read itself: AWS_CA_BUNDLE, and the profile in ~/.aws where boto3 is installed."""
    options: dict[str, Any] = {"disable_bulk_delete": True}  # which some servers lack
    if bundle := os.environ.get("AWS_CA_BUNDLE"):
        options["client_options"] = _CLIENT | {"root_certificate": Path(bundle).read_bytes()}
    if "AWS_PROFILE" in os.environ:
        require_extra("s3", ("boto3",), "AWS_PROFILE")
    files = (("AWS_CONFIG_FILE", "~/.aws/config"), ("AWS_SHARED_CREDENTIALS_FILE", "~/.aws/credentials"))
    versions = [_version(Path(os.environ.get(name, usual)).expanduser()) for name, usual in files]
    if find_spec("boto3") and any(versions):
        variables = sorted(item for item in os.environ.items() if item[0].startswith("AWS_"))
        key = (*variables, *versions)
        if key not in _profiles:
            _profiles[key] = _read_profile()
        options |= _profiles[key]
    return options


_profiles: dict[tuple[Any, ...], dict[str, Any]] = {}
"""What boto3 found, which takes it 0.1 s, by all that it reads: written anew, a file gives its new credentials."""


def _version(path: Path) -> tuple[str, int, int] | None:
    """What changes with the file's content; None where there is no file."""
    try:
        status = path.stat()
    except OSError:
        return None
    return str(path), status.st_mtime_ns, status.st_size


def _read_profile() -> dict[str, Any]:
    """Endpoint, region and credentials by boto3: those of the environment come before the profile's.

    Credentials that expire are renewed by boto3 whenever obstore asks for them.
    """
    import boto3
    from botocore.exceptions import BotoCoreError
    from obstore.auth.boto3 import Boto3CredentialProvider

    try:
        session = boto3.Session()
        region = os.environ.get("AWS_REGION") or session.region_name
        found = {"region": region} if region else {}
        found["endpoint"] = session.client("s3", region_name=region).meta.endpoint_url
        if session.get_credentials() is not None:
            found["credential_provider"] = Boto3CredentialProvider(session, ttl=_CREDENTIALS_LIFETIME)
    except BotoCoreError as error:
        raise UserError(f"~/.aws: {error}") from error
    return found


_user_process: int | None = None
"""The process that has started obstore's threads: this one, or the one that it was forked from."""


def _require_same_process(url: str) -> None:
    """Raises UserError in a forked process, in which a request would wait for ever."""
    global _user_process
    if _user_process is None:
        _user_process = os.getpid()
    elif _user_process != os.getpid():
        raise UserError(
            f"{url}: the process was forked from one that reads URLs, and cannot; start processes by spawn, "
            'those of a PyTorch DataLoader with multiprocessing_context="spawn"'
        )


def _os_error(error: Exception, url: str) -> OSError:
    """obstore's error as the OSError that a disk would give."""
    from obstore import exceptions

    reason = _reason(error)
    missing = next((words for code, words in _MISSING.items() if code in reason), None)
    if missing or isinstance(error, FileNotFoundError):
        return OSError(errno.ENOENT, missing or "there is no such object", url)
    if any(words in reason for words in _PAST_THE_END):
        return OSError(errno.ERANGE, reason, url)
    if _METADATA_SERVER in reason:
        reason = (
            "there are no credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or their counterparts; for a "
            "public bucket AWS_SKIP_SIGNATURE=true, GOOGLE_SKIP_SIGNATURE=true or AZURE_SKIP_SIGNATURE=true; for a "
            f"profile of ~/.aws pip install 'repcon[s3]' ({reason})"
        )
    codes = (
        ((exceptions.AlreadyExistsError, exceptions.PreconditionError), errno.EEXIST),
        ((exceptions.PermissionDeniedError, exceptions.UnauthenticatedError), errno.EACCES),
        ((exceptions.NotSupportedError, NotImplementedError), errno.ENOTSUP),
        ((exceptions.InvalidPathError, ValueError), errno.EINVAL),
    )
    return OSError(next((code for kinds, code in codes if isinstance(error, kinds)), errno.EIO), reason, url)


def _reason(error: Exception) -> str:
    """obstore's message on one line, with the cause of a lost request, without Rust, XML and HTML."""
    text, _, debug = str(error).partition("\n\nDebug source")
    text = re.sub(r"<\?xml.*?<Code>(.*?)</Code>.*?<Message>(.*?)</Message>.*", r"\1, \2", text, flags=re.DOTALL)
    text = re.sub(r":?\s*<(!doctype|html|\?xml).*", "", text, flags=re.DOTALL | re.IGNORECASE)
    if "error sending request" in text and (causes := _CAUSE.findall(debug)):
        text += f" ({' '.join(filter(None, causes[-1]))})"
    return " ".join(text.split())
