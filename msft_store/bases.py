"""Bases: models on disk that a store refers to by content; never copied, never changed.

``bases/<id>.json`` records the keys of all chunks and where they stand. The id is the digest of
names, dtypes, shapes and keys, so a base keeps its id when its files move (:func:`relocate`) or are
sharded anew.

Example::

    base = add_base(backend, Path("Qwen2.5-0.5B"))
    reader = BaseReader(backend, base)
    reader.read_span(BaseSpan(tensor="lm_head.weight", start=0), 4096, by_name("bfloat16"))
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from msft_store.backend import Backend, publish, read_file, translated
from msft_store.dtypes import DType, by_name
from msft_store.errors import BaseError, CorruptedError, MismatchError
from msft_store.format import (
    CHUNK_BYTES,
    KEY_BYTES,
    VERSION,
    BaseSpan,
    canonical,
    chunk_key,
    digest,
    seal,
    unseal,
)
from msft_store.kernels import Bytes
from msft_store.safetensors_file import TensorPlace, find_files, read_header

_FOLDER = "bases"
_SUFFIX = ".json"


@dataclass(frozen=True, kw_only=True)
class BaseTensor:
    """A tensor of a base."""

    dtype: DType
    shape: tuple[int, ...]
    file: int
    offset: int
    """Of its first byte in the file."""
    keys: tuple[bytes, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * self.dtype.size


@dataclass(frozen=True, kw_only=True)
class Base:
    """A model on disk that checkpoints are differences against."""

    id: str
    path: str
    """The file or directory that was added."""
    files: tuple[tuple[str, int], ...]
    """Its safetensors files and their sizes in bytes."""
    tensors: Mapping[str, BaseTensor] = field(repr=False)

    @property
    def logical_bytes(self) -> int:
        """Bytes of its tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def add_base(backend: Backend, path: Path) -> Base:
    """Read a safetensors file, or a directory of them, once and record it by content."""
    with translated("read", path):
        base = _scan(path.absolute())
    _publish(backend, base)
    return base


def relocate(backend: Backend, base: Base, path: Path) -> Base:
    """Record that a base's files moved; :class:`BaseError` if the content there is another."""
    with translated("read", path):
        found = _scan(path.absolute())
    if found.id != base.id:
        raise BaseError(f"{path} holds base {found.id[:12]}, not {base.id[:12]}: wrong model")
    _publish(backend, found)
    return found


def _publish(backend: Backend, base: Base) -> None:
    publish(backend, path_of_base(base.id), _to_json(base))


def _scan(path: Path) -> Base:
    files = find_files(path)
    places: dict[str, tuple[int, TensorPlace]] = {}
    for number, file in enumerate(files):
        for name, place in read_header(file).items():
            if name in places:
                raise BaseError(f"{path} holds the tensor {name!r} twice")
            places[name] = (number, place)
    with ThreadPoolExecutor() as pool:
        tensors = {
            name: BaseTensor(
                dtype=place.dtype,
                shape=place.shape,
                file=number,
                offset=place.offset,
                keys=tuple(pool.map(lambda span: _key_at(*span), _spans(files[number], place))),
            )
            for name, (number, place) in sorted(places.items())
        }
    return Base(
        id=digest(canonical(_content(tensors))),
        path=str(path),
        files=tuple((str(file), file.stat().st_size) for file in files),
        tensors=tensors,
    )


def path_of_base(identity: str) -> str:
    """Return where the record of a base stands."""
    return f"{_FOLDER}/{identity}{_SUFFIX}"


def list_bases(backend: Backend) -> list[str]:
    """Return the ids of all bases."""
    skip = len(_FOLDER) + 1
    return [path[skip : -len(_SUFFIX)] for path in backend.list(_FOLDER) if path.endswith(_SUFFIX)]


def read_base(backend: Backend, identity: str) -> Base:
    """Read the record of a base."""
    return _from_json(backend, path_of_base(identity))


def match_names(
    shapes: Mapping[str, tuple[int, ...]], base: Mapping[str, tuple[int, ...]]
) -> dict[str, str]:
    """Return which tensor of a base each tensor is compared with: name → base name.

    Equal names first; then, where one side carries a prefix such as ``model.`` or ``module.``, the
    prefix that matches most names. Shapes must agree.
    """
    matches = {name: name for name, shape in shapes.items() if base.get(name) == shape}
    rest = [name for name in shapes if name not in matches]
    votes: dict[tuple[str, str], int] = {}
    by_tail: dict[str, list[str]] = {}
    for other in base:
        by_tail.setdefault(other.rsplit(".", 1)[-1], []).append(other)
    for name in rest:
        for other in by_tail.get(name.rsplit(".", 1)[-1], ()):
            if base[other] == shapes[name]:
                prefixes = _prefixes(name, other)
                if prefixes is not None:
                    votes[prefixes] = votes.get(prefixes, 0) + 1
    for added, removed in sorted(votes, key=lambda prefixes: (-votes[prefixes], prefixes)):
        for name in rest:
            if name in matches or not name.startswith(added):
                continue
            other = removed + name[len(added) :]
            if base.get(other) == shapes[name]:
                matches[name] = other
    return matches


def _prefixes(name: str, other: str) -> tuple[str, str] | None:
    if name.endswith("." + other):
        return name[: -len(other)], ""
    if other.endswith("." + name):
        return "", other[: -len(name)]
    return None


class BaseReader:
    """Reads a base's bytes by span; who decodes checks them, the file may have changed."""

    def __init__(self, backend: Backend, base: Base) -> None:
        self.base = base
        self.chunks = {
            key: BaseSpan(tensor=name, start=number * CHUNK_BYTES // tensor.dtype.size)
            for name, tensor in base.tensors.items()
            for number, key in enumerate(tensor.keys)
        }
        self._record = backend.describe(path_of_base(base.id))

    def where(self, span: BaseSpan) -> str:
        """Return the file that holds a span."""
        return self.base.files[self._tensor(span.tensor).file][0]

    def chunk_bytes(self, span: BaseSpan) -> int:
        """Return the size of the chunk that begins where a span does."""
        tensor = self._tensor(span.tensor)
        return min(CHUNK_BYTES, tensor.nbytes - span.start * tensor.dtype.size)

    def verify_span(self, span: BaseSpan, count: int) -> None:
        """Compare what a span touches with its keys; :class:`BaseError` if it changed.

        For who is about to take a difference against it: a base that changed unnoticed would make
        checkpoints that need what is not recorded anywhere.
        """
        tensor = self._tensor(span.tensor)
        offset, shape = span.box or ((0,) * len(tensor.shape), tensor.shape)
        step = CHUNK_BYTES // tensor.dtype.size
        touched: set[int] = set()
        for start, length in box_runs(tensor.shape, offset, shape, span.start, count):
            touched.update(range(start // step, -(-(start + length) // step)))
        for number in sorted(touched):
            whole = BaseSpan(tensor=span.tensor, start=number * step)
            size = self.chunk_bytes(whole) // tensor.dtype.size
            self.verify(whole, self.read_span(whole, size, tensor.dtype), tensor.keys[number])

    def verify(self, span: BaseSpan, data: Bytes, key: bytes) -> None:
        """Compare with its key what was read of a chunk; :class:`BaseError` if it changed."""
        if chunk_key(data.data, self._tensor(span.tensor).dtype) != key:
            raise BaseError(
                f"{self.where(span)} changed since it was added as base {self.base.id[:12]} "
                f"(tensor {span.tensor!r}); put the original file back"
            )

    def read_span(self, span: BaseSpan, count: int, dtype: DType) -> Bytes:
        """Return ``count`` elements, rounded to ``dtype`` if the base has another."""
        tensor = self._tensor(span.tensor)
        offset, shape = span.box or ((0,) * len(tensor.shape), tensor.shape)
        runs = box_runs(tensor.shape, offset, shape, span.start, count)
        parts = [self._read(tensor, start, length) for start, length in runs]
        raw = parts[0] if len(parts) == 1 else b"".join(parts)
        if len(raw) != count * tensor.dtype.size:
            raise BaseError(
                f"{self.where(span)} is shorter than when it was added as base "
                f"{self.base.id[:12]}; put the original file back or use relocate"
            )
        return _convert(np.frombuffer(raw, np.uint8), tensor.dtype, dtype)

    def _read(self, tensor: BaseTensor, start: int, count: int) -> bytes:
        path, _ = self.base.files[tensor.file]
        file = Path(path)
        if not file.is_file():
            raise BaseError(
                f"base {self.base.id[:12]} is no longer at {path}; "
                f"if it moved: msft-store relocate {self.base.id[:12]} NEW_PATH"
            )
        width = tensor.dtype.size
        return read_file(file, tensor.offset + start * width, count * width)

    def _tensor(self, name: str) -> BaseTensor:
        try:
            return self.base.tensors[name]
        except KeyError:
            raise CorruptedError(f"{self._record} has no tensor {name!r}") from None


def box_runs(
    shape: tuple[int, ...],
    offset: tuple[int, ...],
    box: tuple[int, ...],
    start: int,
    count: int,
) -> Iterator[tuple[int, int]]:
    """Yield (first element, elements) runs of a row-major tensor that make up part of a box.

    The part is ``count`` elements from element ``start`` of the box.
    """
    if len(offset) != len(shape) or any(
        o + n > s for o, n, s in zip(offset, box, shape, strict=True)
    ):
        raise MismatchError(f"the box {offset} + {box} lies outside the shape {shape}")
    split = len(shape)
    while split > 0 and box[split:] == shape[split:]:
        split -= 1
    # Dimensions from `split` on are contiguous in the tensor.
    run = math.prod(box[split:])
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    end = min(start + count, math.prod(box))
    while start < end:
        row, within = divmod(start, run)
        length = min(run - within, end - start)
        position = within + sum(o * s for o, s in zip(offset, strides, strict=True))
        for axis in reversed(range(split)):
            row, index = divmod(row, box[axis])
            position += index * strides[axis]
        yield position, length
        start += length


def convertible(have: DType, want: DType) -> bool:
    """Return whether a base's elements of one type serve as references for another."""
    return have == want or (_rounds(have) and _rounds(want))


def _rounds(dtype: DType) -> bool:
    return dtype.floating and dtype.size == dtype.lane > 1


def _convert(data: Bytes, have: DType, want: DType) -> Bytes:
    if have == want:
        return data
    if have.torch is None or want.torch is None or not convertible(have, want):
        raise MismatchError(f"{have.name} is not converted to {want.name}")
    source = torch.from_numpy(data.copy()).view(have.torch)
    converted: Bytes = source.to(want.torch).view(torch.uint8).numpy()
    nan = source.isnan()
    if nan.any():
        # Which NaN a conversion gives depends on the processor and the position.
        converted.reshape(-1, want.size)[nan.numpy()] = 0
    return converted


def _spans(file: Path, place: TensorPlace) -> Iterator[tuple[Path, int, int, DType]]:
    for at in range(0, place.nbytes, CHUNK_BYTES):
        yield file, place.offset + at, min(CHUNK_BYTES, place.nbytes - at), place.dtype


def _key_at(file: Path, offset: int, length: int, dtype: DType) -> bytes:
    return chunk_key(read_file(file, offset, length), dtype)


def _content(tensors: Mapping[str, BaseTensor]) -> dict[str, Any]:
    return {
        name: {
            "dtype": tensor.dtype.name,
            "shape": list(tensor.shape),
            "chunks": b"".join(tensor.keys).hex(),
        }
        for name, tensor in tensors.items()
    }


def _to_json(base: Base) -> bytes:
    return seal(
        {
            "format": "msft-base",
            "version": VERSION,
            "id": base.id,
            "path": base.path,
            "files": [list(file) for file in base.files],
            "content": _content(base.tensors),
            "places": {name: [t.file, t.offset] for name, t in base.tensors.items()},
        }
    )


def _from_json(backend: Backend, path: str) -> Base:
    what = backend.describe(path)
    record = unseal(backend.read(path), what, "msft-base")
    try:
        tensors = {}
        for name, entry in record["content"].items():
            keys = bytes.fromhex(entry["chunks"])
            file, offset = record["places"][name]
            tensors[name] = BaseTensor(
                dtype=by_name(entry["dtype"]),
                shape=tuple(entry["shape"]),
                file=file,
                offset=offset,
                keys=tuple(keys[at : at + KEY_BYTES] for at in range(0, len(keys), KEY_BYTES)),
            )
        files = tuple((str(name), int(size)) for name, size in record["files"])
        return Base(id=record["id"], path=record["path"], files=files, tensors=tensors)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CorruptedError(f"{what} cannot be read: {error!r}") from None
