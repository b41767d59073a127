"""Object stores by way of obstore: S3 and compatible servers, Google Cloud Storage, Azure.

Credentials, region and endpoint come from ``options`` or from the environment variables of each
platform's own tools (``AWS_ACCESS_KEY_ID``, ``AWS_ENDPOINT_URL``, …). Profiles of ``~/.aws`` are
read if boto3 is installed. Until a server has answered once, a failure is raised within seconds,
because the address may be wrong; afterwards, requests are retried for minutes.

The errors of obstore hold the request, its retries and a tree of causes. Messages of this module
show only the cause and how to correct it, and no secrets.

Example::

    remote = object_remote("s3://bucket/run", region="eu-central-1")
    describe_error(error)               # "connection refused by http://127.0.0.1:9000"
    suggest_fix("s3", error)            # "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, …"
"""

from __future__ import annotations

import contextlib
import datetime
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

from msft_store.errors import InvalidInputError, StorageError
from msft_store.remote.transport.base import (
    PART_BYTES,
    ConnectionLostError,
    PartReader,
    check_length,
    filter_folder,
    redact_url,
)

_MAX_PARTS = 9000
"""Maximal number of parts of one file. S3 takes up to 10,000."""
_PARALLEL_PARTS = 2
"""Number of parts of one file that are sent at the same time. With ``workers`` files, about 100 MB
are in memory.
"""
_IMPATIENT = {"timeout": "10s", "connect_timeout": "5s"}
"""Options of requests before the first answer: a wrong address must be reported soon."""
_PATIENT = {"timeout": "300s", "connect_timeout": "5s"}
"""Options of later requests: a slow connection may take minutes for the parts that are sent at the
same time.
"""
_ENDPOINT_OPTIONS = ("endpoint", "endpoint_url", "aws_endpoint", "aws_endpoint_url")
_ENVIRONMENT = ("AWS_ENDPOINT", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3")
_CREDENTIALS = ("access_key_id", "credential_provider", "skip_signature")
_CREDENTIALS_ENVIRONMENT = ("AWS_ACCESS_KEY_ID", "AWS_SKIP_SIGNATURE")
"""Settings that decide whose credentials are used."""
SCHEMES = ("s3", "s3a", "gs", "az", "adl", "azure", "abfs", "abfss", "http", "https")
_XML = re.compile(r"<Code>([^<]*)</Code>.*?<Message>([^<]*)</Message>", re.DOTALL)
_STATUS = re.compile(r"status code: (\d+[^:\n]*)|\bstatus: (\d+)")
_PERMANENT = re.compile("501|4(?!08|09|25|29)")
"""The status codes of answers that a retry cannot change."""
_DENIED = ("401", "403")
_URL = re.compile(r"https?://\S+")
_ORIGIN = re.compile(r"https?://[^/\s,]+")
_NOISE = re.compile(
    r"^Generic \w+ error: |Error performing \w+ \S+ in \S+(, after .*?retry_timeout: \S+)? +- "
)
_CAUSES = (
    ("ConnectionRefused", "connection refused by {}"),
    ("dns error", "no such host: {}"),
    ("kind: Timeout", "no answer in time from {}"),
    ("TimedOut", "no answer in time from {}"),
    ("InvalidContentType", "{} does not support TLS: does the address begin with http://?"),
    ("Certificate", "the certificate of {} is not trusted"),
    ("kind: Connect", "no connection to {}"),
)
_WITHOUT_KEYS = ("169.254.169.254", "169.254.170.2", "token request", "session.get_credentials")
_KEYS = {
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (AWS_SKIP_SIGNATURE=true for a public "
    "bucket)",
    "gs": "set GOOGLE_APPLICATION_CREDENTIALS to the file of a service account's key",
    "az": "set AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
}


def find_status(error: Exception) -> str:
    """Return the HTTP status that a server answered with, or ``""`` if it did not answer."""
    found = _STATUS.search(str(error))
    return "" if found is None else (found[1] or found[2])


def is_permanent(error: Exception) -> bool:
    """Return True if a retry would fail in the same way."""
    return _PERMANENT.match(find_status(error)) is not None


def describe_error(error: Exception) -> str:
    """Return the cause of a failure in one line, without secrets."""
    text = str(error)
    origin = _ORIGIN.search(text)
    where = "the server" if origin is None else redact_url(origin[0])
    xml = _XML.search(text)
    if xml is not None:
        return f"{xml[1]}: {xml[2]}"
    if lacks_credentials(error):
        return "there are no credentials"
    if find_status(error)[:3] in _DENIED:
        return f"access denied ({find_status(error)})"
    if not find_status(error):
        for sign, cause in _CAUSES:
            if sign in text:
                return cause.format(where)
    line = _NOISE.sub("", _NOISE.sub("", text.partition("\n")[0]))
    return _URL.sub(lambda url: redact_url(url[0]), line)[:300].strip().rstrip(":")


def suggest_fix(scheme: str, error: Exception) -> str:
    """Return how to correct the cause of a failure, or ``""`` if that is not known."""
    text, code, kind = str(error), find_status(error)[:3], _platform(scheme)
    if lacks_credentials(error):
        return _KEYS.get(kind, "")
    if "NoSuchBucket" in text:
        return "create the bucket first, or correct the URL"
    if "PermanentRedirect" in text or "without LOCATION" in text or code == "301":
        return "set AWS_REGION to the bucket's region"
    if code in _DENIED or "Unauthenticated" in type(error).__name__:
        return "check the credentials and their permissions to list, read and write there"
    if kind == "http" and code in {"404", "405", "501"}:
        return "the web server must support WebDAV"
    if "Account must be specified" in text:
        return "set AZURE_STORAGE_ACCOUNT_NAME"
    if not code and any(sign in text for sign, _ in _CAUSES):
        return f"check the network{' and AWS_ENDPOINT_URL' if kind == 's3' else ''}"
    return ""


def lacks_credentials(error: Exception) -> bool:
    """Return True if no credentials were found."""
    return any(sign in str(error) for sign in _WITHOUT_KEYS)


def _platform(scheme: str) -> str:
    if scheme.startswith(("s3", "gs", "http")):
        return scheme[:2] if scheme[0] != "h" else "http"
    return "az"


def import_obstore() -> Any:
    """Return the module obstore; raise :class:`StorageError` if it is not installed."""
    try:
        import obstore  # noqa: PLC0415
        import obstore.exceptions  # noqa: PLC0415
        import obstore.store  # noqa: PLC0415
    except ImportError:
        raise StorageError("object stores need obstore: pip install 'msft-store[remote]'") from None
    return obstore


def object_remote(url: str, **options: Any) -> ObjectRemote:
    """Return the remote at a URL; ``options`` are those of ``obstore.store.from_url``."""
    obstore = import_obstore()
    config = {**(options.get("config") or {}), **options}
    given = _client_options(url, config)
    errors = (obstore.exceptions.BaseError, ValueError, TypeError)
    try:
        options |= _profile(url, config)
        store, impatient = (
            obstore.store.from_url(
                url,
                **{
                    "retry_config": _retries(times, seconds),
                    **options,
                    "client_options": {**client, **given},
                },
            )
            for client, times, seconds in ((_PATIENT, 6, 60), (_IMPATIENT, 4, 10))
        )
    except errors as error:
        advice = suggest_fix(urlsplit(url).scheme, error)
        text = f"{describe_error(error)}{advice and f'; {advice}'}"
        if lacks_credentials(error):
            raise StorageError(f"cannot reach {redact_url(url)}: {text}") from None
        raise InvalidInputError(f"{redact_url(url)} cannot hold a store: {text}") from None
    return ObjectRemote(store, redact_url(url), impatient=impatient)


def _retries(times: int, seconds: int) -> dict[str, Any]:
    return {
        "max_retries": times,
        "retry_timeout": datetime.timedelta(seconds=seconds),
        "backoff": {
            "base": 2,
            "init_backoff": datetime.timedelta(milliseconds=100),
            "max_backoff": datetime.timedelta(seconds=5),
        },
    }


def _client_options(url: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the client's options; unencrypted HTTP is allowed if the URL or endpoint has it."""
    given = [str(config[name]) for name in _ENDPOINT_OPTIONS if name in config]
    given = given or [os.environ[name] for name in _ENVIRONMENT if os.environ.get(name)]
    client = config.get("client_options") or {}
    insecure = any(address.startswith("http://") for address in (url, *given))
    return {"allow_http": True, **client} if insecure else client


def _profile(url: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a reader of the profiles of ``~/.aws`` if boto3 is installed and no keys are given."""
    given = any(name.removeprefix("aws_") in _CREDENTIALS for name in map(str.lower, config))
    parts = urlsplit(url)
    if given or parts.scheme not in {"s3", "s3a"} or not parts.netloc:
        return {}
    if any(map(os.environ.get, _CREDENTIALS_ENVIRONMENT)):
        return {}
    try:
        from obstore.auth.boto3 import Boto3CredentialProvider  # noqa: PLC0415
    except ImportError:
        return {}
    try:
        provider = Boto3CredentialProvider()
    except Exception as error:
        # boto3 raises its own errors for a missing profile or an unreadable file.
        raise ValueError(error) from error
    if any(map(os.environ.get, ("AWS_REGION", "AWS_DEFAULT_REGION"))):
        provider.config = {}
    return {"credential_provider": provider}


class ObjectRemote:
    """An obstore store as a remote."""

    workers = 4

    def __init__(self, store: Any, url: str, *, impatient: Any = None) -> None:
        self._obstore = import_obstore()
        self._errors = self._obstore.exceptions
        self._patient = store
        self._impatient = impatient
        """The same store with short timeouts. It is used until the server has answered once."""
        self._url = url

    @property
    def _store(self) -> Any:
        return self._patient if self._impatient is None else self._impatient

    def describe(self, path: str) -> str:
        return f"{self._url}/{path}"

    def session(self, purpose: str) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def sizes(self, folder: str) -> dict[str, int]:
        with self._translate_errors("list", folder):
            pages = self._obstore.list(self._store, folder or None)
            return filter_folder(
                folder, [(one["path"], one["size"]) for page in pages for one in page]
            )

    def size(self, path: str) -> int | None:
        with self._translate_errors("access", path):
            try:
                return int(self._obstore.head(self._store, path)["size"])
            except FileNotFoundError:
                return None

    def read(self, path: str, offset: int, length: int) -> bytes:
        with self._translate_errors("read", path):
            data = bytes(self._obstore.get_range(self._store, path, start=offset, length=length))
        return check_length(data, length, self.describe(path))

    def read_versioned(self, path: str, most: int) -> tuple[bytes, Any] | None:
        with self._translate_errors("read", path):
            try:
                found = self._obstore.get(self._store, path)
            except FileNotFoundError:
                return None
            if found.meta["size"] > most:
                raise StorageError(f"{self.describe(path)} has more than {most} bytes")
            known = {name: found.meta[name] for name in ("e_tag", "version") if found.meta[name]}
            return bytes(found.bytes()), known

    def put(self, path: str, parts: PartReader, size: int) -> None:
        with self._translate_errors("write", path):
            if size <= PART_BYTES:
                self._obstore.put(self._store, path, b"".join(parts()), use_multipart=False)
                return
            self._obstore.put(
                self._store,
                path,
                parts(),
                chunk_size=max(PART_BYTES, size // _MAX_PARTS),
                max_concurrency=_PARALLEL_PARTS,
            )

    def create(self, path: str, data: bytes) -> bool:
        return self._conditional(path, data, "create")

    def replace(self, path: str, data: bytes, version: Any) -> bool:
        return self._conditional(path, data, version)

    def _conditional(self, path: str, data: bytes, mode: Any) -> bool:
        with self._translate_errors("write", path):
            try:
                self._obstore.put(self._store, path, data, mode=mode)
            except (self._errors.AlreadyExistsError, self._errors.PreconditionError):
                return False
            return True

    def sync(self, folder: str) -> None:
        """Do nothing, because each write is durable when it returns."""

    @contextlib.contextmanager
    def _translate_errors(self, action: str, path: str) -> Iterator[None]:
        """Raise errors of obstore as :class:`StorageError` with a short message."""
        errors = self._errors
        permanent = (
            errors.InvalidPathError,
            errors.NotSupportedError,
            errors.PermissionDeniedError,
            errors.UnauthenticatedError,
            FileNotFoundError,
            PermissionError,
            NotImplementedError,
        )
        try:
            yield
        except (errors.BaseError, OSError, NotImplementedError) as error:
            refused = (
                is_permanent(error) or isinstance(error, permanent) or self._impatient is not None
            )
            kind = StorageError if refused else ConnectionLostError
            where = self.describe(path)
            advice = suggest_fix(self._url.partition(":")[0], error)
            text = f"cannot {action} {where}: {describe_error(error)}{advice and f'; {advice}'}"
            raise kind(text, file=where) from error
        self._impatient = None
