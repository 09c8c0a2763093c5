"""Objects below a URL, by obstore: reads by range, lists, conditional writes. Every failure is an OSError."""

import contextlib
import errno
import functools
import html
import os
import re
import threading
import urllib.request
from collections.abc import Callable
from concurrent.futures import Future
from http.client import HTTPException
from typing import Any, TypeVar
from urllib.error import HTTPError
from urllib.parse import quote, unquote, urljoin

from repcon.runtime.errors import UserError
from repcon.runtime.object_client import RETRY, open_client, os_error, with_login

_PARALLEL_PARTS = 4
"""Parts of 5 MB that are uploaded at a time: over 3 Mbit/s they are answered within the read timeout."""
_NOT_IMPLEMENTED = "501 Not Implemented"
"""How S3 servers without conditional writes answer one."""

Found = TypeVar("Found")


class ObjectStore:
    """Objects below a URL; their names are relative and use `/`. Thread-safe. Raises OSError that names the URL.

    Forked processes cannot use it, nor open another, once their parent has: obstore's threads are not forked.
    """

    def __init__(self, url: str) -> None:
        """Raises UserError as `open_client`."""
        self.url = url
        self._is_http = url.startswith(("http://", "https://"))
        self._store, self._root = open_client(url)

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
        return open_client(self.url, RETRY | {"max_retries": 0})[0]

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
            raise os_error(error, f"{self.url}/{name}") from error

    def _linked_names(self, folder: str) -> list[str]:
        """The names that a web server's page of the folder links to, as nginx, Apache and Python's http.server do."""
        base = f"{self.url.rstrip('/')}/{folder}".rstrip("/") + "/"
        try:
            place, login = with_login(quote(base, safe=":/%[]@"))
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
