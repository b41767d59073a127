"""Connect to the remote at a URL or path.

Example::

    connect_remote("s3://bucket/run")
    connect_remote("/mnt/nas/run")                # the same as file:///mnt/nas/run
    connect_remote(obstore.store.MemoryStore())
"""

from __future__ import annotations

import os
from typing import Any
from urllib.parse import unquote, urlsplit

from msft_store._util import check_path
from msft_store.errors import InvalidInputError
from msft_store.remote.transport.base import Remote, RetryingRemote
from msft_store.remote.transport.directory import DirectoryRemote
from msft_store.remote.transport.fsspec import fsspec_remote
from msft_store.remote.transport.object_store import SCHEMES, ObjectRemote, object_remote


def is_url(address: object) -> bool:
    """Return True if an address is a URL and not a path."""
    return isinstance(address, str) and "://" in address


def connect_remote(address: Any, **options: Any) -> Remote:
    """Return the remote at a URL or path, with retries if the connection breaks.

    An obstore store may take the place of the address. A :class:`Remote` is returned as it is.
    ``options`` are passed on to ``obstore.store.from_url`` or to the fsspec file system.

    Raises:
        InvalidInputError: If the address is malformed.
        StorageError: If a package is missing.
    """
    if isinstance(address, os.PathLike) or (isinstance(address, str) and not is_url(address)):
        return DirectoryRemote(check_path(address))
    if not isinstance(address, str):
        if hasattr(address, "workers"):
            found: Remote = address
            return found
        return RetryingRemote(ObjectRemote(address, f"<{type(address).__name__}>"))
    try:
        parts = urlsplit(address)
    except ValueError as error:
        raise InvalidInputError(f"{address!r} is not a valid URL: {error}") from None
    if parts.scheme == "file":
        if parts.netloc not in ("", "localhost") or not parts.path:
            raise InvalidInputError(f"{address!r} has no path: write file:///path/to/store")
        return DirectoryRemote(check_path(unquote(parts.path)))
    if parts.scheme in SCHEMES:
        return RetryingRemote(object_remote(address, **options))
    return RetryingRemote(fsspec_remote(address, **options))
