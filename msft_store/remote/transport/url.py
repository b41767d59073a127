"""From a URL to what is there.

Example::

    remote_at("s3://bucket/run")
    remote_at("/mnt/nas/run")                # the same as file:///mnt/nas/run
    remote_at(obstore.store.MemoryStore())
"""

from __future__ import annotations

import os
from typing import Any
from urllib.parse import unquote, urlsplit

from msft_store._util import check_path
from msft_store.errors import InvalidInputError
from msft_store.remote.transport.base import Persistent, Remote
from msft_store.remote.transport.directory import DirectoryRemote
from msft_store.remote.transport.fsspec import fsspec_remote
from msft_store.remote.transport.object_store import SCHEMES, ObjectRemote, object_remote


def is_url(address: object) -> bool:
    """Return whether an address is a URL, not a path."""
    return isinstance(address, str) and "://" in address


def remote_at(address: Any, **options: Any) -> Remote:
    """Return what is at a URL or a path, or an obstore store itself, as a remote.

    ``options`` go to ``obstore.store.from_url``, or to the fsspec file system. What the connection
    breaks is tried again. :class:`InvalidInputError` for what is no such address,
    :class:`StorageError` if a package is missing.
    """
    if isinstance(address, os.PathLike) or (isinstance(address, str) and not is_url(address)):
        return DirectoryRemote(check_path(address))
    if not isinstance(address, str):
        if hasattr(address, "workers"):
            found: Remote = address
            return found
        return Persistent(ObjectRemote(address, f"<{type(address).__name__}>"))
    try:
        parts = urlsplit(address)
    except ValueError as error:
        raise InvalidInputError(f"{address!r} is no URL: {error}") from None
    if parts.scheme == "file":
        if parts.netloc not in ("", "localhost") or not parts.path:
            raise InvalidInputError(f"{address!r} names no path: write file:///path/to/store")
        return DirectoryRemote(check_path(unquote(parts.path)))
    if parts.scheme in SCHEMES:
        return Persistent(object_remote(address, **options))
    return Persistent(fsspec_remote(address, **options))
