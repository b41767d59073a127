"""Whatever else fsspec has a file system for: SFTP, SMB, HDFS, WebDAV, memory.

A file is written under ``tmp/`` and then moved to its place. fsspec has no conditional writes by
version: a ref is compared right before it is replaced, so that of two pushers at the very same
moment one may win unseen. Object stores that :mod:`~msft_store.remote.transport.object_store` knows
do not have that gap.

Example::

    remote = fsspec_remote("sftp://host/srv/run")
"""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Callable, Iterator
from typing import Any

from msft_store.errors import InvalidInputError, StorageError
from msft_store.remote.transport.base import ConnectionLostError, names, shown
from msft_store.storage.backend import TEMPORARY

_FINAL = (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError)


def fsspec_remote(url: str, **options: Any) -> FsspecRemote:
    """Return what is at a URL; ``options`` are those of the file system."""
    try:
        import fsspec.core  # noqa: PLC0415
    except ImportError:
        raise StorageError(f"{shown(url)} needs fsspec: pip install 'msft-store[remote]'") from None
    try:
        system, root = fsspec.core.url_to_fs(url, **options)
    except ImportError as error:
        raise StorageError(f"{shown(url)} needs another package: {error}") from None
    except (ValueError, TypeError) as error:
        raise InvalidInputError(f"{shown(url)} is no place for a store: {error}") from None
    except OSError as error:
        raise ConnectionLostError(f"cannot reach {shown(url)}: {error}") from error
    return FsspecRemote(system, root, shown(url))


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
        with self._said("list", folder):
            self._system.invalidate_cache()
            try:
                found = self._system.find(self._at(folder), detail=True)
            except FileNotFoundError:
                return {}
            return names(folder, [(path[skip:], one["size"]) for path, one in found.items()])

    def size(self, path: str) -> int | None:
        with self._said("look at", path):
            self._system.invalidate_cache()
            try:
                return int(self._system.size(self._at(path)))
            except FileNotFoundError:
                return None

    def read(self, path: str, offset: int, length: int) -> bytes:
        with self._said("read", path):
            data = bytes(self._system.cat_file(self._at(path), start=offset, end=offset + length))
        if len(data) != length:
            raise StorageError(f"{self.describe(path)} is shorter than it was")
        return data

    def whole(self, path: str, most: int) -> tuple[bytes, Any] | None:
        size = self.size(path)
        if size is None:
            return None
        if size > most:
            raise StorageError(f"{self.describe(path)} has more than {most} bytes")
        with self._said("read", path):
            try:
                data = bytes(self._system.cat_file(self._at(path)))
            except FileNotFoundError:
                return None
        return data, data

    def put(self, path: str, parts: Callable[[], Iterator[bytes]], size: int) -> None:
        temporary = self._at(f"{TEMPORARY}/{uuid.uuid4().hex}")
        with self._said(f"write the {size} bytes of", path):
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
        now = self.whole(path, len(version))
        if now is None or now[0] != version:
            return False
        self.put(path, lambda: iter((data,)), len(data))
        return True

    def settle(self, folder: str) -> None:
        """Do nothing: there is no such call."""

    def _at(self, path: str) -> str:
        return f"{self._root}/{path}".rstrip("/")

    @contextlib.contextmanager
    def _said(self, action: str, path: str) -> Iterator[None]:
        """Turn what the file system says into a :class:`StoreError`."""
        try:
            yield
        except StorageError:
            raise
        except (OSError, EOFError, NotImplementedError) as error:
            final = isinstance(error, (*_FINAL, NotImplementedError))
            kind = StorageError if final else ConnectionLostError
            text = f"cannot {action} {self.describe(path)}: {error or type(error).__name__}"
            raise kind(text) from error
