"""Byte layouts, digests and canonical JSON: ``docs/FORMAT.md`` in code, without any I/O.

Invariants: everything is little-endian; JSON that is hashed is canonical; whatever is parsed is
checked for its sizes before memory is taken, and anything unexpected is a :class:`CorruptedError`.

Example::

    footer = encode_footer(records)                 # end of a pack file
    name = digest(canonical({"step": 10}))          # 32 hex digits
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash
import zstandard

from msft_store.dtypes import DType
from msft_store.errors import CorruptedError, InvalidInputError, VersionError

VERSION = 1
CHUNK_BYTES = 4 << 20
"""The largest chunk; a multiple of every element size."""
KEY_BYTES = 16
MAX_DEPTH = 2
"""How many references lie between a chunk and plain bytes at most."""

PACK_MAGIC = b"msftpack"
PACK_HEADER = struct.Struct("<8sII")
PACK_TRAILER = struct.Struct("<QIII4x16s8s")
_MAX_TABLE_BYTES = 1 << 28
_NONE = 0xFFFFFFFF
_RECORD = np.dtype(
    [
        ("key", "V16"),
        ("ref_key", "V16"),
        ("offset", "<u8"),
        ("length", "<u4"),
        ("size", "<u4"),
        ("codec", "u1"),
        ("dtype", "u1"),
        ("depth", "u1"),
        ("reserved", "u1"),
        ("reference", "<u4"),
        ("base", "<u4"),
        ("reserved2", "<u4"),
    ]
)


@dataclass(frozen=True, kw_only=True, slots=True)
class BaseSpan:
    """A reference in a base: elements of one tensor, or of a box of it."""

    tensor: str
    start: int
    """First element, counted in the box (row-major)."""
    box: tuple[tuple[int, ...], tuple[int, ...]] | None = None
    """Offset and shape; ``None``: the whole tensor."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ChunkSpan:
    """A reference in another chunk: ``length`` of its decoded bytes from ``start``."""

    key: bytes
    start: int
    length: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One representation of one chunk in a pack."""

    key: bytes
    offset: int
    """Of the payload in the pack file, bytes."""
    length: int
    """Payload bytes."""
    size: int
    """Decoded bytes."""
    codec: int
    dtype: int
    depth: int
    """0: no reference; 1: the base or a chunk of depth 0; 2: a chunk of depth 1."""
    base: str | None
    """Id of the base that decoding needs, directly or through other chunks."""
    ref_key: bytes = bytes(KEY_BYTES)
    """Digest of the reference's bytes as the codec uses them; zeros without a reference."""
    reference: BaseSpan | tuple[ChunkSpan, ...] | None = None

    @property
    def refers_to_chunk(self) -> bool:
        """Whether decoding needs another chunk, not only the base."""
        if self.reference is None:
            return self.ref_key != bytes(KEY_BYTES)
        return not isinstance(self.reference, BaseSpan)


def canonical(value: Any) -> bytes:
    """Return the canonical JSON of a value: sorted keys, no spaces, ASCII, no NaN.

    :class:`InvalidInputError` if the value is not JSON.
    """
    try:
        return json.dumps(
            value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
        ).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidInputError(f"not representable as JSON: {error}") from None


def digest(data: bytes) -> str:
    """Return the xxh3-128 of bytes as 32 hex digits."""
    return xxhash.xxh3_128_hexdigest(data)


def chunk_key(data: Any, dtype: DType) -> bytes:
    """Return the key of a chunk: xxh3-128 over the dtype's name, a zero byte, and the content."""
    state = xxhash.xxh3_128(dtype.name.encode() + b"\0")
    state.update(data)
    return state.digest()


def join_keys(keys: Sequence[bytes]) -> str:
    """Return the keys of a piece's chunks as JSON holds them."""
    return b"".join(keys).hex()


def split_keys(text: str, nbytes: int) -> tuple[bytes, ...]:
    """Undo :func:`join_keys` for a piece of ``nbytes``; :class:`ValueError` for another number."""
    keys = bytes.fromhex(text)
    if len(keys) != KEY_BYTES * -(-nbytes // CHUNK_BYTES):
        raise ValueError(f"{nbytes} bytes have another number of chunks")
    return tuple(keys[at : at + KEY_BYTES] for at in range(0, len(keys), KEY_BYTES))


def seal(content: Mapping[str, Any]) -> bytes:
    """Return one line of JSON that carries its own digest."""
    return canonical({**content, "digest": digest(canonical(content))})


def unseal(data: bytes, what: str, kind: str) -> dict[str, Any]:
    """Parse what :func:`seal` wrote.

    ``kind`` is the ``format`` that is expected, ``what`` names the file in messages.
    """
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        raise CorruptedError(f"{what} is not valid JSON; restore it from a copy") from None
    if not isinstance(content, dict) or content.get("format") != kind:
        raise CorruptedError(f"{what} is not a {kind} file")
    if content.get("version") != VERSION:
        raise VersionError(
            f"{what} has format version {content.get('version')!r}; "
            f"this msft-store reads version {VERSION}: use the release that wrote it or a newer one"
        )
    stated = content.pop("digest", None)
    try:
        sound = stated == digest(canonical(content))
    except InvalidInputError:
        sound = False
    if not sound:
        raise CorruptedError(f"{what} does not match its digest; restore it from a copy")
    return content


def pack_header() -> bytes:
    """Return the first bytes of a pack file."""
    return PACK_HEADER.pack(PACK_MAGIC, VERSION, 0)


def encode_footer(records: Sequence[Record], offset: int) -> tuple[bytes, str]:
    """Return footer and trailer of a pack whose payloads end at ``offset``, and the pack's id."""
    bases: dict[str, int] = {}
    references: list[Any] = []
    array = np.zeros(len(records), _RECORD)
    for row, record in zip(array, records, strict=True):
        row["key"] = np.void(record.key)
        row["ref_key"] = np.void(record.ref_key)
        for name in ("offset", "length", "size", "codec", "dtype", "depth"):
            row[name] = getattr(record, name)
        row["base"] = _NONE if record.base is None else bases.setdefault(record.base, len(bases))
        row["reference"] = _NONE
        if record.reference is not None:
            row["reference"] = len(references)
            references.append(_reference_to_json(record.reference))
    table = canonical({"bases": list(bases), "references": references})
    raw = struct.pack("<I", len(table)) + table + array.tobytes()
    footer = zstandard.ZstdCompressor(level=3).compress(raw)
    check = xxhash.xxh3_128_digest(footer)
    trailer = PACK_TRAILER.pack(offset, len(footer), len(raw), len(records), check, PACK_MAGIC)
    return footer + trailer, check.hex()


def decode_trailer(data: bytes, file_size: int, what: str) -> tuple[int, int, int, int, bytes]:
    """Return (footer offset, footer length, decoded length, record count, digest) of a pack."""
    if len(data) != PACK_TRAILER.size:
        raise CorruptedError(f"{what} is truncated")
    offset, length, size, count, check, magic = PACK_TRAILER.unpack(data)
    if magic != PACK_MAGIC or offset + length + PACK_TRAILER.size != file_size:
        raise CorruptedError(f"{what} is truncated or damaged at its end")
    if size > _MAX_TABLE_BYTES + count * _RECORD.itemsize or count * KEY_BYTES > length + 64:
        raise CorruptedError(f"{what} declares a footer that its length rules out")
    return offset, length, size, count, check


def decode_footer(footer: bytes, size: int, count: int, check: bytes, what: str) -> list[Record]:
    """Parse a pack's footer into its records; ``size`` is its decoded length in bytes."""
    if xxhash.xxh3_128_digest(footer) != check:
        raise CorruptedError(f"the footer of {what} does not match its digest")
    try:
        raw = inflate(footer, size)
        (table_length,) = struct.unpack_from("<I", raw)
        table = json.loads(bytes(raw[4 : 4 + table_length]))
        array = np.frombuffer(raw, _RECORD, count, 4 + table_length)
        bases = [str(base) for base in table["bases"]]
        references = [_reference_from_json(entry) for entry in table["references"]]
        return [_record(row, bases, references) for row in array.tolist()]
    except (ValueError, KeyError, IndexError, TypeError, struct.error, RecursionError) as error:
        raise CorruptedError(f"the footer of {what} cannot be read: {error}") from None


def _record(row: tuple[Any, ...], bases: list[str], references: list[Any]) -> Record:
    key, ref_key, offset, length, size, codec, dtype, depth, _, reference, base, _ = row
    if size > CHUNK_BYTES or depth > MAX_DEPTH:
        raise ValueError("a chunk is larger or deeper than the format allows")
    return Record(
        key=bytes(key),
        offset=offset,
        length=length,
        size=size,
        codec=codec,
        dtype=dtype,
        depth=depth,
        base=None if base == _NONE else bases[base],
        ref_key=bytes(ref_key),
        reference=None if reference == _NONE else references[reference],
    )


def _reference_to_json(reference: BaseSpan | tuple[ChunkSpan, ...]) -> Any:
    if isinstance(reference, BaseSpan):
        entry: dict[str, Any] = {"tensor": reference.tensor, "start": reference.start}
        if reference.box is not None:
            entry["box"] = [list(reference.box[0]), list(reference.box[1])]
        return entry
    return {"chunks": [[span.key.hex(), span.start, span.length] for span in reference]}


def _reference_from_json(entry: Any) -> BaseSpan | tuple[ChunkSpan, ...]:
    if "tensor" in entry:
        box = entry.get("box")
        return BaseSpan(
            tensor=str(entry["tensor"]),
            start=_natural(entry["start"]),
            box=None if box is None else (_naturals(box[0]), _naturals(box[1])),
        )
    return tuple(
        ChunkSpan(key=bytes.fromhex(key), start=_natural(start), length=_natural(length))
        for key, start, length in entry["chunks"]
    )


def _natural(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is not a natural number")
    return value


def _naturals(values: Any) -> tuple[int, ...]:
    return tuple(_natural(value) for value in values)


def inflate(payload: bytes, size: int) -> memoryview:
    """Decompress a zstd frame that must hold exactly ``size`` bytes; :class:`ValueError` otherwise.

    Memory is bounded by ``size``, whatever the frame declares.
    """
    out = bytearray(size)
    view = memoryview(out)
    try:
        with zstandard.ZstdDecompressor(max_window_size=1 << 27).stream_reader(payload) as reader:
            filled = 0
            while filled < size:
                got = reader.readinto(view[filled:])
                if got == 0:
                    raise ValueError("compressed data ends early")
                filled += got
            if reader.read(1):
                raise ValueError("compressed data is longer than declared")
    except zstandard.ZstdError as error:
        raise ValueError(str(error)) from None
    return view
