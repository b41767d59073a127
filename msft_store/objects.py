"""Chunks by key: packs, their records, and the bases that records refer to.

A key may have several representations. A checkpoint of base B may use those that need no base or B
itself, so that no checkpoint ever depends on a base that is not its own. What a record refers to is
looked up with the record's base, not the checkpoint's: a record that needs no base serves every
checkpoint. References only point to what is less deep (``Record.depth``), so they are acyclic, and
restoring takes at most ``MAX_DEPTH + 1`` decodings a chunk.

Example::

    objects = Objects(backend)
    data = objects.read(key, size, dtype, base_id)        # verified against the key
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from msft_store import codecs
from msft_store.backend import Backend, Writer
from msft_store.base_reader import BaseReader
from msft_store.bases import Base, list_bases, path_of_base, read_base
from msft_store.dtypes import DType, by_code
from msft_store.errors import (
    CorruptedError,
    StoreError,
    UnknownCheckpointError,
)
from msft_store.format import (
    KEY_BYTES,
    PACK_HEADER,
    PACK_TRAILER,
    BaseSpan,
    ChunkSpan,
    Record,
    chunk_key,
    decode_footer,
    decode_trailer,
    encode_footer,
    pack_header,
)
from msft_store.kernels import Bytes

FOLDER = "packs"
_SUFFIX = ".pack"


@dataclass(frozen=True, kw_only=True, slots=True)
class Stored:
    """A record and the pack that it stands in."""

    pack: str
    """Path of the pack."""
    record: Record


class PackWriter:
    """Collects encoded chunks into one pack, which exists once :meth:`publish` returns."""

    def __init__(self, writer: Writer) -> None:
        self.records: list[Record] = []
        self._writer = writer
        writer.write(pack_header())

    @property
    def position(self) -> int:
        """Where the next payload will begin."""
        return self._writer.position

    def append(self, record: Record, payload: bytes) -> None:
        """Add a chunk; the record's ``offset`` must be :attr:`position`."""
        self._writer.write(payload)
        self.records.append(record)

    def publish(self) -> str:
        """Make the pack durable; return its path."""
        footer, identity = encode_footer(self.records, self.position)
        path = f"{FOLDER}/{identity}{_SUFFIX}"
        self._writer.write(footer)
        self._writer.publish(path)
        return path


def read_pack(backend: Backend, path: str) -> list[Record]:
    """Return the records of a pack."""
    what, size = backend.describe(path), backend.size(path)
    tail = max(size - PACK_TRAILER.size, 0)
    trailer = decode_trailer(backend.read(path, tail, PACK_TRAILER.size), size, what)
    offset, length, decoded, count, check = trailer
    if backend.read(path, 0, PACK_HEADER.size) != pack_header():
        raise CorruptedError(f"{what} does not begin like a pack of this version")
    records = decode_footer(backend.read(path, offset, length), decoded, count, check, what)
    if any(record.offset + record.length > offset for record in records):
        raise CorruptedError(f"the footer of {what} points beyond its payloads")
    return records


class Objects:
    """All chunks of a store, read and verified by key."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._packs: dict[str, list[Record]] = {}
        self._damaged: dict[str, StoreError] = {}
        self._index: dict[bytes, list[Stored]] = {}
        self._readers: dict[str, BaseReader] = {}
        self._refreshing = threading.Lock()

    @property
    def packs(self) -> Mapping[str, list[Record]]:
        """The records of each pack, by its path."""
        return self._packs

    @property
    def damaged(self) -> Mapping[str, StoreError]:
        """Packs and bases that cannot be read, by path; they are left out of everything else."""
        return self._damaged

    def refresh(self) -> None:
        """Read what other processes added or removed since."""
        with self._refreshing:
            paths = {p for p in self._backend.list(FOLDER) if p.endswith(_SUFFIX)}
            packs = {path: self._packs[path] for path in self._packs if path in paths}
            damaged: dict[str, StoreError] = {}
            for path in sorted(paths - packs.keys()):
                try:
                    packs[path] = read_pack(self._backend, path)
                except StoreError as error:
                    # One that a gc removed since it was listed is no loss.
                    if self._backend.exists(path):
                        damaged[path] = error
            for identity in list_bases(self._backend):
                if identity not in self._readers:
                    try:
                        self.add_base(read_base(self._backend, identity))
                    except StoreError as error:
                        damaged[path_of_base(identity)] = error
            if packs.keys() != self._packs.keys():
                index: dict[bytes, list[Stored]] = {}
                for path, records in packs.items():
                    for record in records:
                        index.setdefault(record.key, []).append(Stored(pack=path, record=record))
                self._index = index
            self._packs, self._damaged = packs, damaged

    def add_base(self, base: Base) -> None:
        """Make a base known that was just recorded, or recorded anew in another place."""
        # Replaced whole, for other threads read it at the same time.
        self._readers = {**self._readers, base.id: BaseReader(self._backend, base)}

    def bases(self) -> dict[str, Base]:
        """Return all bases by id."""
        return {identity: reader.base for identity, reader in self._readers.items()}

    def base(self, identity: str) -> BaseReader:
        """Return the reader of a base."""
        try:
            return self._readers[identity]
        except KeyError:
            damage = self._damaged.get(path_of_base(identity))
            if damage is not None:
                raise damage from None
            raise UnknownCheckpointError(
                f"this store has no base {identity[:12]}; add it with add-base"
            ) from None

    def in_base(self, key: bytes, base: str | None) -> BaseSpan | None:
        """Return where a chunk stands unchanged in a base."""
        return None if base is None else self.base(base).chunks.get(key)

    def find(self, key: bytes, base: str | None) -> Stored | None:
        """Return the representation to decode a key with.

        The shallowest; of those, one that needs no other chunk; of those, the smallest.
        """
        usable = [s for s in self._index.get(key, ()) if s.record.base in (None, base)]
        return min(usable, key=_preference, default=None)

    def read(self, key: bytes, size: int, dtype: DType, base: str | None) -> Bytes:
        """Return the ``size`` bytes of a chunk, verified; :class:`CorruptedError` otherwise."""
        span = self.in_base(key, base)
        if span is not None and base is not None:
            data = self.base(base).read_span(span, size // dtype.size, dtype)
            self.base(base).verify(span, data, key)
            return data
        stored = self.find(key, base)
        if stored is not None:
            with contextlib.suppress(StoreError):
                return self._decode(stored, size, dtype)
        # A gc may have moved the chunk, or what it refers to, since it was indexed.
        self.refresh()
        stored = self.find(key, base)
        if stored is None:
            hint = "".join(f"; {error}" for error in self._damaged.values())
            raise CorruptedError(
                f"chunk {key.hex()} is in no pack of {self._backend.describe('')}{hint}"
            )
        return self._decode(stored, size, dtype)

    def _reference(self, record: Record) -> Bytes | None:
        if record.reference is None and record.ref_key == bytes(KEY_BYTES):
            return None
        dtype = by_code(record.dtype)
        if isinstance(record.reference, BaseSpan):
            if record.base is None:
                raise CorruptedError(f"chunk {record.key.hex()} refers to an unnamed base")
            reader = self.base(record.base)
            return reader.read_span(record.reference, record.size // dtype.size, dtype)
        whole = (ChunkSpan(key=record.ref_key, start=0, length=record.size),)
        spans = record.reference or whole
        parts = [self._read_part(span, record, dtype) for span in spans]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _read_part(self, span: ChunkSpan, record: Record, dtype: DType) -> Bytes:
        base = record.base
        located, stored = self.in_base(span.key, base), self.find(span.key, base)
        if located is not None and base is not None:
            size = self.base(base).chunk_bytes(located)
        elif stored is None:
            raise CorruptedError(f"chunk {span.key.hex()}, a reference, is in no pack")
        elif stored.record.depth >= record.depth:
            raise CorruptedError(f"chunk {record.key.hex()} refers to one that is no less deep")
        else:
            size = stored.record.size
        return self.read(span.key, size, dtype, base)[span.start : span.start + span.length]

    def _decode(self, stored: Stored, size: int, dtype: DType) -> Bytes:
        record, what = stored.record, self._backend.describe(stored.pack)
        if record.size != size or record.dtype != dtype.code:
            raise CorruptedError(f"chunk {record.key.hex()} in {what} has another size or dtype")
        reference = self._reference(record)
        try:
            payload = self._backend.read(stored.pack, record.offset, record.length)
            data = codecs.decode(record.codec, payload, size, reference, dtype)
        except ValueError as error:
            data, reason = None, str(error)
        else:
            reason = "its content does not match its key"
        if data is not None and chunk_key(data.data, dtype) == record.key:
            return data
        if reference is not None and chunk_key(reference.data, dtype) != record.ref_key:
            self._blame_reference(record)
        raise CorruptedError(f"chunk {record.key.hex()} in {what} is damaged: {reason}")

    def _blame_reference(self, record: Record) -> None:
        if isinstance(record.reference, BaseSpan) and record.base is not None:
            count = record.size // by_code(record.dtype).size
            self.base(record.base).verify_span(record.reference, count)
        raise CorruptedError(f"the reference of chunk {record.key.hex()} is damaged")


def _preference(stored: Stored) -> tuple[int, bool, int, str]:
    record = stored.record
    return record.depth, record.refers_to_chunk, record.length, stored.pack


def closure(
    objects: Objects, keys: Iterable[bytes], base: str | None
) -> tuple[set[Stored], set[bytes]]:
    """Return what restoring chunks needs: the records in packs, and the keys that are nowhere."""
    live: set[Stored] = set()
    missing: set[bytes] = set()
    seen: set[tuple[bytes, str | None]] = set()
    pending = [(key, base) for key in keys]
    while pending:
        key, base = pending.pop()
        if (key, base) in seen or objects.in_base(key, base) is not None:
            continue
        seen.add((key, base))
        stored = objects.find(key, base)
        if stored is None:
            missing.add(key)
            continue
        live.add(stored)
        record = stored.record
        if isinstance(record.reference, tuple):
            pending.extend((span.key, record.base) for span in record.reference)
        elif record.refers_to_chunk:
            pending.append((record.ref_key, record.base))
    return live, missing
