"""A remote's files, and files that have just come from one, to be read as a store is.

Nothing can be written through these, and reading takes no lock.

Example::

    store = Store(RemoteBackend(remote_at("s3://bucket/run")))
    store.load("best")
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NoReturn, TypeVar

from msft_store.errors import StorageError
from msft_store.objects.bases import BASES
from msft_store.objects.manifest import MANIFESTS
from msft_store.objects.packs import PACKS
from msft_store.objects.refs import REFS
from msft_store.pipeline.parallel import in_order
from msft_store.remote.transport.base import Remote
from msft_store.storage.backend import MAX_SMALL_FILE_BYTES, Backend, FileStat, Writer, scan_by_size
from msft_store.storage.claims import Claim
from msft_store.storage.lock_files import Lock

_T = TypeVar("_T")
_R = TypeVar("_R")
_AHEAD = 16
"""How many requests for small parts are under way at once."""
_SMALL = 1 << 16
"""Bytes up to which a ref is read ahead."""
_HEAD = 1 << 14
_TAIL = 1 << 16
"""What is read first of a manifest, and last of a pack."""


class ReadOnly:
    """The half of a backend that writes, refused."""

    def describe(self, path: str) -> str:
        raise NotImplementedError

    def locks(self) -> Sequence[Lock]:
        return ()

    def lock(
        self,
        *,
        shared: bool,
        purpose: str,
    ) -> contextlib.AbstractContextManager[None]:
        self._refuse(purpose)

    def claim(self, kind: str, name: str) -> Claim:
        return Claim()

    def unlock(self, *, force: bool) -> Sequence[Lock]:
        return ()

    def writer(self) -> contextlib.AbstractContextManager[Writer]:
        self._refuse("write")

    def delete(self, path: str) -> None:
        self._refuse("delete")

    def move(self, path: str, target: str) -> None:
        self._refuse("move")

    def sync(self, folder: str) -> None:
        self._refuse("sync")

    def _refuse(self, action: str) -> NoReturn:
        raise StorageError(
            f"no {action} in {self.describe('')}: a remote store is only read in place. "
            "Clone it, change the clone and push that"
        )


class RemoteBackend(ReadOnly):
    """A remote's files; packs are read from ``nearby`` where they are there in the same size.

    What is listed of packs and manifests is read ahead, many at once, as far as who lists wants it
    next; packs, manifests and bases are taken never to change. Refs that were listed are read
    together when the first of them is, and each is used once.
    """

    def __init__(self, remote: Remote, nearby: Backend | None = None) -> None:
        self._remote = remote
        self._nearby = nearby
        self._sizes: dict[str, int] = {}
        self._ahead: dict[tuple[str, int, int], bytes] = {}
        self._listed: dict[str, int] = {}
        self._unread: list[str] = []
        self._refs: dict[str, bytes] = {}

    def describe(self, path: str) -> str:
        return self._remote.describe(path)

    def exists(self, path: str) -> bool:
        return self._remote.size(path) is not None

    def size(self, path: str) -> int:
        size = self._sizes.get(path, self._listed.pop(path, None))
        if size is None:
            size = self._remote.size(path)
            if size is None:
                raise StorageError(f"{self.describe(path)} is not there")
            if _is_fixed(path):
                self._sizes[path] = size
        return size

    def read(self, path: str, offset: int = 0, length: int | None = None) -> bytes:
        if not _is_fixed(path):
            data = self._changeable(path)
            return data[offset:] if length is None else data[offset : offset + length]
        rest = max(self.size(path) - offset, 0)
        length = rest if length is None else min(length, rest)
        if length == 0:
            return b""
        if self._is_nearby(path) and self._nearby is not None:
            # A gc may take it away at any moment.
            with contextlib.suppress(StorageError):
                data = self._nearby.read(path, offset, length)
                if len(data) == length:
                    return data
        data = self._ahead.pop((path, offset, length), b"")
        return data or self._remote.read(path, offset, length)

    def list(self, folder: str) -> list[str]:
        sizes = self._remote.sizes(folder)
        fresh = [path for path in sizes if path not in self._sizes]
        self._sizes |= {path: size for path, size in sizes.items() if _is_fixed(path)}
        self._listed = {path: size for path, size in sizes.items() if not _is_fixed(path)}
        if folder in (PACKS, MANIFESTS):
            self._read_ahead(folder, fresh)
        elif folder == REFS:
            self._refs = {}
            self._unread = [path for path, size in sizes.items() if size <= _SMALL]
        return sorted(sizes)

    def scan(self, folder: str) -> dict[str, FileStat]:
        paths = self.list(folder)
        known = self._sizes | self._listed
        return {path: FileStat(known[path]) for path in paths}

    def _changeable(self, path: str) -> bytes:
        if path in self._unread:
            together, self._unread = self._unread, []
            self._refs = {path: data for path, data in self._each(self._whole, together) if data}
        data = self._refs.pop(path, b"") or self._whole(path)[1]
        if data is None:
            raise StorageError(f"{self.describe(path)} is not there")
        return data

    def _whole(self, path: str) -> tuple[str, bytes | None]:
        found = self._remote.whole(path, MAX_SMALL_FILE_BYTES)
        return path, None if found is None else found[0]

    def _read_ahead(self, folder: str, paths: Sequence[str]) -> None:
        def ranges() -> Iterator[tuple[str, int, int]]:
            for path in paths:
                size = self._sizes[path]
                if folder == MANIFESTS and size:
                    yield path, 0, min(size, _HEAD)
                elif size and not self._is_nearby(path):
                    start = max(size - _TAIL, 0)
                    yield path, start, size - start
                    if start:
                        yield path, 0, 16

        def fetch(place: tuple[str, int, int]) -> tuple[tuple[str, int, int], bytes]:
            try:
                return place, self._remote.read(*place)
            except StorageError:
                # Who needs it will hear of it.
                return place, b""

        self._ahead |= {place: data for place, data in self._each(fetch, ranges()) if data}

    def _each(self, act: Callable[[_T], _R], items: Iterable[_T]) -> Iterator[_R]:
        workers = _AHEAD if self._remote.workers > 1 else 1
        with contextlib.closing(in_order(act, iter(items), workers)) as found:
            yield from found

    def _is_nearby(self, path: str) -> bool:
        nearby = self._nearby
        return (
            nearby is not None
            and path.startswith(f"{PACKS}/")
            and nearby.exists(path)
            and nearby.size(path) == self._sizes.get(path)
        )


def _is_fixed(path: str) -> bool:
    """Return whether a file holds the same whenever it is there."""
    return path.startswith((f"{PACKS}/", f"{MANIFESTS}/", f"{BASES}/"))


class Staged(ReadOnly):
    """A store as it will be once staged files are in their places.

    ``places`` has where the bytes of a file are now; messages name where they came from.
    """

    def __init__(
        self, inner: Backend, places: Mapping[str, str], origin: Callable[[str], str]
    ) -> None:
        self._inner = inner
        self._places = places
        self._origin = origin

    def describe(self, path: str) -> str:
        return self._origin(path) if path in self._places else self._inner.describe(path)

    def exists(self, path: str) -> bool:
        return self._inner.exists(self._places.get(path, path))

    def size(self, path: str) -> int:
        return self._inner.size(self._places.get(path, path))

    def read(self, path: str, offset: int = 0, length: int | None = None) -> bytes:
        return self._inner.read(self._places.get(path, path), offset, length)

    def list(self, folder: str) -> list[str]:
        staged = {path for path in self._places if path.startswith(f"{folder}/")}
        return sorted(staged.union(self._inner.list(folder)))

    def scan(self, folder: str) -> dict[str, FileStat]:
        return scan_by_size(self, folder)
