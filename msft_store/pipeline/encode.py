"""Encode a state dict in parallel, in order, in bounded memory.

Invariants: chunks are encoded by threads but written in a fixed order, so the output does not
depend on the number of threads. At most a few chunks per thread are in memory, for any size,
device and layout of the tensors. Every payload is proven to restore its chunk before it is written.

Example::

    options = EncodeOptions(base=base.id, max_depth=16)
    table, totals = encode_state(objects, tensors, begin_pack, options=options, tables=[parent])
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch

from msft_store.codec import codecs
from msft_store.codec.kernels import Bytes
from msft_store.errors import (
    BaseError,
    CorruptedError,
    InvalidInputError,
    StoreError,
    is_damage,
)
from msft_store.format.dtypes import DType
from msft_store.format.layout import (
    CHUNK_BYTES,
    KEY_BYTES,
    MAX_GENERATION,
    BaseSpan,
    ChunkSpan,
    Record,
    References,
    ViewSpan,
    chunk_key,
)
from msft_store.format.mapping import NOTHING, BaseMapping
from msft_store.objects.chunks import ChunkStore
from msft_store.objects.manifest import Piece, TensorEntry, chunks_of
from msft_store.objects.packs import PackWriter, StoredChunk
from msft_store.objects.reference_planner import Reference, ReferencePlanner, Table
from msft_store.pipeline.parallel import in_order
from msft_store.tensors.boxes import Box, whole_box
from msft_store.tensors.bytes import has_plain_bytes, memory_key, read_elements, view_bytes
from msft_store.tensors.resident import Change, Compared

_FEWEST, _MOST = 3, 8
"""Numbers of chunks in a sample, for small and for large checkpoints."""
_SAMPLE_BYTES = 256 << 10
"""Bytes in the middle of a chunk that stand for the chunk."""


@dataclass(frozen=True, kw_only=True)
class Content:
    """A tensor, or a box of it, to encode."""

    name: str
    entry: TensorEntry
    """The whole tensor, with the box as its only piece, without keys."""
    read: Callable[[int, int], Bytes]
    """Returns the bytes of a range of the piece's elements."""

    @property
    def piece(self) -> Piece:
        """The box."""
        return self.entry.pieces[0]


@dataclass(frozen=True, kw_only=True)
class Place:
    """A chunk by its place in a tensor."""

    name: str
    entry: TensorEntry
    piece: int
    number: int
    size: int
    """Bytes of the chunk."""
    read: Callable[[], Bytes]
    """Returns them."""
    stored: int = 0
    """Bytes of its record, if it is stored."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """One chunk to encode."""

    read: Callable[[], Bytes]
    """Returns its bytes."""
    dtype: DType
    reference: Reference | None
    """The content to encode a difference against; ``None`` if there is none."""
    change: Change | None = None
    """The changes against the reference, if a comparison on the device found them."""


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """One encoded chunk; ``record`` is ``None`` if the store has the chunk already."""

    key: bytes
    size: int
    stored_bytes: int
    record: Record | None = None
    payload: bytes = b""


@dataclass(frozen=True, kw_only=True)
class Totals:
    """Sizes of the chunks of a save, in bytes."""

    stored_bytes: int
    unreferenced_bytes: int


@dataclass(frozen=True, kw_only=True)
class EncodeOptions:
    """The settings that all chunks of one save share."""

    base: str | None
    """Id of the base that the checkpoint belongs to."""
    max_depth: int
    """Largest depth of a record."""
    mapping: BaseMapping = NOTHING
    """Counterparts of the tensors in the base."""
    compared: Compared | None = None
    """Changes that a :class:`msft_store.Resident` found on the device, by tensor and chunk."""


def make_planner(
    objects: ChunkStore, options: EncodeOptions, tables: Sequence[Table]
) -> ReferencePlanner:
    """Return a planner of references in these tables, for the settings of a save."""
    return ReferencePlanner(
        objects, options.base, tables, options.mapping, max_depth=options.max_depth
    )


class Encoder:
    """Encodes chunks, each against the reference that a planner chose for it."""

    def __init__(self, objects: ChunkStore, options: EncodeOptions, *, alone: bool = False) -> None:
        """Set ``alone`` to encode again the stored chunks that refer to another chunk."""
        self._objects = objects
        self._base = options.base
        self._alone = alone
        self._compared = options.compared or {}

    def work(self, place: Place, planner: ReferencePlanner) -> Work:
        """Return the work on a chunk against the reference that a planner chooses."""
        return Work(
            read=place.read,
            dtype=place.entry.dtype,
            reference=planner.reference(place.name, place.entry, place.piece, place.number),
            change=self._compared.get((place.name, place.number)),
        )

    def encode(self, work: Work) -> Encoded:
        """Return a chunk in its smallest representation, or the one that the store has."""
        data, dtype = work.read(), work.dtype
        key, size = chunk_key(data.data, dtype), data.size
        stored, reference = self._objects.find(key, self._base), work.reference
        in_base = self._objects.find_in_base(key, self._base) is not None
        if in_base:
            if self._objects.is_in_base(key, self._base):
                length = 0 if stored is None else stored.record.length
                return Encoded(key=key, size=size, stored_bytes=length)
            # Only a copy that needs nothing can serve in place of the base's chunk.
            reference = None
        if stored is not None and not self._is_intact(stored):
            # Only a record that refers to no chunk is certain to be preferred to the damaged one.
            reference = None
        elif stored is not None and not (self._alone and _would_replace(reference, stored.record)):
            return Encoded(key=key, size=size, stored_bytes=stored.record.length)
        old, ref_key = None, bytes(KEY_BYTES)
        if reference is not None:
            old = self._objects.scratch(size)
            try:
                ref_key = self._read(reference, old, dtype)
            except StoreError as error:
                self._allow(error)
                # A difference against a damaged reference could never be restored.
                old = reference = None
        change = work.change if work.change and work.change.reference == ref_key else None
        found = change.found if change else None
        if old is not None and found is None and key != ref_key:
            found = codecs.find_changes(data, old, dtype)
        codec, payload = codecs.encode(data, old, dtype, found=found)
        if not codec.needs_reference:
            reference, ref_key = None, bytes(KEY_BYTES)
        # The reference is no longer needed, so its memory is reused.
        decoded = self._objects.scratch(size) if old is None else old
        if not codec.restores(payload, data, decoded, dtype, found):
            if change is not None:
                # The weights changed after the comparison, so encode their present content.
                return self.encode(replace(work, change=None))
            raise CorruptedError(
                f"the {codec.name} codec did not restore a chunk of {size} bytes; "
                "nothing was saved. This is a fault of the program or of the memory"
            )
        record = Record(
            key=key,
            offset=0,
            length=len(payload),
            size=size,
            codec=codec.code,
            dtype=dtype.code,
            depth=0 if reference is None else reference.depth,
            base=self._base if in_base else None if reference is None else reference.base,
            ref_key=ref_key,
            reference=_explicit_span(reference),
            generation=0 if stored is None else min(stored.record.generation + 1, MAX_GENERATION),
        )
        return Encoded(
            key=key, size=size, stored_bytes=len(payload), record=record, payload=payload
        )

    def estimate(self, place: Place, references: Sequence[Reference | None]) -> list[float]:
        """Return about how many bytes a chunk takes against each of several references."""
        data, dtype, sizes = place.read(), place.entry.dtype, []
        start = max(place.size - _SAMPLE_BYTES, 0) // 2 & ~63
        part = slice(start, start + _SAMPLE_BYTES)
        for reference in references:
            old = None if reference is None else self._objects.scratch(place.size)
            if reference is not None and old is not None:
                try:
                    self._read(reference, old, dtype)
                except StoreError as error:
                    self._allow(error)
                    old = None
            _, payload = codecs.encode(data[part], None if old is None else old[part], dtype)
            sizes.append(len(payload) * place.size / data[part].size)
        return sizes

    def _is_intact(self, stored: StoredChunk) -> bool:
        """Return True if a stored chunk is intact; read it once to find out."""
        if not self._objects.has_all_references(stored.record):
            return False
        try:
            self._objects.verify_once(stored)
        except StoreError as error:
            self._allow(error)
            return False
        return True

    def _allow(self, error: StoreError) -> None:
        """Raise an error unless bytes are lost that the encoder can do without."""
        if self._base is not None and isinstance(error, BaseError):
            self._objects.base(self._base).warn_of(error)
        elif not is_damage(error):
            raise error

    def _read(self, reference: Reference, out: Bytes, dtype: DType) -> bytes:
        """Read a reference and return its key; verify bytes that come from the base."""
        span, base = reference.span, reference.base
        if isinstance(span, ChunkSpan):
            self._objects.read_into(out, span.key, dtype, self._base)
            return span.key
        if isinstance(span, tuple):
            self._objects.read_parts_into(span, out, dtype, self._base)
            return chunk_key(out.data, dtype)
        if base is None:
            raise InvalidInputError("a reference in a base must name the base")
        if isinstance(span, BaseSpan):
            return self._objects.base(base).read_verified_into(span, out, dtype)
        self._objects.base(base).read_view_into(span, out, dtype, verified=True)
        return chunk_key(out.data, dtype)


def _would_replace(reference: Reference | None, stored: Record) -> bool:
    """Return True if a record with this reference is preferred and drops the old reference."""
    if not stored.refers_to_chunk or reference is None:
        return stored.refers_to_chunk
    if isinstance(reference.span, BaseSpan | ViewSpan):
        return True
    if isinstance(reference.span, ChunkSpan) and reference.span.key == stored.ref_key:
        return False
    # At equal depth a later generation is preferred, unless the generation is at its limit.
    return (reference.depth, stored.generation == MAX_GENERATION) <= (stored.depth, False)


def _explicit_span(reference: Reference | None) -> References | None:
    # If the reference is one whole chunk, ref_key in the record names it.
    if reference is None or isinstance(reference.span, ChunkSpan):
        return None
    return reference.span


class ChunkWriter:
    """Write each encoded chunk once, to a pack that is created for the first one."""

    def __init__(self, begin: Callable[[], PackWriter]) -> None:
        self._begin = begin
        self._pack: PackWriter | None = None
        self._stored: dict[bytes, int] = {}
        self._unreferenced = 0

    @property
    def totals(self) -> Totals:
        """Sizes of the chunks so far."""
        return Totals(
            stored_bytes=sum(self._stored.values()),
            unreferenced_bytes=self._unreferenced,
        )

    def put(self, encoded: Encoded) -> bytes:
        """Write a chunk unless it is stored already; return its key."""
        if encoded.key in self._stored:
            return encoded.key
        self._stored[encoded.key] = encoded.stored_bytes
        if encoded.record is not None:
            if self._pack is None:
                self._pack = self._begin()
            record = replace(encoded.record, offset=self._pack.position)
            self._pack.append(record, encoded.payload)
            self._unreferenced += encoded.size if record.depth == 0 else 0
        return encoded.key


def encode_boxes(
    objects: ChunkStore,
    boxes: Sequence[Box],
    begin: Callable[[], PackWriter],
    *,
    options: EncodeOptions,
    planner: ReferencePlanner,
) -> tuple[list[TensorEntry], Totals]:
    """Store the chunks of boxes as :func:`encode_contents` does."""
    contents = [
        Content(name=box.name, entry=box.entry(), read=_reader(box.tensor)) for box in boxes
    ]
    return encode_contents(objects, contents, begin, options=options, planner=planner)


def encode_contents(
    objects: ChunkStore,
    contents: Sequence[Content],
    begin: Callable[[], PackWriter],
    *,
    options: EncodeOptions,
    planner: ReferencePlanner,
) -> tuple[list[TensorEntry], Totals]:
    """Store the chunks of contents; return their entries, of one piece each, and the sizes.

    ``begin`` creates a pack; it is called only if there is a chunk to write. The planner comes to
    prefer the table that a sample of the chunks is smallest against.
    """
    places = [
        Place(
            name=content.name,
            entry=content.entry,
            piece=0,
            number=number,
            size=(end - start) * content.entry.dtype.size,
            read=partial(content.read, start, end),
        )
        for content in contents
        for number, start, end in _cut(math.prod(content.piece.shape), content.entry.dtype)
    ]
    writer, results = ChunkWriter(begin), _encode(Encoder(objects, options), places, planner)
    found = []
    with closing(results):
        for content in contents:
            count = -(-math.prod(content.piece.shape) * content.entry.dtype.size // CHUNK_BYTES)
            keys = tuple(writer.put(next(results)) for _ in range(count))
            found.append(replace(content.entry, pieces=(replace(content.piece, keys=keys),)))
    return found, writer.totals


def _reader(tensor: torch.Tensor) -> Callable[[int, int], Bytes]:
    """Return a function that returns the bytes of a range of a tensor's elements."""
    if not has_plain_bytes(tensor):
        return partial(read_elements, tensor)
    data, width = view_bytes(tensor), tensor.element_size()
    return lambda start, stop: data[start * width : stop * width]


def _encode(
    encoder: Encoder, places: Sequence[Place], planner: ReferencePlanner
) -> Generator[Encoded, None, None]:
    """Encode chunks in order, against the table that a sample of them is smallest against."""
    if len(planner.tables) > 1 and places:
        sizes = estimate(encoder, sample(places), planner)
        order = sorted(range(len(sizes)), key=sizes.__getitem__)
        planner.tables = [planner.tables[number] for number in order]

    def encode(batch: Sequence[Place]) -> list[Encoded]:
        return [encoder.encode(encoder.work(place, planner)) for place in batch]

    with closing(in_order(encode, _batches(places))) as batches:
        for batch in batches:
            yield from batch


def _batches(places: Sequence[Place]) -> Iterator[list[Place]]:
    """Yield neighbours that together are not larger than the largest chunk.

    A thread takes a batch at a time, because handing over small chunks takes longer than encoding.
    """
    batch: list[Place] = []
    size = 0
    for place in places:
        if batch and size + place.size > CHUNK_BYTES:
            yield batch
            batch, size = [], 0
        batch.append(place)
        size += place.size
    if batch:
        yield batch


def estimate(encoder: Encoder, places: Sequence[Place], planner: ReferencePlanner) -> list[float]:
    """Return about how many bytes chunks take against each of a planner's tables."""

    def estimate_one(place: Place) -> list[float]:
        at = (place.name, place.entry, place.piece, place.number)
        return encoder.estimate(place, [planner.reference_in(t, *at) for t in planner.tables])

    with closing(in_order(estimate_one, iter(places))) as estimates:
        return [sum(column) for column in zip(*estimates, strict=True)]


def sample(places: Sequence[Place]) -> list[Place]:
    """Return a few chunks at equal distances, counted in bytes."""
    ends = np.cumsum([place.size for place in places])
    count = min(max(int(ends[-1]) // (_MOST * _SAMPLE_BYTES), _FEWEST), _MOST)
    middles = (np.arange(count) + 0.5) * (ends[-1] / count)
    return [places[number] for number in np.unique(np.searchsorted(ends, middles)).tolist()]


def _cut(count: int, dtype: DType) -> Iterator[tuple[int, int, int]]:
    step = CHUNK_BYTES // dtype.size
    for number, start in enumerate(range(0, count, step)):
        yield number, start, min(start + step, count)


def encode_state(
    objects: ChunkStore,
    tensors: Mapping[str, torch.Tensor],
    begin: Callable[[], PackWriter],
    *,
    options: EncodeOptions,
    tables: Sequence[Table],
) -> tuple[dict[str, TensorEntry], Totals]:
    """Store the chunks of a state dict; return its tensor table and the sizes.

    ``begin`` creates a pack; it is called only if there is a chunk to write.
    """
    planner = make_planner(objects, options, tables)
    # The base may have only one of the names of a tied tensor, so names in the base come first.
    order = sorted(
        tensors, key=lambda name: (not planner.knows(name, tuple(tensors[name].shape)), name)
    )
    places: dict[tuple[object, ...], str] = {}
    first = {name: places.setdefault(memory_key(tensors[name]), name) for name in order}
    entries, totals = encode_boxes(
        objects,
        [whole_box(name, tensors[name]) for name in places.values()],
        begin,
        options=options,
        planner=planner,
    )
    table = dict(zip(places.values(), entries, strict=True))
    return {name: table[first[name]] for name in order}, totals


class Reencoding:
    """The stored chunks of a checkpoint that are to be encoded again."""

    def __init__(
        self,
        objects: ChunkStore,
        tensors: Mapping[str, TensorEntry],
        *,
        options: EncodeOptions,
        tables: Sequence[Table],
        is_done: Callable[[Record], bool],
    ) -> None:
        """Find the chunks whose record is not done, to encode them against one of the tables."""
        self._planner = planner = make_planner(objects, options, tables)
        self._encoder = Encoder(objects, options, alone=True)
        places: dict[bytes, Place] = {}
        # As in a save, a name that has references decides how tied tensors are encoded.
        for name in sorted(tensors, key=lambda name: not planner.knows(name, tensors[name].shape)):
            entry = tensors[name]
            for piece, box in enumerate(entry.pieces):
                for number, (key, size) in enumerate(chunks_of(box, entry.dtype)):
                    if key in places or objects.find_in_base(key, options.base) is not None:
                        continue
                    stored = objects.find(key, options.base)
                    if stored is None or not is_done(stored.record):
                        places[key] = Place(
                            name=name,
                            entry=entry,
                            piece=piece,
                            number=number,
                            size=size,
                            read=partial(objects.read, key, size, entry.dtype, options.base),
                            stored=0 if stored is None else stored.record.length,
                        )
        self._places = list(places.values())

    def prefer_smallest(self) -> tuple[Table, float]:
        """Choose among the tables; return the choice and about how many more bytes it takes."""
        chosen = sample(self._places)
        sizes = estimate(self._encoder, chosen, self._planner)
        size, number = min((size, number) for number, size in enumerate(sizes))
        self._planner.tables = [self._planner.tables[number]]
        before = sum(place.stored for place in self._places)
        growth = size / max(sum(place.stored for place in chosen), 1)
        return self._planner.tables[0], before * (growth - 1)

    def encode(self, begin: Callable[[], PackWriter]) -> None:
        """Encode the chunks; ``begin`` creates a pack."""
        writer = ChunkWriter(begin)
        with closing(_encode(self._encoder, self._places, self._planner)) as results:
            for encoded in results:
                writer.put(encoded)
