"""Record bases: models on disk that a store refers to by content.

``bases/<id>.json`` records the keys of all chunks and their positions in the files. Invariants: the
store never copies or changes a base's files. The id is the digest of names, dtypes, shapes and
keys, so a base keeps its id if its files are moved (:func:`relocate`) or sharded differently.

Example::

    base = add_base(backend, Path("Qwen2.5-0.5B"))
    base.tensors["lm_head.weight"].shape
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from msft_store.errors import BaseError, CorruptedError
from msft_store.format.dtypes import DType, dtype_by_name
from msft_store.format.layout import (
    CHUNK_BYTES,
    VERSION,
    canonical_json,
    chunk_key,
    digest,
    join_keys,
    seal,
    split_keys,
    unseal,
)
from msft_store.format.strict_json import (
    check_natural,
    check_object,
    check_shape,
    check_string,
    check_tensor_name,
)
from msft_store.objects.safetensors_header import TensorPlace, read_headers
from msft_store.storage.backend import (
    Backend,
    list_names,
    read_file,
    read_small_file,
    translate_os_errors,
    write_atomic,
)

BASES = "bases"
_CLOCK_TICK = 10**8
"""Nanoseconds within which two changes of a file may get the same time."""

Stamp = tuple[int, ...]
"""Device, inode, size, time of modification and time of change of a file."""


@dataclass(frozen=True, kw_only=True)
class _SeenFile:
    stamp: Stamp
    chunks: dict[tuple[int, bytes], bool]
    """Whether the file has a chunk, by offset and key."""


_SEEN: dict[str, _SeenFile] = {}
"""The chunks of bases' files that this process has compared with their keys, by path."""


def file_stamp(path: str | Path) -> Stamp | None:
    """Return the values of which one changes whenever a file does.

    The result is ``None`` for a missing file, and for one that changed so recently that the next
    change may get the same time.
    """
    try:
        found = os.stat(path)
    except OSError:
        return None
    if abs(time.time_ns() - found.st_ctime_ns) < _CLOCK_TICK:
        return None
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


def last_seen(path: str) -> tuple[Stamp | None, Mapping[tuple[int, bytes], bool]]:
    """Return a file's stamp when this process last compared a chunk, and the chunks seen then."""
    seen = _SEEN.get(path)
    return (None, {}) if seen is None else (seen.stamp, seen.chunks)


def seen_chunks(path: str, stamp: Stamp) -> dict[tuple[int, bytes], bool]:
    """Return which chunks a file has, as far as this process read them under this stamp."""
    seen = _SEEN.get(path)
    if seen is None or seen.stamp != stamp:
        seen = _SEEN[path] = _SeenFile(stamp=stamp, chunks={})
    return seen.chunks


@dataclass(frozen=True, kw_only=True)
class BaseTensor:
    """A tensor of a base: its place in ``Base.files``, and the keys of its chunks in order."""

    dtype: DType
    shape: tuple[int, ...]
    file: int
    offset: int
    keys: tuple[bytes, ...]

    @property
    def nbytes(self) -> int:
        """Size of the tensor in bytes."""
        return math.prod(self.shape) * self.dtype.size


@dataclass(frozen=True, kw_only=True)
class Base:
    """A model on disk that checkpoints are stored as differences from.

    Attributes:
        id: Digest of the tensors' names, dtypes, shapes and chunk keys.
        path: File or directory that was added.
        files: Paths of its safetensors files and their sizes in bytes.
        tensors: Tensors by name.
        changed: Times of the files' last change (``st_ctime_ns``) before they were read; empty if
            an older release wrote the record.
    """

    id: str
    path: str
    files: tuple[tuple[str, int], ...]
    tensors: Mapping[str, BaseTensor] = field(repr=False)
    changed: tuple[int, ...] = field(default=(), repr=False, compare=False)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of its tensors by name."""
        return {name: tensor.shape for name, tensor in self.tensors.items()}

    @property
    def logical_bytes(self) -> int:
        """Total size of its tensors in bytes."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def add_base(backend: Backend, path: Path) -> Base:
    """Read a safetensors file, or a directory of them, and write its record."""
    base = scan_base(path)
    write_base(backend, base)
    return base


def relocate(backend: Backend, base: Base, path: Path) -> Base:
    """Record a base's new path; :class:`BaseError` if the files there hold another model."""
    found = scan_base(path)
    if found.id != base.id:
        raise BaseError(f"{path} holds base {found.id[:12]}, not {base.id[:12]}: wrong model")
    write_base(backend, found)
    return found


def write_base(backend: Backend, base: Base) -> None:
    """Write the record of a base durably; replace an earlier record."""
    write_atomic(backend, base_path(base.id), encode_base(base))


def scan_base(path: Path) -> Base:
    """Read the model at a path as a base; write nothing."""
    path = path.absolute()
    with translate_os_errors("read", path):
        return _scan(path)


def _scan(path: Path) -> Base:
    headers = read_headers(path)
    files = [file for file, _ in headers]
    places = {
        name: (number, place)
        for number, (_, header) in enumerate(headers)
        for name, place in header.items()
    }
    # The times are read before the content, so that a later change always shows.
    stamps = [file_stamp(file) for file in files]
    changed = tuple(file.stat().st_ctime_ns for file in files)
    with ThreadPoolExecutor() as pool:
        tensors = {
            name: BaseTensor(
                dtype=place.dtype,
                shape=place.shape,
                file=number,
                offset=place.offset,
                keys=tuple(
                    pool.map(
                        partial(_chunk_key, files[number], place),
                        range(0, place.nbytes, CHUNK_BYTES),
                    )
                ),
            )
            for name, (number, place) in sorted(places.items())
        }
    for tensor in tensors.values():
        stamp = stamps[tensor.file]
        if stamp is not None:
            seen = seen_chunks(str(files[tensor.file]), stamp)
            for at, key in enumerate(tensor.keys):
                seen[tensor.offset + at * CHUNK_BYTES, key] = True
    return Base(
        id=base_id(tensors),
        path=str(path),
        files=tuple((str(file), file.stat().st_size) for file in files),
        tensors=tensors,
        changed=changed,
    )


def has_missing_files(base: Base) -> bool:
    """Return True if a file of a base is missing or shorter than recorded."""
    try:
        return any(os.stat(path).st_size < size for path, size in base.files)
    except OSError:
        return True


def files_touched(base: Base) -> list[bool]:
    """Return for each file of a base whether it may have changed since it was recorded."""
    if not base.changed:
        return [True] * len(base.files)
    return [
        not _is_unchanged(path, size, changed)
        for (path, size), changed in zip(base.files, base.changed, strict=True)
    ]


def _is_unchanged(path: str, size: int, changed: int) -> bool:
    try:
        found = os.stat(path)
    except OSError:
        return False
    return (found.st_size, found.st_ctime_ns) == (size, changed)


def base_path(identity: str) -> str:
    """Return the path of a base's record."""
    return f"{BASES}/{identity}.json"


def list_bases(backend: Backend) -> list[str]:
    """Return the ids of all bases."""
    return list_names(backend, BASES)


def _chunk_key(file: Path, place: TensorPlace, at: int) -> bytes:
    length = min(CHUNK_BYTES, place.nbytes - at)
    return chunk_key(read_file(file, place.offset + at, length), place.dtype)


def base_id(tensors: Mapping[str, BaseTensor]) -> str:
    """Return the id of a base: the digest of names, dtypes, shapes and keys."""
    return digest(canonical_json(_content(tensors)))


def _content(tensors: Mapping[str, BaseTensor]) -> dict[str, Any]:
    return {
        name: {
            "dtype": tensor.dtype.name,
            "shape": list(tensor.shape),
            "chunks": join_keys(tensor.keys),
        }
        for name, tensor in tensors.items()
    }


def encode_base(base: Base) -> bytes:
    """Return the content of a base's record."""
    return seal(
        {
            "format": "msft-base",
            "version": VERSION,
            "id": base.id,
            "path": base.path,
            "files": [list(file) for file in base.files],
            **({"changed": list(base.changed)} if base.changed else {}),
            "content": _content(base.tensors),
            "places": {name: [t.file, t.offset] for name, t in base.tensors.items()},
        }
    )


def read_base(backend: Backend, identity: str) -> Base:
    """Read the record of a base."""
    path = base_path(identity)
    what = backend.describe(path)
    record = unseal(read_small_file(backend, path), what, "msft-base")
    try:
        if digest(canonical_json(record["content"])) != record["id"] or record["id"] != identity:
            raise CorruptedError(f"{what} does not hold the base that its name says")
        files = tuple((_path(name), check_natural(size)) for name, size in record["files"])
        places = check_object(record["places"])
        changed = tuple(check_natural(time) for time in record.get("changed", ()))
        if changed and len(changed) != len(files):
            raise ValueError("it has another number of times than of files")
        tensors = {
            check_tensor_name(name): _tensor(check_object(entry), places[name], files)
            for name, entry in check_object(record["content"]).items()
        }
        return Base(
            id=identity,
            path=_path(record["path"]),
            files=files,
            tensors=tensors,
            changed=changed,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptedError(f"{what} cannot be read: {error!r}") from None


def _tensor(entry: Mapping[str, Any], place: Any, files: Sequence[tuple[str, int]]) -> BaseTensor:
    dtype, shape = dtype_by_name(entry["dtype"]), check_shape(entry["shape"])
    nbytes = math.prod(shape) * dtype.size
    file, offset = check_shape(place)
    if file >= len(files) or offset + nbytes > files[file][1]:
        raise ValueError("a tensor's position is outside the listed files")
    keys = split_keys(check_string(entry["chunks"]), nbytes)
    return BaseTensor(dtype=dtype, shape=shape, file=file, offset=offset, keys=keys)


def _path(value: Any) -> str:
    path = check_string(value)
    if not os.path.isabs(os.fsencode(path)) or "\0" in path:
        raise ValueError(f"{path!r:.80} is not an absolute path")
    return path
