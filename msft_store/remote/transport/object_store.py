"""Object stores by way of obstore: S3 and what speaks like it, Google Cloud Storage, Azure.

Credentials, region and endpoint come from the environment, under the names that each platform's own
tools know (``AWS_ACCESS_KEY_ID``, ``AWS_ENDPOINT_URL``, …), or from ``options``; the profiles of
``~/.aws`` by way of boto3, if it is installed. Until a server has answered once, a failure is told
after some seconds; from then on, requests are repeated for minutes.

Example::

    remote = object_remote("s3://bucket/run", region="eu-central-1")

What an object store's library says of a failure, as one sentence for a person.

The library's text has the request, its retries and, below it, the error as a tree. Of that only
the cause is shown, and what to do about it.

Example::

    said(error)                        # "connection refused by http://127.0.0.1:9000"
    hint("s3", error)                  # "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, …"
"""

from __future__ import annotations

import contextlib
import datetime
import os
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

from msft_store.errors import InvalidInputError, StorageError
from msft_store.remote.transport.base import PART_BYTES, ConnectionLostError, names, shown

_XML = re.compile(r"<Code>([^<]*)</Code>.*?<Message>([^<]*)</Message>", re.DOTALL)
_STATUS = re.compile(r"status code: (\d+[^:\n]*)|\bstatus: (\d+)")
_FINAL = re.compile("501|4(?!08|09|25|29)")
"""What a server answers when the same request will do no better later."""
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
    ("InvalidContentType", "{} does not speak TLS: is it http://?"),
    ("Certificate", "the certificate of {} is not trusted"),
    ("kind: Connect", "no connection to {}"),
)
_WITHOUT_KEYS = ("169.254.169.254", "169.254.170.2", "token request", "session.get_credentials")
_KEYS = {
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (AWS_SKIP_SIGNATURE=true for a public "
    "bucket)",
    "gs": "set GOOGLE_APPLICATION_CREDENTIALS to the file of a service account's key",
    "az": "set AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY, or what else Azure takes",
}
_ENDPOINTS = {"s3": "AWS_ENDPOINT_URL"}


def status(error: Exception) -> str:
    """Return the status that a server answered with, ``""`` if there was no answer."""
    found = _STATUS.search(str(error))
    return "" if found is None else (found[1] or found[2])


def is_final(error: Exception) -> bool:
    """Return whether a server refused what it will refuse again."""
    return _FINAL.match(status(error)) is not None


def said(error: Exception) -> str:
    """Return the cause of a failure in one line, without what must not be seen."""
    text = str(error)
    origin = _ORIGIN.search(text)
    where = "the server" if origin is None else shown(origin[0])
    xml = _XML.search(text)
    if xml is not None:
        return f"{xml[1]}: {xml[2]}"
    if lacks_keys(error):
        return "there are no credentials"
    if status(error)[:3] in _DENIED:
        return f"access denied ({status(error)})"
    if not status(error):
        for sign, cause in _CAUSES:
            if sign in text:
                return cause.format(where)
    line = _NOISE.sub("", _NOISE.sub("", text.partition("\n")[0]))
    return _URL.sub(lambda url: shown(url[0]), line)[:300].strip().rstrip(":")


def hint(scheme: str, error: Exception) -> str:
    """Return what to do about a failure, ``""`` if nothing is known."""
    text, code, kind = str(error), status(error)[:3], _kind(scheme)
    if lacks_keys(error):
        return _KEYS.get(kind, "")
    if "NoSuchBucket" in text:
        return "create the bucket first, or correct the URL"
    if "PermanentRedirect" in text or "without LOCATION" in text or code == "301":
        return "set AWS_REGION to the bucket's region"
    if code in _DENIED or "Unauthenticated" in type(error).__name__:
        return "check the credentials, and that they may list, read and write there"
    if kind == "http" and code in {"404", "405", "501"}:
        return "a web server must speak WebDAV for this"
    if "Account must be specified" in text:
        return "set AZURE_STORAGE_ACCOUNT_NAME"
    if not code and any(sign in text for sign, _ in _CAUSES):
        name = _ENDPOINTS.get(kind)
        return f"check the network{f' and {name}' if name else ''}"
    return ""


def lacks_keys(error: Exception) -> bool:
    """Return whether it was looked for credentials in vain."""
    return any(sign in str(error) for sign in _WITHOUT_KEYS)


def _kind(scheme: str) -> str:
    if scheme.startswith(("s3", "gs", "http")):
        return scheme[:2] if scheme[0] != "h" else "http"
    return "az"


_SIMPLE = PART_BYTES
"""Bytes up to which a file is sent in one request."""
_MOST_PARTS = 9000
"""Of one file; S3 takes up to 10,000."""
_AT_ONCE = 2
"""Parts of one file under way: with those of other files, some 100 MB are in memory."""
_FIRST = {"timeout": "10s", "connect_timeout": "5s"}
"""For requests before the first answer: a wrong address must not hold anybody up."""
_LATER = {"timeout": "300s", "connect_timeout": "5s"}
"""For the others: a slow line may take minutes for the parts that are under way at once."""
_ENDPOINT_OPTIONS = ("endpoint", "endpoint_url", "aws_endpoint", "aws_endpoint_url")
_ENVIRONMENT = ("AWS_ENDPOINT", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3")
_TOLD = ("access_key_id", "credential_provider", "skip_signature")
_TOLD_ENVIRONMENT = ("AWS_ACCESS_KEY_ID", "AWS_SKIP_SIGNATURE")
"""What settles whose requests these are."""
SCHEMES = (*("s3", "s3a", "gs", "az", "adl", "azure", "abfs", "abfss", "http", "https"),)


def library() -> Any:
    """Return obstore; :class:`StorageError` if it is not installed."""
    try:
        import obstore  # noqa: PLC0415
        import obstore.exceptions  # noqa: PLC0415
        import obstore.store  # noqa: PLC0415
    except ImportError:
        raise StorageError("object stores need obstore: pip install 'msft-store[remote]'") from None
    return obstore


def object_remote(url: str, **options: Any) -> ObjectRemote:
    """Return what is at a URL; ``options`` are those of ``obstore.store.from_url``."""
    obstore = library()
    known = {**_plain_http(url, options), **options}
    errors = (obstore.exceptions.BaseError, ValueError, TypeError)
    try:
        known |= _profile(url, known)
        store, first = (
            obstore.store.from_url(
                url,
                **{
                    "retry_config": _retries(times, seconds),
                    **known,
                    "client_options": {**client, **known.get("client_options", {})},
                },
            )
            for client, times, seconds in ((_LATER, 6, 60), (_FIRST, 4, 10))
        )
    except errors as error:
        advice = hint(urlsplit(url).scheme, error)
        text = f"{said(error)}{advice and f'; {advice}'}"
        if lacks_keys(error):
            raise StorageError(f"cannot reach {shown(url)}: {text}") from None
        raise InvalidInputError(f"{shown(url)} is no place for a store: {text}") from None
    return ObjectRemote(store, shown(url), first=first)


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


def _plain_http(url: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the leave to speak without TLS where the address that was given says so."""
    config = {**(options.get("config") or {}), **options}
    given = [str(config[name]) for name in _ENDPOINT_OPTIONS if name in config]
    given = given or [os.environ[name] for name in _ENVIRONMENT if os.environ.get(name)]
    client = options.get("client_options") or {}
    if any(address.startswith("http://") for address in (url, *given)):
        client = {"allow_http": True, **client}
    return {"client_options": client}


def _profile(url: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return what reads the profiles of ``~/.aws``, if nothing else is said and boto3 is there."""
    config = {**(options.get("config") or {}), **options}
    told = any(name.removeprefix("aws_") in _TOLD for name in map(str.lower, config))
    parts = urlsplit(url)
    if told or parts.scheme not in {"s3", "s3a"} or not parts.netloc:
        return {}
    if any(map(os.environ.get, _TOLD_ENVIRONMENT)):
        return {}
    try:
        from obstore.auth.boto3 import Boto3CredentialProvider  # noqa: PLC0415
    except ImportError:
        return {}
    try:
        provider = Boto3CredentialProvider()
    except Exception as error:
        # A profile that is not there, a file that cannot be read: the library's own errors.
        raise ValueError(error) from error
    if any(map(os.environ.get, ("AWS_REGION", "AWS_DEFAULT_REGION"))):
        provider.config = {}
    return {"credential_provider": provider}


class ObjectRemote:
    """An obstore store."""

    workers = 4

    def __init__(self, store: Any, url: str, *, first: Any = None) -> None:
        self._obstore = library()
        self._errors = self._obstore.exceptions
        self._later = store
        self._first = first
        """The same with little patience, until something was answered."""
        self._url = url

    @property
    def _store(self) -> Any:
        return self._later if self._first is None else self._first

    def describe(self, path: str) -> str:
        return f"{self._url}/{path}"

    def session(self, purpose: str) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def sizes(self, folder: str) -> dict[str, int]:
        with self._said("list", folder):
            pages = self._obstore.list(self._store, folder or None)
            return names(folder, [(one["path"], one["size"]) for page in pages for one in page])

    def size(self, path: str) -> int | None:
        with self._said("look at", path):
            try:
                return int(self._obstore.head(self._store, path)["size"])
            except FileNotFoundError:
                return None

    def read(self, path: str, offset: int, length: int) -> bytes:
        with self._said("read", path):
            data = bytes(self._obstore.get_range(self._store, path, start=offset, length=length))
        if len(data) != length:
            raise StorageError(f"{self.describe(path)} is shorter than it was", file=path)
        return data

    def whole(self, path: str, most: int) -> tuple[bytes, Any] | None:
        with self._said("read", path):
            try:
                found = self._obstore.get(self._store, path)
            except FileNotFoundError:
                return None
            if found.meta["size"] > most:
                raise StorageError(f"{self.describe(path)} has more than {most} bytes")
            known = {name: found.meta[name] for name in ("e_tag", "version") if found.meta[name]}
            return bytes(found.bytes()), known

    def put(self, path: str, parts: Callable[[], Iterator[bytes]], size: int) -> None:
        with self._said("write", path):
            if size <= _SIMPLE:
                self._obstore.put(self._store, path, b"".join(parts()), use_multipart=False)
                return
            self._obstore.put(
                self._store,
                path,
                parts(),
                chunk_size=max(PART_BYTES, size // _MOST_PARTS),
                max_concurrency=_AT_ONCE,
            )

    def create(self, path: str, data: bytes) -> bool:
        return self._conditional(path, data, "create")

    def replace(self, path: str, data: bytes, version: Any) -> bool:
        return self._conditional(path, data, version)

    def _conditional(self, path: str, data: bytes, mode: Any) -> bool:
        with self._said("write", path):
            try:
                self._obstore.put(self._store, path, data, mode=mode)
            except (self._errors.AlreadyExistsError, self._errors.PreconditionError):
                return False
            return True

    def settle(self, folder: str) -> None:
        """Do nothing: what is there is durable."""

    @contextlib.contextmanager
    def _said(self, action: str, path: str) -> Iterator[None]:
        """Turn what the library says into a :class:`StoreError`."""
        errors = self._errors
        final = (
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
            refused = is_final(error) or isinstance(error, final) or self._first is not None
            kind = StorageError if refused else ConnectionLostError
            where = self.describe(path)
            advice = hint(self._url.partition(":")[0], error)
            text = f"cannot {action} {where}: {said(error)}{advice and f'; {advice}'}"
            raise kind(text, file=where) from error
        self._first = None
