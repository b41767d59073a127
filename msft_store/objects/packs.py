"""Write packs of encoded chunks, and find the representations of a chunk in all packs.

Invariant: a pack exists once it is finalized, and never changes. A :class:`PackIndex` is a snapshot
of all packs of a store. Its rows are the packs' records, pack by pack, and lookups of many keys
work on arrays.

Example::

    index = PackIndex({path: read_pack(backend, path) for path in paths})
    index.stored(index.find(key, base_id)).record.codec
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from msft_store.format.key_table import Keys, KeyTable, Numbers, concatenate_keys
from msft_store.format.layout import MAX_GENERATION, Record
from msft_store.format.pack_footer import (
    NO_INDEX,
    PACK_HEADER,
    PACK_TRAILER,
    Footer,
    decode_footer,
    decode_header,
    decode_trailer,
    encode_footer,
    keys_of,
    pack_header,
)
from msft_store.storage.backend import Backend, Writer

PACKS = "packs"
_N = TypeVar("_N", bound=np.generic)
_SUFFIX = ".pack"
_TAIL = 1 << 16
"""Bytes to read first from the end of a pack; they hold the whole footer of most packs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredChunk:
    """A record and the path of its pack."""

    pack: str
    record: Record


class PackWriter:
    """Collects encoded chunks into one pack, which exists once :meth:`finalize` returns."""

    def __init__(self, writer: Writer, version: int) -> None:
        """Begin a pack of a version, that of the store."""
        self.records: list[Record] = []
        self._writer = writer
        writer.write(pack_header(version))

    @property
    def position(self) -> int:
        """Position of the next payload in the file."""
        return self._writer.position

    def append(self, record: Record, payload: bytes) -> None:
        """Add a chunk; the record's ``offset`` must be :attr:`position`."""
        self._writer.write(payload)
        self.records.append(record)

    def finalize(self) -> str:
        """Make the pack durable; return its path."""
        footer, check = encode_footer(self.records, self.position)
        path = pack_path(check)
        self._writer.write(footer)
        self._writer.finalize(path)
        return path


def list_packs(backend: Backend) -> list[str]:
    """Return the paths of all packs."""
    return [path for path in backend.list(PACKS) if path.endswith(_SUFFIX)]


def read_pack(backend: Backend, path: str) -> Footer:
    """Return the footer of a pack."""
    what, size = backend.describe(path), backend.size(path)
    start = max(size - _TAIL, 0)
    tail = backend.read(path, start, size - start)
    trailer = decode_trailer(tail[-PACK_TRAILER.size :], size, what)
    begin = tail if start == 0 else backend.read(path, 0, PACK_HEADER.size)
    version = decode_header(begin[: PACK_HEADER.size], what)
    at = trailer.offset - start
    data = tail[at : at + trailer.length] if at >= 0 else None
    if data is None:
        data = backend.read(path, trailer.offset, trailer.length)
    return decode_footer(data, trailer, what, version)


def is_misnamed(path: str, footer: Footer) -> bool:
    """Return True if a pack's name does not match its footer."""
    return path != pack_path(footer.check)


def pack_path(check: bytes) -> str:
    """Return the path of the pack whose footer has this digest."""
    return f"{PACKS}/{check.hex()}{_SUFFIX}"


def raise_generation(record: Record) -> Record:
    """Return a record for another pack, preferred to records that are otherwise equal.

    Without this, the arbitrary name of the pack would decide, and could select an unneeded record
    whose reference a gc has already deleted.
    """
    return replace(record, generation=min(record.generation + 1, MAX_GENERATION))


class PackIndex:
    """A snapshot of the records of all packs, with lookup by key."""

    def __init__(self, packs: Mapping[str, Footer]) -> None:
        self.packs = dict(sorted(packs.items()))
        self._paths = list(self.packs)
        footers = list(self.packs.values())
        self._starts = [0, *itertools.accumulate(map(len, footers))]
        self.keys = concatenate_keys([keys_of(footer.rows) for footer in footers])
        self.ref_keys: Keys = concatenate_keys([footer.rows["ref_key"] for footer in footers])
        self.lengths = self._column("length", np.uint32)
        self.dtypes = self._column("dtype", np.uint8)
        self.depths = self._column("depth", np.uint8)
        self._ages = MAX_GENERATION - self._column("generation", np.uint8)
        self._numbers: dict[str, int] = {}
        numbers = [np.array([*map(self._number, f.bases), -1], np.int32) for f in footers]
        self.bases = _concatenate_column(
            [
                number[np.minimum(footer.rows["base"], len(footer.bases))]
                for number, footer in zip(numbers, footers, strict=True)
            ],
            np.int32,
        )
        """Number of each row's base for :meth:`base_of`, or -1 for rows without a base."""
        self.explicit = self._column("reference", np.uint32) != NO_INDEX
        """Mask of the rows with an explicit reference: not one whole chunk, but spans."""
        self.refers_to_chunk = _concatenate_column(
            [footer.refers_to_chunk for footer in footers], np.bool_
        )
        self._tables: dict[int, KeyTable] = {}

    def __len__(self) -> int:
        return len(self.keys)

    def find(self, key: bytes, base: str | None) -> int:
        """Return the preferred row for a key, or -1; see :meth:`find_all`."""
        return self._table_of(base).get(key)

    def find_all(self, keys: Keys, base: str | None) -> Numbers:
        """Return the preferred row for each key, or -1 for keys without a row.

        Candidates are the rows that need ``base`` or no base. They are ordered by smallest depth,
        a copy of the base's chunk, no reference to another chunk, latest generation, smallest size,
        and name of the pack.
        """
        return self._table_of(base).find(keys)

    def mask_copies(self, rows: Numbers, base: str | None) -> NDArray[np.bool_]:
        """Return a mask of the rows that are copies of chunks of a base.

        They name the base although they have no reference, and serve if the base changed.
        """
        number = -1 if base is None else self._numbers.get(base, -1)
        copies: NDArray[np.bool_] = (self.depths[rows] == 0) & (self.bases[rows] == number)
        return copies & (number >= 0)

    def stored(self, row: int) -> StoredChunk:
        """Return the record of a row."""
        pack = bisect.bisect_right(self._starts, row) - 1
        path = self._paths[pack]
        return StoredChunk(pack=path, record=self.packs[path].record(row - self._starts[pack]))

    def slices(self) -> Iterator[tuple[str, slice]]:
        """Yield the path of each pack and the slice of its rows."""
        parts = map(slice, self._starts, self._starts[1:])
        yield from zip(self._paths, parts, strict=True)

    def base_of(self, number: int) -> str | None:
        """Return the id of a base by its number in :attr:`bases`."""
        return None if number < 0 else list(self._numbers)[number]

    def explicit_keys(self, row: int) -> list[bytes]:
        """Return the keys of the chunks that a row's explicit reference names."""
        reference = self.stored(row).record.reference
        return [span.key for span in reference] if isinstance(reference, tuple) else []

    def _number(self, base: str) -> int:
        return self._numbers.setdefault(base, len(self._numbers))

    def _column(self, name: str, dtype: type[_N]) -> NDArray[_N]:
        return _concatenate_column([footer.rows[name] for footer in self.packs.values()], dtype)

    def _table_of(self, base: str | None) -> KeyTable:
        number = self._numbers.get(base, -1) if base is not None else -1
        if number in self._tables:
            return self._tables[number]
        rows = np.flatnonzero((self.bases == -1) | (self.bases == number))
        depths, ages, lengths = self.depths[rows], self._ages[rows], self.lengths[rows]
        other = ~self.mask_copies(rows, base)
        preference = (depths, other, self.refers_to_chunk[rows], ages, lengths)
        table = self._tables[number] = KeyTable(self.keys[rows], rows, preference)
        return table


def _concatenate_column(parts: Sequence[NDArray[Any]], dtype: type[_N]) -> NDArray[_N]:
    return np.concatenate([np.empty(0, dtype), *(part.astype(dtype, copy=False) for part in parts)])
