"""Write and read manifests: a checkpoint exists if and only if its manifest file does.

``manifests/<id>.json`` begins with a sealed line that holds all that a listing needs (FORMAT.md,
section 3). The rest is the tensor table, of which the line has the digest: a second line in version
1, and an :class:`EncodedTable` in version 2, which :mod:`~.tables` encodes and decodes.

Invariants: the id is the digest of the canonical content, which is the tensor keys and the
metadata, but no encodings, sizes on disk, paths or times. Saving equal content again therefore
gives the same checkpoint, and repacking never changes an id. The pieces of a tensor cover each of
its elements exactly once.

Example::

    checkpoint = read_checkpoint(backend, identity)
    tables.read(checkpoint)["lm_head.weight"].pieces[0].keys
"""

from __future__ import annotations

import json
import math
import operator
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from msft_store.errors import REPAIR_HINT, CorruptedError, InvalidInputError
from msft_store.format.dtypes import DType, dtype_by_name
from msft_store.format.layout import (
    CHUNK_BYTES,
    VERSIONS,
    canonical_json,
    digest,
    join_keys,
    seal,
    split_keys,
    unseal,
)
from msft_store.format.strict_json import (
    NUMBER_LIMIT,
    check_id,
    check_natural,
    check_object,
    check_shallow_object,
    check_shape,
    check_string,
    check_strings,
    check_tensor_name,
    parse,
)
from msft_store.storage.backend import (
    MAX_SMALL_FILE_BYTES,
    Backend,
    list_names,
    read_small_file,
    write_atomic,
)

MAX_CUT = 4
"""Maximum number of dimensions along which a tensor may be cut into pieces."""

Shape = tuple[int, ...]


def is_exactly_covered(boxes: Sequence[tuple[Shape, Shape]], shape: Shape) -> bool:
    """Return True if boxes, given as (offset, shape), cover each element of a shape once.

    The boxes must lie inside the shape. The time is linear in their number: each corner of a box is
    weighted 1 or -1, alternating along each dimension, and the boxes tile the shape if and only if
    the summed weights equal those of the shape itself. :class:`ValueError` if the shape is cut
    along more than :data:`MAX_CUT` dimensions.
    """
    whole = ((0,) * len(shape), shape)
    if math.prod(shape) == 0 or list(boxes) == [whole]:
        return True
    cut = [axis for axis, count in enumerate(shape) if any(box[axis] != count for _, box in boxes)]
    if len(cut) > MAX_CUT:
        raise ValueError(f"a tensor is cut along more than {MAX_CUT} dimensions")
    corners: Counter[Shape] = Counter()
    for (offset, box), weight in [(whole, -1), *((one, 1) for one in boxes)]:
        for ends in product((0, 1), repeat=len(cut)):
            corner = tuple(
                offset[axis] + end * box[axis] for axis, end in zip(cut, ends, strict=True)
            )
            corners[corner] += -weight if sum(ends) % 2 else weight
    return not any(corners.values())


MANIFESTS = "manifests"
_KIND = "msft-manifest"
_FIRST_READ = 1 << 14
_NOT_FINITE = ("NaN", "Infinity", "-Infinity")


@dataclass(frozen=True, kw_only=True)
class Piece:
    """The box of a tensor that one process held, and the keys of its chunks in order."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]
    keys: tuple[bytes, ...]


@dataclass(frozen=True, kw_only=True)
class TensorEntry:
    """The description of one tensor of a checkpoint.

    The pieces cover each element once. A tensor that one process saved has one piece.
    """

    dtype: DType
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]

    @property
    def nbytes(self) -> int:
        """Decoded size of the whole tensor in bytes."""
        return math.prod(self.shape) * self.dtype.size

    def chunks(self) -> Iterator[tuple[bytes, int]]:
        """Yield the key and the decoded size in bytes of each chunk of all pieces."""
        for piece in self.pieces:
            yield from chunks_of(piece, self.dtype)


def whole_entry(dtype: DType, shape: Shape, keys: tuple[bytes, ...]) -> TensorEntry:
    """Return the description of a tensor of one piece."""
    piece = Piece(offset=(0,) * len(shape), shape=shape, keys=keys)
    return TensorEntry(dtype=dtype, shape=shape, pieces=(piece,))


@dataclass(frozen=True, kw_only=True)
class EncodedTable:
    """A tensor table in the form that it has in a manifest of version 2."""

    frames: tuple[tuple[int, int], tuple[int, int]]
    """The lengths of the frames of the mapping and of the table, each with that of its content."""
    data: bytes
    """The frames, one after the other."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """An immutable set of named tensors with metadata.

    Attributes:
        id: Digest of the canonical content (FORMAT.md, section 3).
        parent: Id of the checkpoint or base that it descends from, or ``None``.
        base: Id of the base at the start of its lineage, or ``None``.
        step: Training step, or ``None``.
        metrics: Numbers by metric name, in their natural units.
        tags: Labels.
        metadata: JSON object.
        logical_bytes: Decoded size of its tensors and files in bytes.
        stored_bytes: Encoded bytes of the chunks that it names. A chunk that several checkpoints
            share counts for each of them.
        unreferenced_bytes: Decoded bytes that its save encoded without a reference.
        created: Time of the save in nanoseconds since 1970; not part of the content.
        tensor_digest: Digest of the tensor table.
    """

    id: str
    parent: str | None
    base: str | None
    step: int | None
    metrics: Mapping[str, float]
    tags: tuple[str, ...]
    metadata: Mapping[str, Any]
    logical_bytes: int
    stored_bytes: int
    unreferenced_bytes: int
    created: int
    tensor_digest: str = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class CheckpointFacts:
    """The part of a checkpoint that its author states, checked and copied by :meth:`of`."""

    step: int | None
    metrics: Mapping[str, float]
    tags: tuple[str, ...]
    metadata: Mapping[str, Any]

    @classmethod
    def of(
        cls,
        *,
        step: int | None = None,
        metrics: Mapping[str, float] | None = None,
        tags: Sequence[str] = (),
        metadata: Mapping[str, Any] | None = None,
    ) -> CheckpointFacts:
        """Return the facts as they are now; later changes by the caller have no effect.

        Raises:
            InvalidInputError: A manifest cannot hold one of them.
        """
        listed = isinstance(tags, Sequence) and not isinstance(tags, str)
        if not listed or any(not isinstance(tag, str) for tag in tags):
            raise InvalidInputError(f"tags must be a list of strings, not {tags!r}")
        if metrics is not None and not isinstance(metrics, Mapping):
            raise InvalidInputError(f"metrics must map names to numbers, not {metrics!r}")
        if metadata is not None and not isinstance(metadata, Mapping):
            raise InvalidInputError("metadata must be an object of JSON with strings as keys")
        numbers = {_metric_name(name): _metric_number(v) for name, v in (metrics or {}).items()}
        # The round trip through JSON copies the metadata and refuses values that JSON cannot hold.
        content = {"tags": list(tags), "metadata": dict(metadata or {})}
        normal: dict[str, Any] = json.loads(canonical_json({**content, "metrics": list(numbers)}))
        try:
            check_shallow_object(content["metadata"])
        except ValueError as error:
            raise InvalidInputError(f"metadata cannot be kept: {error}") from None
        return cls(
            step=None if step is None else _step(step),
            metrics=numbers,
            tags=tuple(normal["tags"]),
            metadata=normal["metadata"],
        )


def checkpoint_content(
    facts: CheckpointFacts,
    *,
    parent: str | None,
    base: str | None,
    tensors: bytes,
    logical_bytes: int,
) -> dict[str, Any]:
    """Return the canonical content of a checkpoint, of which its id is the digest.

    ``tensors`` is the result of :func:`tensor_table`. Metrics that JSON has no number for become
    the strings ``NaN``, ``Infinity`` and ``-Infinity``.
    """
    content = {
        "parent": parent,
        "base": base,
        "step": facts.step,
        "metrics": {name: _metric_to_json(value) for name, value in facts.metrics.items()},
        "tags": list(facts.tags),
        "metadata": facts.metadata,
        "tensors": digest(tensors),
        "logical_bytes": logical_bytes,
    }
    normal: dict[str, Any] = json.loads(canonical_json(content))
    return normal


def _step(value: Any) -> int:
    """Return a step as a Python integer; NumPy and torch have integers of their own."""
    try:
        step = -1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        step = -1
    if not 0 <= step < NUMBER_LIMIT:
        raise InvalidInputError(f"step must be a whole number from 0 up, not {value!r}")
    return step


def _metric_name(name: object) -> str:
    if not isinstance(name, str):
        raise InvalidInputError(f"the name of a metric must be a string, not {name!r}")
    return name


def _metric_number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        raise InvalidInputError(f"a metric must be a number, not {value!r}") from None


def _metric_to_json(number: float) -> float | str:
    if math.isnan(number):
        return "NaN"
    if math.isinf(number):
        return "Infinity" if number > 0 else "-Infinity"
    return number


def tensor_table(tensors: Mapping[str, TensorEntry]) -> bytes:
    """Encode a tensor table as canonical JSON, of which a manifest has the digest."""
    return canonical_json(
        {
            name: {
                "dtype": entry.dtype.name,
                "shape": list(entry.shape),
                "pieces": [
                    {
                        "offset": list(piece.offset),
                        "shape": list(piece.shape),
                        "chunks": join_keys(piece.keys),
                    }
                    for piece in entry.pieces
                ],
            }
            for name, entry in tensors.items()
        }
    )


def write_manifest(
    backend: Backend,
    content: Mapping[str, Any],
    tensors: bytes | EncodedTable,
    *,
    created: int,
    stored_bytes: int,
    unreferenced_bytes: int,
) -> Checkpoint:
    """Write a manifest durably; once this returns, the checkpoint exists.

    An encoded table makes it a manifest of version 2, a plain one a manifest of version 1.
    """
    identity = digest(canonical_json(content))
    encoded = isinstance(tensors, EncodedTable)
    head = {
        "format": _KIND,
        "version": 2 if encoded else 1,
        **({"frames": tensors.frames} if isinstance(tensors, EncodedTable) else {}),
        "id": identity,
        "content": content,
        "created": created,
        "stored_bytes": stored_bytes,
        "unreferenced_bytes": unreferenced_bytes,
    }
    rest = tensors.data if isinstance(tensors, EncodedTable) else tensors + b"\n"
    data = seal(head) + b"\n" + rest
    if len(data) > MAX_SMALL_FILE_BYTES:
        raise InvalidInputError(
            f"a manifest of {len(data)} bytes; at most {MAX_SMALL_FILE_BYTES} can be kept"
        )
    write_atomic(backend, manifest_path(identity), data)
    return _checkpoint(head)


def rewrite_manifest(backend: Backend, checkpoint: Checkpoint, *, stored_bytes: int) -> Checkpoint:
    """Replace ``stored_bytes`` in a manifest; the id does not depend on it."""
    data = read_small_file(backend, manifest_path(checkpoint.id))
    line, _, rest = data.partition(b"\n")
    what = backend.describe(manifest_path(checkpoint.id))
    head = unseal(line, what, _KIND, VERSIONS)
    head["stored_bytes"] = stored_bytes
    write_atomic(backend, manifest_path(checkpoint.id), seal(head) + b"\n" + rest)
    return _checkpoint(head)


def manifest_path(identity: str) -> str:
    """Return the path of a checkpoint's manifest."""
    return f"{MANIFESTS}/{identity}.json"


def list_manifests(backend: Backend) -> list[str]:
    """Return the ids of all checkpoints."""
    return list_names(backend, MANIFESTS)


def read_checkpoint(backend: Backend, identity: str) -> Checkpoint:
    """Read the first line of a manifest."""
    line, what = _read_head(backend, identity)
    return _parse_head(line, identity, what)


def read_version(backend: Backend, identity: str) -> int:
    """Return the version that a manifest states."""
    version: int = unseal(*_read_head(backend, identity), _KIND, VERSIONS)["version"]
    return version


def _read_head(backend: Backend, identity: str) -> tuple[bytes, str]:
    path = manifest_path(identity)
    data = backend.read(path, 0, _FIRST_READ)
    while b"\n" not in data:
        more = backend.read(path, len(data), len(data))
        if not more or len(data) > MAX_SMALL_FILE_BYTES:
            what = backend.describe(path)
            raise CorruptedError(f"{what} is truncated; {REPAIR_HINT}", file=what)
        data += more
    return data[: data.index(b"\n")], backend.describe(path)


def read_parts(backend: Backend, identity: str) -> tuple[bytes | EncodedTable, str]:
    """Return the tensor table of a manifest as it stands in the file, and the name of the file."""
    path = manifest_path(identity)
    data, what = read_small_file(backend, path), backend.describe(path)
    line, _, rest = data.partition(b"\n")
    head = unseal(line, what, _KIND, VERSIONS)
    if head["version"] == 1:
        if rest[-1:] != b"\n":
            raise CorruptedError(f"{what} is truncated; {REPAIR_HINT}", file=what)
        return rest[:-1], what
    try:
        frames = table_frames(head)
    except (KeyError, ValueError, TypeError) as error:
        raise CorruptedError(f"{what} cannot be read: {error!r}") from None
    if sum(length for length, _ in frames) != len(rest):
        raise CorruptedError(f"{what} has another length than it states; {REPAIR_HINT}", file=what)
    return EncodedTable(frames=frames, data=rest), what


def table_frames(head: Mapping[str, Any]) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return the lengths of the two frames of a manifest and of their content, from its head."""
    (first, second), (third, fourth) = (check_shape(lengths) for lengths in head["frames"])
    return (first, second), (third, fourth)


def parse_table(table: bytes, what: str, checkpoint: Checkpoint) -> dict[str, TensorEntry]:
    """Return the entries of a checkpoint's tensor table, sorted by name; ``what`` has the table."""
    try:
        named = check_object(parse(table)).items()
        entries = {check_tensor_name(name): _entry(check_object(value)) for name, value in named}
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptedError(f"the tensor table in {what} cannot be read: {error}") from None
    if sum(entry.nbytes for entry in entries.values()) != checkpoint.logical_bytes:
        raise CorruptedError(f"the tensor table in {what} does not have the size that it states")
    return entries


def chunks_of(piece: Piece, dtype: DType) -> Iterator[tuple[bytes, int]]:
    """Yield the key and the decoded size in bytes of each chunk of a piece."""
    rest = math.prod(piece.shape) * dtype.size
    for key in piece.keys:
        yield key, min(rest, CHUNK_BYTES)
        rest -= CHUNK_BYTES


def _parse_head(line: bytes, identity: str, what: str) -> Checkpoint:
    head = unseal(line, what, _KIND, VERSIONS)
    try:
        if digest(canonical_json(head["content"])) != head["id"] or head["id"] != identity:
            raise CorruptedError(f"{what} does not hold the checkpoint that its name says")
        return _checkpoint(head)
    except (KeyError, ValueError) as error:
        raise CorruptedError(f"{what} cannot be read: {error!r}") from None


def _checkpoint(head: Mapping[str, Any]) -> Checkpoint:
    content = check_object(head["content"])
    parent, base, step = content["parent"], content["base"], content["step"]
    return Checkpoint(
        id=check_id(head["id"]),
        parent=None if parent is None else check_id(parent),
        base=None if base is None else check_id(base),
        step=None if step is None else check_natural(step),
        metrics={name: _metric(value) for name, value in check_object(content["metrics"]).items()},
        tags=check_strings(content["tags"]),
        metadata=check_shallow_object(content["metadata"]),
        logical_bytes=check_natural(content["logical_bytes"]),
        stored_bytes=check_natural(head["stored_bytes"]),
        unreferenced_bytes=check_natural(head["unreferenced_bytes"]),
        created=check_natural(head["created"]),
        tensor_digest=check_id(content["tensors"]),
    )


def _metric(value: Any) -> float:
    if type(value) is not float and value not in _NOT_FINITE:
        raise ValueError("a metric is not a number")
    return float(value)


def _entry(value: Mapping[str, Any]) -> TensorEntry:
    dtype, shape = dtype_by_name(value["dtype"]), check_shape(value["shape"])
    pieces = tuple(_piece(check_object(piece), shape, dtype) for piece in value["pieces"])
    if not is_exactly_covered([(piece.offset, piece.shape) for piece in pieces], shape):
        raise ValueError("pieces do not cover their tensor, or overlap")
    return TensorEntry(dtype=dtype, shape=shape, pieces=pieces)


def _piece(value: Mapping[str, Any], tensor_shape: Shape, dtype: DType) -> Piece:
    offset, shape = check_shape(value["offset"]), check_shape(value["shape"])
    if not all(o + n <= s for o, n, s in zip(offset, shape, tensor_shape, strict=True)):
        raise ValueError("a piece lies outside its tensor")
    keys = split_keys(check_string(value["chunks"]), math.prod(shape) * dtype.size)
    return Piece(offset=offset, shape=shape, keys=keys)
