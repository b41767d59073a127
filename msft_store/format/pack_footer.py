"""Encode and decode the footer of a pack: the list of the records in it.

Invariants: the digest and the sizes of a footer are checked when it is parsed. Records stay in the
array that they are in the file, because a store has hundreds of thousands of them. References stay
JSON until the first one is needed.

Example::

    footer = decode_footer(data, trailer, "packs/00ff.pack")
    footer.record(0).codec
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import xxhash
import zstandard
from numpy.typing import NDArray

from msft_store.errors import CorruptedError, InvalidInputError
from msft_store.format.dtypes import DTYPES
from msft_store.format.key_table import Keys, is_zero
from msft_store.format.layout import (
    CHUNK_BYTES,
    KEY_BYTES,
    MAX_DEPTH,
    NEWEST,
    VERSIONS,
    BaseSpan,
    ChunkSpan,
    Record,
    References,
    ViewSpan,
    canonical_json,
    decompress,
)
from msft_store.format.mapping import View
from msft_store.format.strict_json import (
    check_id,
    check_natural,
    check_object,
    check_shape,
    check_strings,
    check_tensor_name,
    parse,
)

PACK_MAGIC = b"msftpack"
PACK_HEADER = struct.Struct("<8sII")
PACK_TRAILER = struct.Struct("<QIIII16s8s")
NO_INDEX = 0xFFFFFFFF
"""The index that means that a record has no reference, or no base."""
_MAX_TABLE = 1 << 24
_MAX_TABLE_OF_RECORD = 1 << 10
"""Bytes of JSON that each record adds to the limit, as compressed JSON may be tiny."""
_MAX_FOOTER = 1 << 29
_MAX_EXCESS = 1 << 16
"""Largest number of bytes by which a payload exceeds its chunk."""
_MAX_SPANS = 16
_SIZES = np.ones(256, np.uint32)
_SIZES[[dtype.code for dtype in DTYPES]] = [dtype.size for dtype in DTYPES]
_CHUNKS = b'"chunks"'
_BASES = re.compile(rb'\{"bases":(\[[0-9a-f",]*\]),"references":')
_RECORD = np.dtype(
    [
        ("key", "<u8", 2),
        ("ref_key", "<u8", 2),
        ("offset", "<u8"),
        ("length", "<u4"),
        ("size", "<u4"),
        ("codec", "u1"),
        ("dtype", "u1"),
        ("depth", "u1"),
        ("generation", "u1"),
        ("reference", "<u4"),
        ("base", "<u4"),
        ("reserved", "<u4"),
    ]
)
RECORD_BYTES = _RECORD.itemsize
_FIELDS = struct.Struct("<16s16sQIIBBBBIII")
"""The fields of a record in Python's own types."""

Rows = NDArray[np.void]
"""Records in their form in the file."""


@dataclass(frozen=True, kw_only=True)
class Trailer:
    """The last bytes of a pack, which locate its footer."""

    offset: int
    length: int
    size: int
    """Decoded length of the footer, bytes."""
    count: int
    """Number of records."""
    check: bytes


@dataclass(frozen=True, kw_only=True, eq=False)
class Footer:
    """The records of a pack."""

    rows: Rows = field(repr=False)
    bases: tuple[str, ...]
    refers_to_chunk: NDArray[np.bool_] = field(repr=False)
    """Mask of the records that need another chunk, not only the base, to be decoded."""
    file: str
    """Name of the file in messages."""
    check: bytes
    """Digest of the compressed footer: the pack's id."""
    version: int
    """Version of the pack."""
    _table: memoryview = field(repr=False)

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Record]:
        return (self.record(row) for row in range(len(self.rows)))

    @cached_property
    def references(self) -> tuple[References, ...]:
        """The references that records name by index; may raise :class:`CorruptedError`."""
        return _references(bytes(self._table), self.rows, self.file)

    def record(self, row: int) -> Record:
        """Return one record."""
        # NumPy takes ten times as long for the fields of a row.
        fields = _FIELDS.unpack(self.rows[row].tobytes())
        key, ref_key, offset, length, size, codec, dtype, depth, generation = fields[:9]
        reference, base = fields[9:11]
        return Record(
            key=key,
            offset=offset,
            length=length,
            size=size,
            codec=codec,
            dtype=dtype,
            depth=depth,
            base=None if base == NO_INDEX else self.bases[base],
            ref_key=ref_key,
            reference=None if reference == NO_INDEX else self.references[reference],
            generation=generation,
        )


def keys_of(rows: Rows) -> Keys:
    """Return the keys of records."""
    keys: Keys = rows["key"]
    return keys


def pack_header(version: int) -> bytes:
    """Return the first bytes of a pack file."""
    return PACK_HEADER.pack(PACK_MAGIC, version, 0)


def decode_header(data: bytes, file: str) -> int:
    """Return the version of a pack file, from its first bytes."""
    for version in VERSIONS:
        if data == pack_header(version):
            return version
    raise CorruptedError(f"{file} does not begin like a pack of version {NEWEST} or earlier")


def encode_footer(records: Sequence[Record], offset: int) -> tuple[bytes, bytes]:
    """Return footer and trailer of a pack whose payloads end at ``offset``, and its digest."""
    bases: dict[str, int] = {}
    references: list[Any] = []
    views: dict[View, int] = {}
    rows = []
    for record in records:
        place = NO_INDEX
        if record.reference is not None:
            place = len(references)
            references.append(_reference_to_json(record.reference, views))
        rows.append(
            (
                struct.unpack("<2Q", record.key),
                struct.unpack("<2Q", record.ref_key),
                record.offset,
                record.length,
                record.size,
                record.codec,
                record.dtype,
                record.depth,
                record.generation,
                place,
                NO_INDEX if record.base is None else bases.setdefault(record.base, len(bases)),
                0,
            )
        )
    content = {"bases": list(bases), "references": references}
    if views:
        content["views"] = [view.to_json() for view in views]
    table = canonical_json(content)
    raw = struct.pack("<I", len(table)) + table + np.array(rows, _RECORD).tobytes()
    if len(raw) > max_footer_bytes(len(rows)):
        raise InvalidInputError(
            "the tensor names are too long in total; shorten those of more than 900 characters"
        )
    footer = zstandard.ZstdCompressor(level=3).compress(raw)
    check = xxhash.xxh3_128_digest(footer)
    sizes = (len(footer), len(raw), len(records))
    trailer = PACK_TRAILER.pack(offset, *sizes, 0, check, PACK_MAGIC)
    return footer + trailer, check


def decode_trailer(data: bytes, file_size: int, file: str) -> Trailer:
    """Parse the last bytes of a pack file of ``file_size`` bytes."""
    if len(data) != PACK_TRAILER.size:
        raise CorruptedError(f"{file} is truncated")
    offset, length, size, count, zero, check, magic = PACK_TRAILER.unpack(data)
    if magic != PACK_MAGIC or zero or offset + length + PACK_TRAILER.size != file_size:
        raise CorruptedError(f"{file} is truncated or damaged at its end")
    if (
        size > max_footer_bytes(count)
        or length > size + _MAX_EXCESS
        or count * KEY_BYTES > length + 64
    ):
        raise CorruptedError(f"{file} declares a footer that its length rules out")
    return Trailer(offset=offset, length=length, size=size, count=count, check=check)


def max_footer_bytes(count: int) -> int:
    """Return the largest decoded length of a footer of ``count`` records."""
    of_record = _MAX_TABLE_OF_RECORD + _RECORD.itemsize
    return min(_MAX_TABLE + count * of_record, _MAX_FOOTER)


def decode_footer(data: bytes, trailer: Trailer, file: str, version: int = NEWEST) -> Footer:
    """Parse the footer of a pack of a version."""
    if xxhash.xxh3_128_digest(data) != trailer.check:
        raise CorruptedError(f"the footer of {file} does not match its digest")
    try:
        raw = decompress(data, trailer.size)
        (length,) = struct.unpack_from("<I", raw)
        table = bytes(raw[4 : 4 + length])
        if 4 + length + trailer.count * _RECORD.itemsize != trailer.size:
            raise ValueError("its length differs from that of its parts")
        rows: Rows = np.frombuffer(raw, _RECORD, trailer.count, 4 + length)
        bases = _parse_bases(table)
    except (ValueError, KeyError, struct.error) as error:
        raise _footer_error(file, error) from None
    _check_rows(rows, file, MAX_DEPTH[version])
    if ((rows["base"] >= len(bases)) & (rows["base"] != NO_INDEX)).any():
        raise _footer_error(file, "a record names a base that is not listed")
    end = rows["offset"] + rows["length"]
    if (end > trailer.offset).any() or (end < rows["offset"]).any():
        raise CorruptedError(f"the footer of {file} points beyond its payloads")
    refers = _refers_to_chunk(table, rows, file)
    view = raw[4 : 4 + length]
    return Footer(
        rows=rows,
        bases=bases,
        refers_to_chunk=refers,
        file=file,
        check=trailer.check,
        version=version,
        _table=view,
    )


def _check_rows(rows: Rows, file: str, max_depth: int) -> None:
    sizes, lengths = rows["size"], rows["length"].astype(np.int64)
    if (sizes > CHUNK_BYTES).any() or (rows["depth"] > max_depth).any():
        raise _footer_error(file, "a chunk is larger or deeper than the format allows")
    if (sizes == 0).any() or (sizes % _SIZES[rows["dtype"]]).any():
        raise _footer_error(file, "a chunk is empty or ends within an element")
    if (lengths > sizes.astype(np.int64) + _MAX_EXCESS).any():
        raise _footer_error(file, "a payload is much longer than its chunk")
    if rows["reserved"].any():
        raise _footer_error(file, "the reserved bytes of a record are not zero")


def _refers_to_chunk(table: bytes, rows: Rows, file: str) -> NDArray[np.bool_]:
    named = rows["reference"]
    refers: NDArray[np.bool_] = (named == NO_INDEX) & ~is_zero(rows["ref_key"])
    if _CHUNKS in table or b"\\" in table:
        chunks = [isinstance(reference, tuple) for reference in _references(table, rows, file)]
        explicit = np.flatnonzero(named != NO_INDEX)
        refers[explicit] = np.array(chunks, bool)[named[explicit]]
    return refers


def _references(table: bytes, rows: Rows, file: str) -> tuple[References, ...]:
    try:
        content = check_object(parse(table))
        views = tuple(map(View.from_json, content.get("views", ())))
        found = tuple(_reference_from_json(entry, views) for entry in content["references"])
    except (ValueError, KeyError, TypeError) as error:
        raise _footer_error(file, error) from None
    named = rows["reference"]
    explicit = named != NO_INDEX
    if (named[explicit] >= len(found)).any():
        raise _footer_error(file, "a record names a reference that is not listed")
    several = np.array([isinstance(one, tuple) and len(one) > 1 for one in found], bool)
    # The number of chunks that one takes to read must not grow with every level.
    if (several[named[explicit]] & (rows["depth"][explicit] > MAX_DEPTH[1])).any():
        raise _footer_error(file, "a record that refers to several parts is too deep")
    return found


def _parse_bases(table: bytes) -> tuple[str, ...]:
    canonical_bases = _BASES.match(table)
    found = parse(canonical_bases[1] if canonical_bases else table)
    return tuple(
        map(check_id, check_strings(found if canonical_bases else check_object(found)["bases"]))
    )


def _footer_error(file: str, reason: object) -> CorruptedError:
    return CorruptedError(f"the footer of {file} cannot be read: {reason}")


def _reference_to_json(reference: References, views: dict[View, int]) -> Any:
    if isinstance(reference, tuple):
        return {"chunks": [[span.key.hex(), span.start, span.length] for span in reference]}
    entry: dict[str, Any] = {"start": reference.start}
    if isinstance(reference, BaseSpan):
        entry["tensor"] = reference.tensor
    else:
        entry["view"] = views.setdefault(reference.view, len(views))
    if reference.box is not None:
        entry["box"] = [list(reference.box[0]), list(reference.box[1])]
    return entry


def _reference_from_json(entry: Any, views: Sequence[View]) -> References:
    if "chunks" not in check_object(entry):
        box = None
        if "box" in entry:
            offset, shape = entry["box"]
            box = check_shape(offset), check_shape(shape)
            if len(box[0]) != len(box[1]):
                raise ValueError("offset and shape of a box differ in length")
        start = check_natural(entry["start"])
        if "tensor" in entry:
            return BaseSpan(tensor=check_tensor_name(entry["tensor"]), start=start, box=box)
        if check_natural(entry["view"]) >= len(views):
            raise ValueError("a reference names a view that is not listed")
        return ViewSpan(view=views[entry["view"]], start=start, box=box)
    spans = tuple(_span(*span) for span in entry["chunks"])
    if not 0 < len(spans) <= _MAX_SPANS:
        raise ValueError(f"a reference has {len(spans)} parts")
    return spans


def _span(key: Any, start: Any, length: Any) -> ChunkSpan:
    # An empty part is refused, because reading it would take a whole chunk.
    if check_natural(start) + check_natural(length) > CHUNK_BYTES or length == 0:
        raise ValueError("a reference points beyond the largest chunk")
    return ChunkSpan(key=bytes.fromhex(check_id(key)), start=start, length=length)
