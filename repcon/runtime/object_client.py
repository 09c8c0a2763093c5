"""obstore's clients of a URL: limits, logins, profiles; and its errors as those of a disk."""

import errno
import functools
import os
import re
from base64 import b64encode
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

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
RETRY = {
    "max_retries": 10,  # about 7 s where connections are refused
    "backoff": {"init_backoff": timedelta(milliseconds=200), "max_backoff": timedelta(seconds=5), "base": 2},
    "retry_timeout": timedelta(seconds=30),
}
_CREDENTIALS_LIFETIME = timedelta(minutes=10)
"""After this boto3 is asked again, which renews those that expire within it."""
_MISSING = {"NoSuchBucket": "there is no such bucket", "ContainerNotFound": "there is no such container"}
_PAST_THE_END = ("416 Range Not Satisfiable", "Wanted range starting at")
"""What servers, and obstore's memory, say of a range that begins at the end of an object or later."""
_CAUSE = re.compile(r'(?:message|error): "([^"]+)"|Invalid(Certificate)\(\s*(\w+)|(TimedOut|IncompleteMessage)')
"""Why a request was lost, in Rust's representation of the error."""
_METADATA_SERVER = "169.254.169.254"
"""Where obstore asks for a machine's own credentials when it was given none."""


def with_login(url: str) -> tuple[str, dict[str, str]]:
    """A web server's URL without the name and password before the server, and the header in which they are sent."""
    parts = urlsplit(url)
    user, _, server = parts.netloc.rpartition("@")
    login = {"Authorization": f"Basic {b64encode(unquote(user).encode()).decode()}"} if user else {}
    return parts._replace(netloc=server).geturl(), login


def open_client(url: str, retry: dict[str, Any] = RETRY) -> tuple[Any, str]:
    """The obstore of a URL's server and bucket, and the path in it. retry: obstore's `retry_config`.

    Raises UserError where the scheme is none of `SCHEMES`, the URL is a chain of several, or is malformed.
    """
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
            server, login = with_login(url)
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


def os_error(error: Exception, url: str) -> OSError:
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
