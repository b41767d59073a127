"""Read chunks by key from packs and bases, and verify them.

A key may have several representations. Invariants: a checkpoint of base B uses only
representations that need B or no base, so it never depends on another base. References are looked
up with the base of the record, not of the checkpoint, so a record without a base serves every
checkpoint. A reference always has a smaller ``Record.depth``, so references are acyclic and
restoring a chunk takes at most ``MAX_DEPTH + 1`` decodings.

Example::

    objects = ChunkStore(backend)
    data = objects.read(key, size, dtype, base_id)        # verified against the key
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Container, Mapping

import numpy as np
from numpy.typing import NDArray

from msft_store.codec import codecs
from msft_store.codec.kernels import Bytes
from msft_store.codec.undo import Undo
from msft_store.errors import (
    REPAIR_HINT,
    CorruptedError,
    StoreError,
    UnknownCheckpointError,
    strip_frames,
)
from msft_store.format.dtypes import DType, dtype_by_code
from msft_store.format.key_table import Keys
from msft_store.format.layout import (
    CHUNK_BYTES,
    KEY_BYTES,
    BaseSpan,
    ChunkSpan,
    Record,
    ViewSpan,
    chunk_key,
)
from msft_store.format.pack_footer import Footer
from msft_store.objects.base_reader import BaseReader
from msft_store.objects.bases import Base, Stamp, base_path, list_bases, read_base
from msft_store.objects.packs import PackIndex, StoredChunk, list_packs, read_pack
from msft_store.storage.backend import Backend


class _Scratch(threading.local):
    """A reused buffer for each thread, because allocating takes longer than decoding."""

    def __init__(self) -> None:
        self.buffer: Bytes = np.empty(CHUNK_BYTES, np.uint8)


class ChunkStore:
    """All chunks of a store, read and verified by key."""

    def __init__(
        self, backend: Backend, read: Callable[[Backend, str], Footer] = read_pack
    ) -> None:
        """Create a reader; ``read`` returns the footer of the pack at a path."""
        self._backend = backend
        self._read_pack = read
        self._snapshot = PackIndex({})
        self._damaged_packs: dict[str, StoreError] = {}
        self._damaged_bases: dict[str, StoreError] = {}
        self._readers: dict[str, BaseReader] = {}
        # Numbers of refreshes: the last one, and those after which packs and bases were read.
        self._refreshes, self._packs_read, self._bases_read = 1, 0, 0
        self._reading = threading.RLock()
        self._scratch = _Scratch()
        self._sound: dict[tuple[str, int], tuple[Stamp, ...]] = {}

    @property
    def index(self) -> PackIndex:
        """Index of all packs, not older than the last :meth:`refresh`."""
        if self._packs_read != self._refreshes:
            with self._reading:
                self._read_packs()
        return self._snapshot

    @property
    def packs(self) -> Mapping[str, Footer]:
        """Footers of all packs, by path."""
        return self.index.packs

    @property
    def damaged(self) -> Mapping[str, StoreError]:
        """Errors of unreadable packs and bases, by path; all other results leave these out."""
        with self._reading:
            self._read_packs()
            self._read_bases()
        return {**self._damaged_packs, **self._damaged_bases}

    def refresh(self) -> None:
        """Reread packs and bases on the next access, to see changes of other processes."""
        with self._reading:
            self._refreshes += 1

    def _read_packs(self) -> None:
        refreshes, known = self._refreshes, self._snapshot.packs
        if self._packs_read == refreshes:
            return
        paths = list_packs(self._backend)
        packs = {path: known[path] for path in paths if path in known}
        damaged: dict[str, StoreError] = {}
        for path in paths:
            try:
                if path not in known:
                    packs[path] = self._read_pack(self._backend, path)
            except StoreError as error:
                # A pack that a gc deleted after the listing is not damaged.
                if self._backend.exists(path):
                    damaged[path] = strip_frames(error)
        if packs.keys() != known.keys():
            self._snapshot = PackIndex(packs)
        self._damaged_packs, self._packs_read = damaged, refreshes

    def _read_bases(self) -> None:
        refreshes = self._refreshes
        if self._bases_read == refreshes:
            return
        damaged: dict[str, StoreError] = {}
        for identity in list_bases(self._backend):
            if identity not in self._readers:
                try:
                    self.add_base(read_base(self._backend, identity))
                except StoreError as error:
                    damaged[base_path(identity)] = strip_frames(error)
        self._damaged_bases, self._bases_read = damaged, refreshes

    def add_base(self, base: Base) -> None:
        """Add a base that was just recorded, or replace it after it was relocated."""
        # Replace the dictionary, because other threads may read it at the same time.
        self._readers = {**self._readers, base.id: BaseReader(self._backend, base)}

    def bases(self) -> dict[str, Base]:
        """Return all bases by id."""
        if self._bases_read != self._refreshes:
            with self._reading:
                self._read_bases()
        return {identity: reader.base for identity, reader in self._readers.items()}

    def base(self, identity: str) -> BaseReader:
        """Return the reader of a base."""
        if identity not in self._readers:
            self.bases()
        try:
            return self._readers[identity]
        except KeyError:
            damage = self._damaged_bases.get(base_path(identity))
            if damage is not None:
                raise damage from None
            raise UnknownCheckpointError(
                f"this store has no base {identity[:12]}; add it with add-base"
            ) from None

    def find_in_base(self, key: bytes, base: str | None) -> BaseSpan | None:
        """Return the position of an equal chunk in a base, or ``None``."""
        return None if base is None else self.base(base).chunks.get(key)

    def is_in_base(self, key: bytes, base: str | None) -> bool:
        """Return True if a base's file has an equal chunk now; the first call reads it.

        A save must ask this before it relies on the base. This thread's scratch is overwritten.
        """
        if base is None or self.find_in_base(key, base) is None:
            return False
        return self.base(base).holds(key, self._scratch.buffer)

    def mask_in_base(self, keys: Keys, base: str | None) -> NDArray[np.bool_]:
        """Return a mask of the keys whose chunks are in a base."""
        return np.zeros(len(keys), bool) if base is None else self.base(base).contains(keys)

    def find(self, key: bytes, base: str | None) -> StoredChunk | None:
        """Return the representation that :meth:`PackIndex.find_all` prefers, or ``None``.

        For a chunk of the base, it is a copy, which serves if the base changed.
        """
        index = self.index
        row = index.find(key, base)
        if row >= 0 and self.find_in_base(key, base) is not None:
            row = row if index.mask_copies(np.array([row]), base)[0] else -1
        return None if row < 0 else index.stored(row)

    def find_needed(
        self, index: PackIndex, keys: Keys, base: str | None
    ) -> tuple[NDArray[np.int64], Keys]:
        """Return the rows that keys need, and the keys that are in no pack and in no base.

        A copy of a base's chunk is needed too, as nobody knows how long the base stays as it is.
        """
        rows, in_base = index.find_all(keys, base), self.mask_in_base(keys, base)
        found = rows >= 0
        copies = rows[found & in_base]
        needed = [rows[found & ~in_base], copies[index.mask_copies(copies, base)]]
        return np.concatenate(needed), keys[~found & ~in_base]

    def has_all_references(self, record: Record) -> bool:
        """Return True if all chunks that a record refers to, directly or not, exist.

        This always holds for records that a checkpoint needs. A gc may delete the references of
        other records.
        """
        for key in record.chunk_keys:
            if self.find_in_base(key, record.base) is None:
                found = self.find(key, record.base)
                if found is None or found.record.depth >= record.depth:
                    return False
                if not self.has_all_references(found.record):
                    return False
        return True

    def read(
        self, key: bytes, size: int, dtype: DType, base: str | None, *, again: bool = True
    ) -> Bytes:
        """Return the ``size`` verified bytes of a chunk; :class:`CorruptedError` on damage."""
        out: Bytes = np.empty(size, np.uint8)
        self.read_into(out, key, dtype, base, again=again)
        return out

    def read_into(
        self, out: Bytes, key: bytes, dtype: DType, base: str | None, *, again: bool = True
    ) -> None:
        """Fill ``out`` with the verified bytes of a chunk; undefined after an error.

        With ``again`` a failure makes it read the index and the chunk a second time. References
        are read without, or else each level of a damaged chain would double the time.
        """
        span, changed = self.find_in_base(key, base), None
        if span is not None and base is not None:
            try:
                self.base(base).read_span_into(span, out, dtype)
                self.base(base).verify(span.tensor, out, key)
                return
            except StoreError as error:
                if self.find(key, base) is None:
                    raise
                changed = error
        stored = self.find(key, base)
        if again:
            if stored is not None:
                with contextlib.suppress(StoreError):
                    self._decode(stored, out, dtype)
                    return
            # A gc may have moved the chunk or its references since the index was read.
            self.refresh()
            stored = self.find(key, base)
        if stored is None:
            hint = "".join(f"; {error}" for error in self.damaged.values())
            raise changed or CorruptedError(
                f"chunk {key.hex()} is in no pack of {self._backend.describe('')}{hint}; "
                f"{REPAIR_HINT}"
            )
        try:
            self._decode(stored, out, dtype)
        except StoreError as error:
            if changed is None:
                raise
            text = f"{changed}; the store's copy of it cannot be read: {error}"
            raise type(changed)(text, file=changed.file) from changed.__cause__

    def verify(self, stored: StoredChunk) -> None:
        """Decode one representation of a chunk, only to raise the errors of reading it."""
        record = stored.record
        self._decode(stored, np.empty(record.size, np.uint8), dtype_by_code(record.dtype))

    def verify_once(self, stored: StoredChunk) -> None:
        """Verify a representation unless an earlier call has and its base is as it was then."""
        record = stored.record
        place, base = (stored.pack, record.offset), record.base if record.depth else None
        stamp = () if base is None else self.base(base).stamp()
        if stamp is None or self._sound.get(place) != stamp:
            self.verify(stored)
            if stamp is not None:
                self._sound[place] = stamp

    def scratch(self, size: int) -> Bytes:
        """Return this thread's buffer for a reference; each call returns the same memory."""
        return self._scratch.buffer[:size]

    def _decode(self, stored: StoredChunk, out: Bytes, dtype: DType) -> None:
        with contextlib.suppress(StoreError, ValueError):
            self._fill(stored, out, dtype)
            if chunk_key(out.data, dtype) == stored.record.key:
                return
        self._decode_carefully(stored, out, dtype)

    def _fill(self, stored: StoredChunk, out: Bytes, dtype: DType) -> None:
        """Decode a chunk and what it refers to, unverified: the key of the result proves it all."""
        self._check_fits(stored, out, dtype)
        record = stored.record
        spans = self._read_base_reference(record, out)
        if len(spans) == 1 and spans[0].start == 0:
            (span,), base = spans, record.base
            located = None if base is None else self.find_in_base(span.key, base)
            if located is not None and base is not None:
                self.base(base).read_span_into(located, out, dtype)
            else:
                found = self.find(span.key, base)
                if found is None or found.record.depth >= record.depth:
                    raise CorruptedError(f"the reference of chunk {record.key.hex()} is damaged")
                self._fill(found, out, dtype)
        elif spans:
            self._read_chunk_reference(record, spans, out)
        self._apply(stored, out, dtype)

    def _decode_carefully(self, stored: StoredChunk, out: Bytes, dtype: DType) -> None:
        """Verify each level of a chain, to find the damaged file and name it."""
        self._check_fits(stored, out, dtype)
        record, what = stored.record, self._backend.describe(stored.pack)
        self._reference(record, out)
        try:
            self._apply(stored, out, dtype)
        except ValueError as error:
            reason = str(error)
        else:
            if chunk_key(out.data, dtype) == record.key:
                return
            reason = "its content does not match its key"
        if record.ref_key != bytes(KEY_BYTES):
            # Decoding overwrote the reference, so read it again to find the damaged chunk.
            self._reference(record, out)
            if chunk_key(out.data, dtype) != record.ref_key:
                self._blame_reference(record)
        raise CorruptedError(
            f"chunk {record.key.hex()} in {what} is damaged: {reason}; {REPAIR_HINT}", file=what
        )

    def find_steps(
        self, key: bytes, base: str | None, known: Container[bytes]
    ) -> tuple[bytes, list[StoredChunk]]:
        """Return the differences that lead to a chunk, in order, and the key where they begin.

        They begin at the nearest known key, or else at content that is no difference itself.
        """
        steps: list[StoredChunk] = []
        while key not in known:
            stored = None if self.find_in_base(key, base) is not None else self.find(key, base)
            if stored is None or stored.record.ref_key == bytes(KEY_BYTES):
                break
            if steps and stored.record.depth >= steps[0].record.depth:
                break
            steps.insert(0, stored)
            key, base = stored.record.ref_key, stored.record.base
            if stored.record.reference is not None:
                break
        return key, steps

    def fill_reference(self, stored: StoredChunk, out: Bytes) -> None:
        """Fill ``out`` with the reference of a chunk; bytes of a base are not verified."""
        self._reference(stored.record, out)

    def apply(self, stored: StoredChunk, out: Bytes, dtype: DType) -> Undo:
        """Replace the reference in ``out`` by the chunk, unverified; return the way back.

        :class:`ValueError` or :class:`StoreError` on some damage.
        """
        self._check_fits(stored, out, dtype)
        record = stored.record
        payload = self._backend.read(stored.pack, record.offset, record.length)
        return codecs.codec_by_code(record.codec).decode_with_undo(payload, out, dtype)

    def _check_fits(self, stored: StoredChunk, out: Bytes, dtype: DType) -> None:
        record = stored.record
        if record.size != out.size or record.dtype != dtype.code:
            what = self._backend.describe(stored.pack)
            raise CorruptedError(
                f"chunk {record.key.hex()} in {what} has another size or dtype", file=what
            )

    def _apply(self, stored: StoredChunk, out: Bytes, dtype: DType) -> None:
        """Replace the reference in ``out`` by the chunk; :class:`ValueError` on some damage."""
        record = stored.record
        payload = self._backend.read(stored.pack, record.offset, record.length)
        codecs.codec_by_code(record.codec).decode_into(payload, out, dtype)

    def _reference(self, record: Record, out: Bytes) -> None:
        """Fill ``out`` with the reference of a record, if it has one."""
        spans = self._read_base_reference(record, out)
        if spans:
            self._read_chunk_reference(record, spans, out)

    def _read_base_reference(self, record: Record, out: Bytes) -> tuple[ChunkSpan, ...]:
        """Fill ``out`` if a record refers to a base; else return the chunks that it refers to."""
        if record.reference is None and record.ref_key == bytes(KEY_BYTES):
            if codecs.codec_by_code(record.codec).needs_reference:
                raise CorruptedError(f"chunk {record.key.hex()} needs a reference but has none")
            return ()
        if isinstance(record.reference, BaseSpan | ViewSpan):
            if record.base is None:
                raise CorruptedError(f"chunk {record.key.hex()} refers to an unnamed base")
            reader, dtype = self.base(record.base), dtype_by_code(record.dtype)
            if isinstance(record.reference, ViewSpan):
                reader.read_view_into(record.reference, out, dtype)
            else:
                reader.read_span_into(record.reference, out, dtype)
            return ()
        return record.reference or (ChunkSpan(key=record.ref_key, start=0, length=record.size),)

    def _read_chunk_reference(
        self, record: Record, spans: tuple[ChunkSpan, ...], out: Bytes
    ) -> None:
        """Fill ``out`` with verified parts of the chunks that a record refers to."""
        base = record.base
        for span in spans:
            stored = None if self.find_in_base(span.key, base) else self.find(span.key, base)
            if stored is not None and stored.record.depth >= record.depth:
                raise CorruptedError(
                    f"chunk {record.key.hex()} refers to a chunk of the same or a greater depth"
                )
        self.read_parts_into(spans, out, dtype_by_code(record.dtype), base, again=False)

    def read_parts_into(
        self,
        spans: tuple[ChunkSpan, ...],
        out: Bytes,
        dtype: DType,
        base: str | None,
        *,
        again: bool = True,
    ) -> None:
        """Fill ``out`` with consecutive parts of verified chunks."""
        at = 0
        for span in spans:
            size, part = self._chunk_size(span, base), out[at : at + span.length]
            if span.start == 0 and span.length == size == part.size:
                self.read_into(part, span.key, dtype, base, again=again)
            else:
                data = self.read(span.key, size, dtype, base, again=again)
                data = data[span.start :][: span.length]
                if data.size != part.size:
                    raise CorruptedError(f"a reference goes beyond chunk {span.key.hex()}")
                part[:] = data
            at += span.length
        if at != out.size:
            raise CorruptedError("the references of a chunk have another length than the chunk")

    def _chunk_size(self, span: ChunkSpan, base: str | None) -> int:
        located, stored = self.find_in_base(span.key, base), self.find(span.key, base)
        if located is not None and base is not None:
            return self.base(base).chunk_bytes(located)
        if stored is None:
            raise CorruptedError(f"chunk {span.key.hex()}, a reference, is in no pack")
        return stored.record.size

    def _blame_reference(self, record: Record) -> None:
        if record.base is not None:
            dtype = dtype_by_code(record.dtype)
            if isinstance(record.reference, BaseSpan):
                count = record.size // dtype.size
                self.base(record.base).verify_span(record.reference, count)
            elif isinstance(record.reference, ViewSpan):
                data: Bytes = np.empty(record.size, np.uint8)
                self.base(record.base).read_view_into(record.reference, data, dtype, verified=True)
        raise CorruptedError(f"the reference of chunk {record.key.hex()} is damaged")
