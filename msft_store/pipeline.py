"""A state dict through the codecs and back: in parallel, in order, in bounded memory.

Invariants: chunks are worked on by threads but written in one order, so the same bytes
come out whatever the number of threads; no more than a few chunks per thread are in memory at a
time, and a copy of the tensor at hand where it is on another device or not contiguous; every
encoded chunk is decoded again and compared before it is written.

Example::

    table, totals = encode_state(objects, tensors, begin_pack, base=base.id, parent=None)
    decode_state(objects, table, outs, base=base.id, what="checkpoint 3fa9")
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol, TypeVar

import numpy as np
import torch

from msft_store import codecs
from msft_store.dtypes import DType, by_torch
from msft_store.errors import CorruptedError, InvalidInputError, StorageError, StoreError
from msft_store.format import (
    CHUNK_BYTES,
    KEY_BYTES,
    BaseSpan,
    ChunkSpan,
    Record,
    chunk_key,
)
from msft_store.kernels import Bytes
from msft_store.manifest import Piece, TensorEntry, chunk_sizes
from msft_store.objects import Objects
from msft_store.references import Planner, Reference
from msft_store.tensors import memory_of, to_bytes, torch_dtype, view_bytes

_T = TypeVar("_T")
_R = TypeVar("_R")
_WORKERS = min(32, os.cpu_count() or 1)


class Sink(Protocol):
    """Where encoded chunks go; :class:`msft_store.packs.PackWriter` is one."""

    @property
    def position(self) -> int:
        """Where the next payload will begin."""

    def append(self, record: Record, payload: bytes) -> None:
        """Add a chunk."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """One chunk to be stored."""

    data: Bytes
    dtype: DType
    reference: Reference | None
    """What it is compared with."""


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """One chunk as it will be stored; ``record`` is ``None`` where the store holds it already."""

    key: bytes
    size: int
    stored_bytes: int
    record: Record | None = None
    payload: bytes = b""


@dataclass(frozen=True, kw_only=True)
class Totals:
    """What a save amounted to, in bytes."""

    stored_bytes: int
    unreferenced_bytes: int


def in_order(
    function: Callable[[_T], _R], items: Iterator[_T], workers: int = _WORKERS
) -> Generator[_R, None, None]:
    """Map in threads, a few items ahead, and yield the results in order."""
    with ThreadPoolExecutor(workers) as pool:
        pending: deque[Future[_R]] = deque()
        try:
            for item in items:
                pending.append(pool.submit(function, item))
                if len(pending) > 2 * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


class Encoder:
    """Encodes chunks, each against the reference that a planner chose for it."""

    def __init__(
        self, objects: Objects, base: str | None, level: codecs.Level, *, alone: bool = False
    ) -> None:
        """``alone``: also encode what is stored already, but as a change of another chunk."""
        self._objects = objects
        self._base = base
        self._level = level
        self._alone = alone

    def encode(self, work: Work) -> Encoded:
        """Return a chunk in the smallest representation, or as one that the store has."""
        key, size = chunk_key(work.data.data, work.dtype), work.data.size
        if self._objects.in_base(key, self._base) is not None:
            return Encoded(key=key, size=size, stored_bytes=0)
        stored = self._objects.find(key, self._base)
        if stored is not None and not (self._alone and stored.record.refers_to_chunk):
            return Encoded(key=key, size=size, stored_bytes=stored.record.length)
        reference, data = work.reference, self._read(work)
        codec, payload = codecs.encode(work.data, data, work.dtype, level=self._level)
        if not codec.needs_reference:
            reference, data = None, None
        again = codecs.decode(codec.code, payload, size, data, work.dtype)
        if not np.array_equal(again, work.data):
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
            dtype=work.dtype.code,
            depth=0 if reference is None else reference.depth,
            base=None if reference is None else reference.base,
            ref_key=bytes(KEY_BYTES) if data is None else chunk_key(data.data, work.dtype),
            reference=_explicit(reference),
        )
        return Encoded(
            key=key, size=size, stored_bytes=len(payload), record=record, payload=payload
        )

    def _read(self, work: Work) -> Bytes | None:
        """Return the bytes of the reference; those of the base only if they are what was added."""
        if work.reference is None:
            return None
        span, base = work.reference.span, work.reference.base
        if isinstance(span, ChunkSpan):
            return self._objects.read(span.key, span.length, work.dtype, self._base)
        if base is None:
            raise InvalidInputError("a reference in a base must name the base")
        count = work.data.size // work.dtype.size
        reader = self._objects.base(base)
        reader.verify_span(span, count)
        return reader.read_span(span, count, work.dtype)


def _explicit(reference: Reference | None) -> BaseSpan | tuple[ChunkSpan, ...] | None:
    # A whole chunk is named by the record's ref_key alone.
    if reference is None or isinstance(reference.span, ChunkSpan):
        return None
    return reference.span


class ChunkWriter:
    """Writes encoded chunks, each once, into a pack that is begun when the first one comes."""

    def __init__(self, begin: Callable[[], Sink]) -> None:
        self._begin = begin
        self._sink: Sink | None = None
        self._stored: dict[bytes, int] = {}
        self._unreferenced = 0

    @property
    def totals(self) -> Totals:
        """What was put so far."""
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
            if self._sink is None:
                self._sink = self._begin()
            record = replace(encoded.record, offset=self._sink.position)
            self._sink.append(record, encoded.payload)
            self._unreferenced += encoded.size if record.depth == 0 else 0
        return encoded.key


def encode_state(
    objects: Objects,
    tensors: Mapping[str, torch.Tensor],
    begin: Callable[[], Sink],
    *,
    base: str | None,
    parent: Mapping[str, TensorEntry] | None,
    level: codecs.Level,
) -> tuple[dict[str, TensorEntry], Totals]:
    """Store the chunks of a state dict; return its tensor table and what it took.

    ``begin`` begins a pack; it is called only if there is a chunk to be written.
    """
    planner = Planner(objects, base, parent)
    planner.match({name: tuple(tensor.shape) for name, tensor in tensors.items()})
    # A tied tensor may stand under one of its names only in the base: that name goes first.
    order = sorted(tensors, key=lambda name: (not planner.knows(name), name))
    places: dict[tuple[object, ...], str] = {}
    first = {name: places.setdefault(memory_of(tensors[name]), name) for name in order}

    def work() -> Iterator[Work]:
        for name in places.values():
            entry, data = _whole(tensors[name], ()), to_bytes(tensors[name])
            for number, start in enumerate(range(0, data.size, CHUNK_BYTES)):
                yield Work(
                    data=data[start : start + CHUNK_BYTES],
                    dtype=entry.dtype,
                    reference=planner.reference(name, entry, 0, number),
                )

    writer = ChunkWriter(begin)
    table = {}
    with closing(in_order(Encoder(objects, base, level).encode, work())) as results:
        for name in places.values():
            count = -(-_whole(tensors[name], ()).nbytes // CHUNK_BYTES)
            keys = tuple(writer.put(next(results)) for _ in range(count))
            table[name] = _whole(tensors[name], keys)
    table |= {name: table[first[name]] for name in order}
    return table, writer.totals


def encode_anchor(
    objects: Objects,
    tensors: Mapping[str, TensorEntry],
    begin: Callable[[], Sink],
    *,
    base: str | None,
    level: codecs.Level,
) -> None:
    """Store stored chunks once more, each without any reference but the base.

    Chunks that need none but the base already are left as they are.
    """
    planner = Planner(objects, base, None)
    planner.match({name: entry.shape for name, entry in tensors.items()})

    def work() -> Iterator[Work]:
        for name, entry in tensors.items():
            for at, piece in enumerate(entry.pieces):
                sizes = chunk_sizes(piece, entry.dtype)
                for number, (key, size) in enumerate(zip(piece.keys, sizes, strict=True)):
                    stored = objects.find(key, base)
                    if objects.in_base(key, base) is not None or (
                        stored is not None and not stored.record.refers_to_chunk
                    ):
                        continue
                    yield Work(
                        data=objects.read(key, size, entry.dtype, base),
                        dtype=entry.dtype,
                        reference=planner.reference(name, entry, at, number),
                    )

    writer = ChunkWriter(begin)
    with closing(in_order(Encoder(objects, base, level, alone=True).encode, work())) as results:
        for encoded in results:
            writer.put(encoded)


@dataclass(frozen=True, kw_only=True)
class _Read:
    tensor: str
    key: bytes
    dtype: DType
    target: Bytes
    finish: tuple[Callable[[], object], ...] = ()


def decode_state(
    objects: Objects,
    tensors: Mapping[str, TensorEntry],
    outs: Mapping[str, torch.Tensor],
    *,
    base: str | None,
    what: str,
) -> None:
    """Restore tensors into existing ones of the same shape and dtype, on any device.

    Every chunk is verified; :class:`StoreError` at the first that is damaged, which names ``what``
    and the tensor, and then ``outs`` are partly overwritten.
    """

    def read(job: _Read) -> _Read:
        try:
            job.target[:] = objects.read(job.key, job.target.size, job.dtype, base)
        except StoreError as error:
            raise type(error)(f"{what}, tensor {job.tensor!r}: {error}") from error
        return job

    jobs = (job for name in tensors for job in _reads(name, tensors[name], outs[name].detach()))
    with closing(in_order(read, jobs)) as done:
        for job in done:
            for finish in job.finish:
                finish()


def empty_like(entry: TensorEntry, device: str | torch.device = "cpu") -> torch.Tensor:
    """Return an uninitialised tensor for an entry."""
    dtype = torch_dtype(entry.dtype)
    try:
        return torch.empty(entry.shape, dtype=dtype, device=device)
    except (RuntimeError, TypeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise StorageError(
            f"no memory on {device} for a tensor of {entry.nbytes} bytes: {reason}"
        ) from error


def _reads(name: str, entry: TensorEntry, out: torch.Tensor) -> Iterator[_Read]:
    direct = out.device.type == "cpu" and out.is_contiguous()
    buffer = out if direct else empty_like(entry)
    for piece in entry.pieces:
        whole = piece.shape == entry.shape
        held = buffer if whole else torch.empty(piece.shape, dtype=buffer.dtype)
        data, position = view_bytes(held), 0
        for number, (key, size) in enumerate(
            zip(piece.keys, chunk_sizes(piece, entry.dtype), strict=True)
        ):
            finish: list[Callable[[], object]] = []
            if number == len(piece.keys) - 1:
                if not whole:
                    ranges = zip(piece.offset, piece.shape, strict=True)
                    box = tuple(slice(o, o + n) for o, n in ranges)
                    finish.append(partial(buffer[box].copy_, held))
                if not direct:
                    finish.append(partial(out.copy_, buffer))
            target = data[position : position + size]
            yield _Read(
                tensor=name, key=key, dtype=entry.dtype, target=target, finish=tuple(finish)
            )
            position += size


def _whole(tensor: torch.Tensor, keys: tuple[bytes, ...]) -> TensorEntry:
    shape = tuple(tensor.shape)
    piece = Piece(offset=(0,) * len(shape), shape=shape, keys=keys)
    return TensorEntry(dtype=by_torch(tensor.dtype), shape=shape, pieces=(piece,))
