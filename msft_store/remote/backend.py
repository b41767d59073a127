"""Read-only backends: the files of a remote, and fetched files that are not yet in their places.

Writing methods raise :class:`StorageError`, and reading takes no lock.

Example::

    store = Store(RemoteBackend(connect_remote("s3://bucket/run")))
    store.load("best")
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

from msft_store.errors import CorruptedError, NotAStoreError, StorageError, VersionError
from msft_store.objects.bases import BASES
from msft_store.objects.catalog import CONFIG, Config
from msft_store.objects.manifest import MANIFESTS
from msft_store.objects.packs import PACKS
from msft_store.objects.refs import REFS
from msft_store.pipeline.parallel import in_order
from msft_store.remote.transport.base import Remote
from msft_store.storage.backend import MAX_SMALL_FILE_BYTES, Backend, FileStat, scan_by_size
from msft_store.storage.overlay import ReadOnlyBackend

_T = TypeVar("_T")
_R = TypeVar("_R")
_PARALLEL_REQUESTS = 16
"""Number of small requests that run at the same time."""
_MAX_REF_BYTES = 1 << 16
"""Maximal bytes of a ref that is read ahead."""
_HEAD_BYTES = 1 << 14
_TAIL_BYTES = 1 << 16
"""Bytes that are read ahead at the beginning of a manifest and at the end of a pack."""


def map_parallel(function: Callable[[_T], _R], items: Iterable[_T], workers: int) -> Sequence[_R]:
    """Return the results of a function in the order of the items, running up to ``workers``."""
    if workers == 1:
        return [function(item) for item in items]
    with contextlib.closing(in_order(function, iter(items), workers)) as results:
        return list(results)


def is_sound(read: Callable[[Backend, str], object], backend: Backend, name: str) -> bool:
    """Return True if a file can be read without a :class:`CorruptedError`."""
    try:
        read(backend, name)
    except CorruptedError:
        return False
    return True


def require_store(backend: RemoteBackend) -> RemoteBackend:
    """Return ``backend``; :class:`NotAStoreError` if it holds no store."""
    if not backend.exists(CONFIG):
        raise NotAStoreError(f"no store at {backend.describe('')}; send one there with push")
    return backend


def require_version(source: Config, origin: Backend, target: Config, place: Backend) -> None:
    """Raise :class:`VersionError` if a target must not get the files of a source."""
    if source.version > target.version:
        raise VersionError(
            f"{_name(origin)} is a store of version {source.version} and {_name(place)} one of "
            f"version {target.version}, which must not get files of a later version: run "
            f"msft-store upgrade {_name(place)}, or choose a new place"
        )


def _name(backend: Backend) -> str:
    return backend.describe("").rstrip("/")


class RemoteBackend(ReadOnlyBackend):
    """The files of a remote. A pack is read from ``nearby`` if that has it in the same size.

    Listing packs or manifests also reads the parts of new files that the caller needs next, in
    parallel. Packs, manifests and bases are assumed never to change. Listing refs makes the first
    read of a ref fetch all of them in parallel; each result is used once.
    """

    def __init__(self, remote: Remote, nearby: Backend | None = None) -> None:
        self._remote = remote
        self._nearby = nearby
        self._workers = _PARALLEL_REQUESTS if remote.workers > 1 else 1
        self._sizes: dict[str, int] = {}
        self._prefetched: dict[tuple[str, int, int], bytes] = {}
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
                raise StorageError(f"{self.describe(path)} does not exist")
            if _is_immutable(path):
                self._sizes[path] = size
        return size

    def read(self, path: str, offset: int = 0, length: int | None = None) -> bytes:
        if not _is_immutable(path):
            data = self._read_mutable(path)
            return data[offset:] if length is None else data[offset : offset + length]
        rest = max(self.size(path) - offset, 0)
        length = rest if length is None else min(length, rest)
        if length == 0:
            return b""
        if self._is_nearby(path) and self._nearby is not None:
            # A gc may delete the nearby file at any moment.
            with contextlib.suppress(StorageError):
                data = self._nearby.read(path, offset, length)
                if len(data) == length:
                    return data
        data = self._prefetched.pop((path, offset, length), b"")
        return data or self._remote.read(path, offset, length)

    def list(self, folder: str) -> list[str]:
        sizes = self._remote.sizes(folder)
        fresh = [path for path in sizes if path not in self._sizes]
        self._sizes |= {path: size for path, size in sizes.items() if _is_immutable(path)}
        self._listed = {path: size for path, size in sizes.items() if not _is_immutable(path)}
        if folder in (PACKS, MANIFESTS):
            self._prefetch(folder, fresh)
        elif folder == REFS:
            self._refs = {}
            self._unread = [path for path, size in sizes.items() if size <= _MAX_REF_BYTES]
        return sorted(sizes)

    def scan(self, folder: str) -> dict[str, FileStat]:
        paths = self.list(folder)
        known = self._sizes | self._listed
        return {path: FileStat(known[path]) for path in paths}

    def _read_mutable(self, path: str) -> bytes:
        if path in self._unread:
            paths, self._unread = self._unread, []
            self._refs = {
                path: data
                for path, data in map_parallel(self._read_versioned, paths, self._workers)
                if data
            }
        data = self._refs.pop(path, b"") or self._read_versioned(path)[1]
        if data is None:
            raise StorageError(f"{self.describe(path)} does not exist")
        return data

    def _read_versioned(self, path: str) -> tuple[str, bytes | None]:
        found = self._remote.read_versioned(path, MAX_SMALL_FILE_BYTES)
        return path, None if found is None else found[0]

    def _prefetch(self, folder: str, paths: Sequence[str]) -> None:
        def ranges() -> Iterator[tuple[str, int, int]]:
            for path in paths:
                size = self._sizes[path]
                if folder == MANIFESTS and size:
                    yield path, 0, min(size, _HEAD_BYTES)
                elif size and not self._is_nearby(path):
                    start = max(size - _TAIL_BYTES, 0)
                    yield path, start, size - start
                    if start:
                        yield path, 0, 16

        def fetch(place: tuple[str, int, int]) -> tuple[tuple[str, int, int], bytes]:
            try:
                return place, self._remote.read(*place)
            except StorageError:
                # The read that needs this range raises the error.
                return place, b""

        self._prefetched |= {
            place: data for place, data in map_parallel(fetch, ranges(), self._workers) if data
        }

    def _is_nearby(self, path: str) -> bool:
        nearby = self._nearby
        return (
            nearby is not None
            and path.startswith(f"{PACKS}/")
            and nearby.exists(path)
            and nearby.size(path) == self._sizes.get(path)
        )


def _is_immutable(path: str) -> bool:
    """Return True if a file never changes while it exists."""
    return path.startswith((f"{PACKS}/", f"{MANIFESTS}/", f"{BASES}/"))


class StagedBackend(ReadOnlyBackend):
    """A store with staged files, shown as if they were in their places already.

    ``places`` maps the path of a file to its staged path. ``origin`` gives the address that
    messages show for it.
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
        start = folder and f"{folder}/"
        staged = {path for path in self._places if path.startswith(start)}
        return sorted(staged.union(self._inner.list(folder)))

    def scan(self, folder: str) -> dict[str, FileStat]:
        return scan_by_size(self, folder)
