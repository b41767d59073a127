"""Other file systems by way of fsspec: SFTP, SMB, HDFS, WebDAV, memory.

A file is written under ``tmp/`` and then moved to its place. fsspec has no conditional write by
version. A ref is therefore compared directly before it is replaced; if two processes push the same
ref at the same moment, one of the two writes can be lost. The object stores of
:mod:`~msft_store.remote.transport.object_store` do not have this gap.

Example::

    remote = fsspec_remote("sftp://host/srv/run")
"""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterator
from typing import Any

from msft_store.errors import InvalidInputError, StorageError
from msft_store.remote.transport.base import (
    ConnectionLostError,
    PartReader,
    check_length,
    filter_folder,
    redact_url,
)
from msft_store.storage.backend import TEMPORARY

_FINAL = (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError)


def fsspec_remote(url: str, **options: Any) -> FsspecRemote:
    """Return the remote at a URL; ``options`` are those of the fsspec file system."""
    try:
        import fsspec.core  # noqa: PLC0415
    except ImportError:
        raise StorageError(
            f"{redact_url(url)} needs fsspec: pip install 'msft-store[remote]'"
        ) from None
    try:
        system, root = fsspec.core.url_to_fs(url, **options)
    except ImportError as error:
        raise StorageError(f"{redact_url(url)} needs another package: {error}") from None
    except (ValueError, TypeError) as error:
        raise InvalidInputError(f"{redact_url(url)} cannot hold a store: {error}") from None
    except OSError as error:
        raise ConnectionLostError(f"cannot reach {redact_url(url)}: {error}") from error
    return FsspecRemote(system, root, redact_url(url))


class FsspecRemote:
    """A folder of an fsspec file system."""

    workers = 1

    def __init__(self, system: Any, root: str, url: str) -> None:
        self._system = system
        self._root = root.rstrip("/")
        self._url = url

    def describe(self, path: str) -> str:
        return f"{self._url}/{path}"

    def session(self, purpose: str) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def sizes(self, folder: str) -> dict[str, int]:
        skip = len(self._root) + 1
        with self._translate_errors("list", folder):
            self._system.invalidate_cache()
            try:
                found = self._system.find(self._at(folder), detail=True)
            except FileNotFoundError:
                return {}
            return filter_folder(
                folder, [(path[skip:], one["size"]) for path, one in found.items()]
            )

    def size(self, path: str) -> int | None:
        with self._translate_errors("access", path):
            self._system.invalidate_cache()
            try:
                return int(self._system.size(self._at(path)))
            except FileNotFoundError:
                return None

    def read(self, path: str, offset: int, length: int) -> bytes:
        with self._translate_errors("read", path):
            data = bytes(self._system.cat_file(self._at(path), start=offset, end=offset + length))
        return check_length(data, length, self.describe(path))

    def read_versioned(self, path: str, most: int) -> tuple[bytes, Any] | None:
        size = self.size(path)
        if size is None:
            return None
        if size > most:
            raise StorageError(f"{self.describe(path)} has more than {most} bytes")
        with self._translate_errors("read", path):
            try:
                data = bytes(self._system.cat_file(self._at(path)))
            except FileNotFoundError:
                return None
        return data, data

    def put(self, path: str, parts: PartReader, size: int) -> None:
        temporary = self._at(f"{TEMPORARY}/{uuid.uuid4().hex}")
        with self._translate_errors(f"write the {size} bytes of", path):
            try:
                self._system.makedirs(self._at(TEMPORARY), exist_ok=True)
                with self._system.open(temporary, "wb") as file:
                    for part in parts():
                        file.write(part)
                self._system.makedirs(self._at(path).rpartition("/")[0], exist_ok=True)
                self._system.mv(temporary, self._at(path))
            except BaseException:
                with contextlib.suppress(Exception):
                    self._system.rm_file(temporary)
                raise

    def create(self, path: str, data: bytes) -> bool:
        if self.size(path) is not None:
            return False
        self.put(path, lambda: iter((data,)), len(data))
        return True

    def replace(self, path: str, data: bytes, version: Any) -> bool:
        now = self.read_versioned(path, len(version))
        if now is None or now[0] != version:
            return False
        self.put(path, lambda: iter((data,)), len(data))
        return True

    def sync(self, folder: str) -> None:
        """Do nothing, because fsspec has no such call."""

    def _at(self, path: str) -> str:
        return f"{self._root}/{path}".rstrip("/")

    @contextlib.contextmanager
    def _translate_errors(self, action: str, path: str) -> Iterator[None]:
        """Raise errors of the file system as :class:`StorageError`."""
        try:
            yield
        except StorageError:
            raise
        except (OSError, EOFError, NotImplementedError) as error:
            final = isinstance(error, (*_FINAL, NotImplementedError))
            kind = StorageError if final else ConnectionLostError
            text = f"cannot {action} {self.describe(path)}: {error or type(error).__name__}"
            raise kind(text) from error
