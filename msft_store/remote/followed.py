"""The part of a remote store that a follower has: what it holds, and what it fetched, in memory.

What a follower holds, in tensors or files, is shown as a pack of raw chunks under the keys that
their bytes have now. So a difference is decoded against what is there, whoever wrote it, and
nothing is believed that was not hashed.

Example::

    files = FollowedFiles(remote)
    path, pack = held_pack(chunks)
    files.packs[path] = pack
    Catalog(files).objects.read(key, size, dtype, base)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

from msft_store.codec.codecs import RAW
from msft_store.codec.kernels import Bytes
from msft_store.errors import StorageError
from msft_store.format.dtypes import DType
from msft_store.format.layout import MAX_GENERATION, NEWEST, Record
from msft_store.format.pack_footer import encode_footer, pack_header
from msft_store.objects.catalog import CONFIG, Config, encode_config
from msft_store.objects.manifest import Piece, TensorEntry, chunks_of
from msft_store.objects.packs import pack_path
from msft_store.remote.transport.base import Remote
from msft_store.storage.backend import FileStat, scan_by_size
from msft_store.storage.overlay import ReadOnlyBackend

Reader = Callable[[int, int], Bytes]
"""Returns the bytes of a range of a piece's elements, as they are now."""


class Pack(Protocol):
    """A pack of which some ranges can be read."""

    @property
    def size(self) -> int:
        """Bytes of the whole pack."""

    def read(self, offset: int, length: int) -> bytes | None:
        """Return a range, or ``None`` if it is not there."""


@dataclass
class FetchedPack:
    """Ranges of a pack of the remote."""

    source: str
    """Path of its file there."""
    size: int
    parts: dict[int, bytes] = field(default_factory=dict)
    """The ranges by their offsets."""

    def read(self, offset: int, length: int) -> bytes | None:
        """Return a range, or ``None`` if it was not fetched."""
        if not length:
            return b""
        for start, data in self.parts.items():
            if start <= offset and offset + length <= start + len(data):
                return data[offset - start : offset - start + length]
        return None


@dataclass(frozen=True, kw_only=True)
class HeldPack:
    """Chunks that a follower holds, as a pack. Nothing is copied until it is read."""

    size: int
    ends: Mapping[int, bytes]
    """Header and footer by their offsets."""
    chunks: Mapping[tuple[int, int], Callable[[], Bytes]]
    """The payloads by offset and length."""

    def read(self, offset: int, length: int) -> bytes | None:
        """Return a payload, or any range with zeros in the place of payloads."""
        read = self.chunks.get((offset, length))
        if read is not None:
            return read().tobytes()
        data = bytearray(length)
        for start, end in self.ends.items():
            first, last = max(start, offset), min(start + len(end), offset + length)
            if first < last:
                data[first - offset : last - offset] = end[first - start : last - start]
        return bytes(data)


@dataclass(frozen=True, kw_only=True)
class Place:
    """A chunk of a version, and the bytes that a follower holds in its place."""

    name: str
    """Name of the tensor."""
    key: bytes
    """Key of the chunk in the version."""
    dtype: DType
    size: int
    """Bytes of the chunk."""
    start: int
    """First element, in row-major order of the piece."""
    piece: Piece
    read: Callable[[], Bytes] | None
    """Returns the bytes that are held; ``None`` if there are none."""


def list_places(
    tensors: Mapping[str, TensorEntry],
    reader: Callable[[str, TensorEntry, Piece], Reader | None],
) -> Iterator[Place]:
    """Yield the chunks of a version in order; ``reader`` gives what is held of a piece."""
    for name, entry in tensors.items():
        for piece in entry.pieces:
            read, start = reader(name, entry, piece), 0
            for key, size in chunks_of(piece, entry.dtype):
                stop = start + size // entry.dtype.size
                yield Place(
                    name=name,
                    key=key,
                    dtype=entry.dtype,
                    size=size,
                    start=start,
                    piece=piece,
                    read=None if read is None else partial(read, start, stop),
                )
                start = stop


def held_pack(chunks: Iterable[tuple[Place, bytes]]) -> tuple[str, HeldPack]:
    """Return the path and the pack of held chunks, given with the keys of their bytes."""
    header = pack_header(NEWEST)
    records: dict[bytes, Record] = {}
    payloads: dict[tuple[int, int], Callable[[], Bytes]] = {}
    position = len(header)
    for place, key in chunks:
        if place.read is None or key in records:
            continue
        # The latest generation is preferred to all that would have to be fetched.
        records[key] = Record(
            key=key,
            offset=position,
            length=place.size,
            size=place.size,
            codec=RAW.code,
            dtype=place.dtype.code,
            depth=0,
            base=None,
            generation=MAX_GENERATION,
        )
        payloads[position, place.size] = place.read
        position += place.size
    footer, check = encode_footer(list(records.values()), position)
    ends = {0: header, position: footer}
    return pack_path(check), HeldPack(size=position + len(footer), ends=ends, chunks=payloads)


class FollowedFiles(ReadOnlyBackend):
    """The files that a follower has of a remote, as those of a store."""

    def __init__(self, remote: Remote) -> None:
        self.small: dict[str, bytes] = {CONFIG: encode_config(Config())}
        """Manifests and records of bases by path."""
        self.packs: dict[str, Pack] = {}
        self._remote = remote

    def describe(self, path: str) -> str:
        return self._remote.describe(path)

    def exists(self, path: str) -> bool:
        return path in self.small or path in self.packs

    def size(self, path: str) -> int:
        if path in self.packs:
            return self.packs[path].size
        return len(self._small(path))

    def read(self, path: str, offset: int = 0, length: int | None = None) -> bytes:
        pack = self.packs.get(path)
        if pack is None:
            data = self._small(path)
            return data[offset:] if length is None else data[offset : offset + length]
        wanted = max(min(pack.size - offset, pack.size if length is None else length), 0)
        found = pack.read(offset, wanted)
        if found is None:
            raise StorageError(f"a range of {self.describe(path)} was not fetched")
        return found

    def list(self, folder: str) -> list[str]:
        start = folder and f"{folder}/"
        return sorted(path for path in (*self.small, *self.packs) if path.startswith(start))

    def scan(self, folder: str) -> dict[str, FileStat]:
        return scan_by_size(self, folder)

    def _small(self, path: str) -> bytes:
        if path not in self.small:
            raise StorageError(f"{self.describe(path)} does not exist")
        return self.small[path]
