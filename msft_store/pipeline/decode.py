"""Decode chunks to tensors in parallel, in bounded memory, in place if possible.

Invariants: every chunk is verified. Besides the tensors, at most a few chunks per thread are in
memory, for any size, device and layout. Tensors that share memory are not decoded in place.

Example::

    decode_state(objects, table, outs, base=base.id, what="checkpoint 3fa9")
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from msft_store.codec.kernels import Bytes
from msft_store.errors import InvalidInputError, MismatchError, StorageError, StoreError
from msft_store.format.dtypes import DType
from msft_store.format.layout import chunk_key
from msft_store.objects.chunks import ChunkStore
from msft_store.objects.manifest import TensorEntry, chunk_sizes
from msft_store.pipeline.parallel import in_order
from msft_store.tensors.bytes import (
    has_plain_bytes,
    may_overlap_itself,
    read_elements,
    torch_dtype,
    view_bytes,
    write_elements,
)


@dataclass(frozen=True, kw_only=True)
class _Read:
    tensor: str
    key: bytes
    dtype: DType
    size: int
    target: Bytes | None
    """Row-major host memory for its bytes; ``None`` if there is no such memory."""
    box: torch.Tensor
    start: int
    """First element of the chunk in ``box``, the piece of the tensor, if ``target`` is ``None``."""


def decode_state(
    objects: ChunkStore,
    tensors: Mapping[str, TensorEntry],
    outs: Mapping[str, torch.Tensor],
    *,
    base: str | None,
    what: str,
) -> None:
    """Decode tensors into existing ones of the same shape and dtype, on any device.

    Raise :class:`StoreError`, which names ``what`` and the tensor, at the first damaged chunk, and
    :class:`MismatchError` if some of ``outs`` share memory but have different content. In both
    cases ``outs`` are partly overwritten.
    """
    plain = _apart({name: outs[name].detach() for name in tensors})
    jobs = (
        job
        for name in tensors
        for job in _reads(name, tensors[name], outs[name].detach(), in_place=name in plain)
    )
    with closing(in_order(partial(_restore, objects, base, what), jobs)) as done:
        for _ in done:
            pass
    for name in tensors.keys() - plain:
        for job in _reads(name, tensors[name], outs[name].detach(), in_place=False):
            held = read_elements(job.box, job.start, job.start + job.size // job.dtype.size)
            if chunk_key(held.data, job.dtype) != job.key:
                raise MismatchError(
                    f"{what}: the target's {name!r} shares memory with another tensor, or with "
                    "itself, which in the checkpoint is not equal. The target is partly overwritten"
                )


def decode_bytes(
    objects: ChunkStore, tensors: Mapping[str, TensorEntry], *, base: str | None, what: str
) -> Iterator[Bytes]:
    """Yield the row-major bytes of tensors chunk by chunk; a tensor of several pieces at once."""
    with closing(decode_chunks(objects, tensors, base=base, what=what)) as parts:
        for _, _, data in parts:
            yield data


def decode_chunks(
    objects: ChunkStore, tensors: Mapping[str, TensorEntry], *, base: str | None, what: str
) -> Generator[tuple[str, int, Bytes], None, None]:
    """Yield the name, first element (in row-major order) and bytes of each chunk, in order.

    A tensor of several pieces is yielded at once.
    """

    def whole(name: str) -> tuple[str, int, Bytes]:
        out = empty_like(tensors[name])
        for job in _reads(name, tensors[name], out, in_place=True):
            _restore(objects, base, what, job)
        return name, 0, view_bytes(out)

    def chunk(name: str, start: int, key: bytes, size: int) -> tuple[str, int, Bytes]:
        with named(f"{what}, tensor {name!r}"):
            return name, start, objects.read(key, size, tensors[name].dtype, base)

    def jobs() -> Iterator[Callable[[], tuple[str, int, Bytes]]]:
        for name, entry in tensors.items():
            if len(entry.pieces) > 1:
                yield partial(whole, name)
                continue
            for piece in entry.pieces:
                sizes, start = chunk_sizes(piece, entry.dtype), 0
                for key, size in zip(piece.keys, sizes, strict=True):
                    yield partial(chunk, name, start, key, size)
                    start += size // entry.dtype.size

    with closing(in_order(lambda job: job(), jobs())) as parts:
        yield from parts


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


def _restore(objects: ChunkStore, base: str | None, what: str, job: _Read) -> None:
    out = np.empty(job.size, np.uint8) if job.target is None else job.target
    with named(f"{what}, tensor {job.tensor!r}"):
        objects.read_into(out, job.key, job.dtype, base)
    if job.target is None:
        write_elements(job.box, job.start, out)


@contextmanager
def named(what: str) -> Iterator[None]:
    """Add the description of the data to read to errors."""
    try:
        yield
    except StoreError as error:
        raise type(error)(f"{what}: {error}", file=error.file) from error


def _apart(outs: Mapping[str, torch.Tensor]) -> set[str]:
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
    apart = {name for name, out in outs.items() if not may_overlap_itself(out)}
    reached, by = 0, ""
    for begin, end, name in sorted(extents):
        if begin < reached:
            apart -= {name, by}
        if end > reached:
            reached, by = end, name
    return apart


def _reads(name: str, entry: TensorEntry, out: torch.Tensor, *, in_place: bool) -> Iterator[_Read]:
    for piece in entry.pieces:
        box = out
        if piece.shape != entry.shape:
            ranges = zip(piece.offset, piece.shape, strict=True)
            box = out[tuple(slice(first, first + count) for first, count in ranges)]
        data = view_bytes(box) if in_place and has_plain_bytes(box) else None
        position = 0
        for key, size in zip(piece.keys, chunk_sizes(piece, entry.dtype), strict=True):
            yield _Read(
                tensor=name,
                key=key,
                dtype=entry.dtype,
                size=size,
                target=None if data is None else data[position : position + size],
                box=box,
                start=position // entry.dtype.size,
            )
            position += size
