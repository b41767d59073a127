"""Encode tensor tables for manifests of version 2, and read those of every version.

A tensor table of version 2 is a zstd frame whose dictionary is the *prediction*: the table that the
checkpoint would have if its tensors were those of its base, under the names that its mapping gives
them. A tensor that equals the base's takes next to nothing in this way, and a changed one little
more than its keys.

Invariants: the decoded table is the canonical one, of which the manifest has the digest, so that
the id of a checkpoint does not depend on how its table is kept. A decoded length is checked before
memory is taken.

Example::

    tables = TensorTables(backend, lambda identity: read_base(backend, identity))
    tables.read(checkpoint)["lm_head.weight"].pieces[0].keys
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from msft_store.errors import (
    REPAIR_HINT,
    BaseError,
    CorruptedError,
    InvalidInputError,
    UnknownCheckpointError,
    strip_hint,
)
from msft_store.format.key_table import Keys, KeyScanner, view_keys
from msft_store.format.layout import canonical_json, compress_against, decompress, digest
from msft_store.format.mapping import NOTHING, BaseMapping
from msft_store.format.strict_json import parse
from msft_store.objects.bases import Base
from msft_store.objects.manifest import (
    Checkpoint,
    EncodedTable,
    TensorEntry,
    parse_table,
    read_checkpoint,
    read_parts,
    tensor_table,
    whole_entry,
)
from msft_store.storage.backend import MAX_SMALL_FILE_BYTES, Backend

_MAX_EXTRA = 1 << 20
_MAX_RATIO = 1 << 10
"""Decoded bytes that each byte of a frame adds to the limit, besides those of the dictionary."""
_MAX_PREDICTIONS = 4


@dataclass(frozen=True, kw_only=True)
class _Prediction:
    mapping: BaseMapping
    table: bytes
    """The tensor table of a checkpoint that equals the base."""


class TensorTables:
    """Encodes and reads the tensor tables of a store's manifests."""

    def __init__(self, backend: Backend, base: Callable[[str], Base]) -> None:
        """Create a reader of a store; ``base`` returns a base of it by id."""
        self._backend = backend
        self._base = base
        self._scanner = KeyScanner()
        self._predictions: dict[tuple[str, bytes], _Prediction] = {}

    def encode(self, table: bytes, base: str | None, mapping: BaseMapping) -> EncodedTable:
        """Return the form that a table has in a manifest of version 2.

        Raises:
            InvalidInputError: A reader would refuse the table for its size.
        """
        text = b""
        if base is not None and mapping:
            text = canonical_json(mapping.to_json(self._base(base).shapes))
        first = _deflate(text, self._predict(base, b"").table if text else b"")
        second = _deflate(table, self._predict(base, text).table)
        lengths = (len(first), len(text)), (len(second), len(table))
        return EncodedTable(frames=lengths, data=first + second)

    def read(self, checkpoint: Checkpoint) -> dict[str, TensorEntry]:
        """Return the tensor table of a checkpoint, sorted by name."""
        return parse_table(*self._table(self._backend, checkpoint), checkpoint)

    def verify(self, backend: Backend, identity: str) -> Checkpoint:
        """Read and verify the whole manifest of a checkpoint in this or another store.

        The base is looked up in this store.
        """
        checkpoint = read_checkpoint(backend, identity)
        parse_table(*self._table(backend, checkpoint), checkpoint)
        return checkpoint

    def keys(self, checkpoint: Checkpoint) -> Keys:
        """Return the keys of all chunks that a checkpoint names, in order and with duplicates."""
        table, what = self._table(self._backend, checkpoint)
        keys = self._scanner.scan(table)
        if keys is None:
            entries = parse_table(table, what, checkpoint).values()
            named = (key for entry in entries for piece in entry.pieces for key in piece.keys)
            keys = view_keys(b"".join(named))
        return keys

    def mapping(self, checkpoint: Checkpoint) -> BaseMapping:
        """Return the counterparts in its base that a checkpoint's manifest records."""
        parts, what = read_parts(self._backend, checkpoint.id)
        if not isinstance(parts, EncodedTable) or checkpoint.base is None:
            return NOTHING
        try:
            return self._predict(
                checkpoint.base, self._mapping_text(parts, checkpoint.base)
            ).mapping
        except (ValueError, KeyError, TypeError) as error:
            raise CorruptedError(f"the mapping in {what} cannot be read: {error}") from None

    def _table(self, backend: Backend, checkpoint: Checkpoint) -> tuple[bytes, str]:
        parts, what = read_parts(backend, checkpoint.id)
        try:
            table = (
                self._decode(parts, checkpoint.base) if isinstance(parts, EncodedTable) else parts
            )
        except BaseError as error:
            raise BaseError(f"the tensor table in {what} {error}") from None
        except (ValueError, KeyError, TypeError) as error:
            raise CorruptedError(
                f"the tensor table in {what} cannot be read: {error}; {REPAIR_HINT}", file=what
            ) from None
        if digest(table) != checkpoint.tensor_digest:
            raise CorruptedError(
                f"the tensor table in {what} does not match its digest; {REPAIR_HINT}", file=what
            )
        return table, what

    def _decode(self, parts: EncodedTable, base: str | None) -> bytes:
        (first, _), (second, size) = parts.frames
        prediction = self._predict(base, self._mapping_text(parts, base))
        return _inflate(parts.data[first : first + second], size, prediction.table)

    def _mapping_text(self, parts: EncodedTable, base: str | None) -> bytes:
        length, size = parts.frames[0]
        if base is None or not length:
            if length or size:
                raise ValueError("it has a mapping, but no base")
            return b""
        return _inflate(parts.data[:length], size, self._predict(base, b"").table)

    def _predict(self, base: str | None, text: bytes) -> _Prediction:
        """Return the prediction for a base and the JSON of a mapping; both may be absent."""
        if base is None:
            return _Prediction(mapping=NOTHING, table=b"")
        found = self._predictions.get((base, text))
        if found is None:
            try:
                known = self._base(base)
            except (UnknownCheckpointError, CorruptedError) as error:
                raise BaseError(
                    f"is kept as a difference from base {base[:12]}, of which the store has no "
                    f"record that can be read ({strip_hint(error)}): msft-store add-base PATH with "
                    "the same model writes the record again"
                ) from None
            mapping = BaseMapping.from_json(parse(text), known.shapes) if text else NOTHING
            found = _Prediction(mapping=mapping, table=_predicted_table(known, mapping.names))
            if len(self._predictions) >= _MAX_PREDICTIONS:
                self._predictions = {}
            self._predictions[base, text] = found
        return found


def _predicted_table(base: Base, names: Mapping[str, str]) -> bytes:
    renamed = set(names.values())
    places = {name: name for name in base.tensors if name not in renamed} | dict(names)
    tensors = {name: base.tensors[of] for name, of in places.items()}
    return tensor_table(
        {name: whole_entry(t.dtype, t.shape, t.keys) for name, t in tensors.items()}
    )


def _most_bytes(frame: int, dictionary: bytes) -> int:
    """Return the largest decoded length of a frame."""
    return min(_MAX_EXTRA + _MAX_RATIO * frame + len(dictionary), MAX_SMALL_FILE_BYTES)


def _deflate(data: bytes, dictionary: bytes) -> bytes:
    frame = compress_against(data, dictionary) if data else b""
    if len(data) > _most_bytes(len(frame), dictionary):
        raise InvalidInputError(
            f"a manifest needs {len(data)} bytes for the names and places of the tensors, which "
            "are too many; shorten the names of more than 900 characters"
        )
    return frame


def _inflate(frame: bytes, size: int, dictionary: bytes) -> bytes:
    if size > _most_bytes(len(frame), dictionary):
        raise ValueError(f"{len(frame)} bytes are said to be {size} bytes")
    return bytes(decompress(frame, size, dictionary))
