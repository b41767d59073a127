"""Object stores by way of obstore: S3 and what speaks like it, Google Cloud Storage, Azure.

Credentials, region and endpoint come from where each platform's own tools look for them
(``AWS_ACCESS_KEY_ID``, ``AWS_ENDPOINT_URL``, …), or from ``options``.

Example::

    remote = object_remote("s3://bucket/run", region="eu-central-1")
"""

from __future__ import annotations

import contextlib
import datetime
import re
from collections.abc import Callable, Iterator
from typing import Any

from msft_store.errors import InvalidInputError, StorageError
from msft_store.integrations.remotes import PART_BYTES, ConnectionLostError, names, shown

_SIMPLE = PART_BYTES
"""Bytes up to which a file is sent in one request."""
_MOST_PARTS = 9000
"""Of one file; S3 takes up to 10,000."""
_AT_ONCE = 2
"""Parts of one file under way: with those of other files, some 100 MB are in memory."""
_STATUS = re.compile(r"status code: (\d+)")
_SAID = re.compile(r"<Code>([^<]*)</Code>\s*<Message>([^<]*)</Message>")
_FINAL = re.compile("501|4(?!08|09|25|29)")
"""What a server answers when the same request will do no better later."""
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
    patience = {
        "max_retries": 6,
        "retry_timeout": datetime.timedelta(seconds=60),
        "backoff": {
            "base": 2,
            "init_backoff": datetime.timedelta(milliseconds=100),
            "max_backoff": datetime.timedelta(seconds=5),
        },
    }
    try:
        store = obstore.store.from_url(url, **{"retry_config": patience, **options})
    except (obstore.exceptions.BaseError, ValueError, TypeError) as error:
        raise InvalidInputError(f"{shown(url)} is no place for a store: {_line(error)}") from None
    return ObjectRemote(store, shown(url))


class ObjectRemote:
    """An obstore store."""

    workers = 4

    def __init__(self, store: Any, url: str) -> None:
        self._obstore = library()
        self._errors = self._obstore.exceptions
        self._store = store
        self._url = url

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
            status = _STATUS.search(str(error))
            refused = status is not None and _FINAL.match(status[1]) is not None
            kind = StorageError if refused or isinstance(error, final) else ConnectionLostError
            where = self.describe(path)
            raise kind(f"cannot {action} {where}: {_line(error)}", file=where) from error


def _line(error: Exception) -> str:
    """Return the one line of an error that helps a person."""
    said = _SAID.search(str(error))
    if said is not None:
        return f"{said[1]}: {said[2]}"
    return str(error).partition("\n")[0][:300]
