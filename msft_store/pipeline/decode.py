"""Decode chunks to tensors in parallel, in bounded memory, in place if possible.

Memory that holds a chunk already, as its hash proves, is not written to, so that a roll-back
rewrites only what differs. Invariants: every chunk is verified. Besides the tensors, at most a few
chunks per thread are in memory, for any size, device and layout. Tensors that share memory are not
decoded in place.

Example::

    decode_state(Source.of(catalog, checkpoint), table, outs)
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from msft_store.codec.kernels import Bytes
from msft_store.errors import BaseError, InvalidInputError, MismatchError, StorageError, StoreError
from msft_store.format.dtypes import DType
from msft_store.format.layout import CHUNK_BYTES, chunk_key
from msft_store.objects.catalog import Catalog
from msft_store.objects.chunks import ChunkStore
from msft_store.objects.manifest import Checkpoint, Piece, TensorEntry, chunks_of
from msft_store.pipeline.parallel import for_each, in_order
from msft_store.pipeline.trail import Trail
from msft_store.tensors.bytes import (
    has_plain_bytes,
    may_overlap_itself,
    read_elements,
    torch_dtype,
    view_bytes,
    write_elements,
)


@dataclass(frozen=True, kw_only=True)
class ChunkRead:
    """A chunk to read, and the elements of a tensor to restore from it."""

    tensor: str
    key: bytes
    dtype: DType
    size: int
    box: torch.Tensor
    start: int
    """First element of ``box`` to restore, row-major."""
    part: slice
    """The bytes of the chunk that are restored."""
    target: Bytes | None
    """Row-major host memory for the whole chunk; ``None`` if there is no such memory."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """The stored chunks of one checkpoint or base. Its errors name it and the tensor."""

    objects: ChunkStore
    base: str | None
    """Id of the base that decoding needs, or of the base itself."""
    name: str
    """Its name in messages."""

    @classmethod
    def of(cls, catalog: Catalog, checkpoint: Checkpoint) -> Source:
        """Return the source of a checkpoint."""
        name = f"checkpoint {checkpoint.id[:12]}"
        return cls(objects=catalog.objects, base=checkpoint.base, name=name)

    def read(self, tensor: str, key: bytes, size: int, dtype: DType) -> Bytes:
        """Return the verified bytes of a chunk."""
        with self._naming(tensor):
            return self.objects.read(key, size, dtype, self.base)

    def restore(self, read: ChunkRead) -> None:
        """Read a chunk, verify it and restore elements from it."""
        if read.target is None:
            data = self.read(read.tensor, read.key, read.size, read.dtype)
            write_elements(read.box, read.start, data[read.part])
        else:
            with self._naming(read.tensor):
                self.objects.read_into(read.target, read.key, read.dtype, self.base)

    def follow(self, read: ChunkRead, trail: Trail) -> bool:
        """Restore a whole chunk from the one that a trail led to; return False if that fails."""
        place = (read.tensor, read.box.storage_offset(), read.box.shape, read.start, read.size)
        out = read.target
        if out is None:
            stop = read.start + read.size // read.dtype.size
            out = read_elements(read.box, read.start, stop).copy()
        reached = trail.reach(
            place, out, read.key, dtype=read.dtype, objects=self.objects, base=self.base
        )
        if reached and read.target is None:
            write_elements(read.box, read.start, out)
        return reached

    @contextmanager
    def _naming(self, tensor: str) -> Iterator[None]:
        try:
            yield
        except StoreError as error:
            text = f"{self.name}, tensor {tensor!r}: {error}"
            if isinstance(error, BaseError):
                # A pack that cannot be read may have a copy of the base's chunk.
                text += "".join(f"; {damage}" for damage in self.objects.damaged.values())
            raise type(error)(text, file=error.file) from error


_FREE_LOOKS = 2 * CHUNK_BYTES
"""Bytes of memory that are hashed in vain before the share of those that were counts."""
_LOOKS_IN_VAIN = 16
"""One in this many bytes may be hashed in vain, which costs a hundredth of a load."""


class _HeldChunks:
    """Tells which chunks the memory of their targets holds already.

    Hashing memory takes a fraction of the time of reading a chunk, but is in vain if they differ.
    Whether chunks before were held decides whether it is worth it. Threads share the counts; a
    count that gets lost costs nothing but time.
    """

    def __init__(self) -> None:
        self._seen = self._held = self._in_vain = 0

    def holds(self, read: ChunkRead) -> bool:
        """Return True if the target of a read is known to hold the chunk."""
        self._seen += read.size
        allowed = _FREE_LOOKS + self._held + self._seen // _LOOKS_IN_VAIN
        if read.target is None or self._in_vain > allowed:
            return False
        found = chunk_key(read.target.data, read.dtype) == read.key
        if found:
            self._held += read.size
        else:
            self._in_vain += read.size
        return found


def decode_state(
    source: Source,
    tensors: Mapping[str, TensorEntry],
    outs: Mapping[str, torch.Tensor],
    *,
    fresh: bool = False,
    trail: Trail | None = None,
) -> None:
    """Decode tensors into existing ones of the same shape and dtype, on any device.

    ``fresh`` says that ``outs`` are uninitialised, so that there is no use in looking at them.
    ``trail`` is of earlier calls for the same ``outs``.
    Raise :class:`StoreError` at the first damaged chunk, and :class:`MismatchError` if some of
    ``outs`` share memory but have different content. In both cases ``outs`` are partly overwritten.
    """
    plain = find_unshared({name: outs[name].detach() for name in tensors})
    reads = (
        read
        for name, entry in tensors.items()
        for read in _list_reads(name, entry, outs[name].detach(), in_place=name in plain)
    )
    held = _HeldChunks()

    def restore(read: ChunkRead) -> None:
        if trail is not None and read.tensor in plain:
            reached = source.follow(read, trail)
        else:
            reached = not fresh and held.holds(read)
        if not reached:
            source.restore(read)

    for_each(restore, reads)
    for name in tensors.keys() - plain:
        for read in _list_reads(name, tensors[name], outs[name].detach(), in_place=False):
            restored = read_elements(
                read.box, read.start, read.start + read.size // read.dtype.size
            )
            if chunk_key(restored.data, read.dtype) != read.key:
                raise MismatchError(
                    f"{source.name}: the target's {name!r} shares memory with another tensor, or "
                    "with itself, which in the checkpoint is not equal. The target is partly "
                    "overwritten"
                )


def decode_chunks(
    source: Source, tensors: Mapping[str, TensorEntry]
) -> Generator[tuple[str, int, Bytes], None, None]:
    """Yield the name, first element (in row-major order) and bytes of each chunk, in order.

    A tensor of several pieces is yielded at once.
    """

    def list_chunks() -> Iterator[tuple[str, int, bytes | None, int]]:
        for name, entry in tensors.items():
            if len(entry.pieces) > 1:
                yield name, 0, None, 0
                continue
            start = 0
            for key, size in entry.chunks():
                yield name, start, key, size
                start += size // entry.dtype.size

    def decode(chunk: tuple[str, int, bytes | None, int]) -> tuple[str, int, Bytes]:
        name, start, key, size = chunk
        if key is not None:
            return name, start, source.read(name, key, size, tensors[name].dtype)
        out = empty_like(tensors[name])
        for read in _list_reads(name, tensors[name], out, in_place=True):
            source.restore(read)
        return name, start, view_bytes(out)

    return in_order(decode, list_chunks())


def device_of(device: object) -> torch.device:
    """Return a device that can hold data; raise :class:`InvalidInputError` for any other value."""
    with contextlib.suppress(RuntimeError, TypeError):
        found: torch.device = torch.device(device)  # type: ignore[call-overload]
        if found.type != "meta":
            return found
    raise InvalidInputError(f"{device!r} is no device for tensors; one is 'cpu' or 'cuda:0'")


def empty_like(entry: TensorEntry, device: str | torch.device = "cpu") -> torch.Tensor:
    """Return an uninitialised tensor for an entry."""
    dtype = torch_dtype(entry.dtype)
    try:
        return torch.empty(entry.shape, dtype=dtype, device=device)
    except (RuntimeError, TypeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise StorageError(
            f"cannot have a tensor of {entry.nbytes} bytes on {device}: {reason}"
        ) from error


def find_unshared(outs: Mapping[str, torch.Tensor]) -> set[str]:
    """Return the names of tensors that overlap neither another host tensor nor themselves.

    Decoding in place uses the memory of a chunk for its reference, so two threads must not share
    it. On other devices, only overlap of a tensor with itself is looked for.
    """
    extents = []
    for name, out in outs.items():
        if out.device.type == "cpu" and out.numel():
            strides = zip(out.shape, out.stride(), strict=True)
            last = sum((count - 1) * stride for count, stride in strides)
            begin = out.data_ptr()
            extents.append((begin, begin + (last + 1) * out.element_size(), name))
    unshared = {name for name, out in outs.items() if not may_overlap_itself(out)}
    reached, by = 0, ""
    for begin, end, name in sorted(extents):
        if begin < reached:
            unshared -= {name, by}
        if end > reached:
            reached, by = end, name
    return unshared


def _list_reads(
    name: str, entry: TensorEntry, out: torch.Tensor, *, in_place: bool
) -> Iterator[ChunkRead]:
    for piece in entry.pieces:
        box = out
        if piece.shape != entry.shape:
            ranges = zip(piece.offset, piece.shape, strict=True)
            box = out[tuple(slice(first, first + count) for first, count in ranges)]
        yield from list_reads(name, entry.dtype, piece, box, in_place=in_place)


def list_reads(
    name: str, dtype: DType, piece: Piece, box: torch.Tensor, *, begin: int = 0, in_place: bool
) -> Iterator[ChunkRead]:
    """Yield the reads that restore ``box``, a contiguous range of a piece from ``begin`` on."""
    memory = view_bytes(box) if in_place and has_plain_bytes(box) else None
    at, end = 0, begin + box.numel()
    for key, size in chunks_of(piece, dtype):
        first, last = max(begin, at), min(end, at + size // dtype.size)
        if first < last:
            yield ChunkRead(
                tensor=name,
                key=key,
                dtype=dtype,
                size=size,
                box=box,
                start=first - begin,
                part=slice((first - at) * dtype.size, (last - at) * dtype.size),
                target=None if memory is None else memory[at * dtype.size :][:size],
            )
        at += size // dtype.size
